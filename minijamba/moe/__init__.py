"""The mixture of experts: a router picks k of e feed-forwards for every token. No token is ever dropped."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..config import JambaConfig
from ..rungs import choose, why_no_kernels
from . import grouped, naive
from .router import balance_loss, expert_load, route

__all__ = ["Experts", "MoE", "balance_loss", "expert_load", "mixture", "route", "waits_for_host"]


def rungs(device: torch.device) -> dict[str, Callable]:
    """The implementations that run on tensors of this device, slowest first."""
    implementations = {"naive": naive.mixture, "parallel": grouped.mixture}
    if why_no_kernels(device) is None:
        from . import fused

        implementations["fused"] = fused.mixture
    return implementations


def waits_for_host(config: JambaConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the mixture, computed in this dtype, must know on the host how many tokens each expert got.

    Then no CUDA graph can record it.
    """
    if all(layer.feed_forward != "moe" for layer in config.layers):
        return False
    if why_no_kernels(device) is not None:
        return True
    from .fused import all_at_once

    return not all_at_once(config.intermediate_size, config.hidden_size, dtype, device)


def mixture(
    x: Tensor, weights: Tensor, indices: Tensor, gate: Tensor, up: Tensor, down: Tensor, *, rung: str = "auto"
) -> Tensor:
    """The weighted sum of the chosen experts, each a SwiGLU.

        y = sum over the k chosen experts i of  weight_i  down_i (silu(gate_i x) * up_i x)

    Args:
        x:        (tokens, d)
        weights:  (tokens, k) what each chosen expert counts for, from `route`.
        indices:  (tokens, k) int64, which experts were chosen, 0 .. e-1.
        gate, up: (e, f, d);  down: (e, d, f).
    Returns: y (tokens, d).
    Source:  Jamba, section 2.
    """
    return choose("moe", rung, rungs(x.device), x.device)(x, weights, indices, gate, up, down)


class Experts(nn.Module):
    """The weights of e feed-forwards, stacked: gate_proj, up_proj (e, f, d) and down_proj (e, d, f)."""

    def __init__(self, config: JambaConfig) -> None:
        super().__init__()
        experts, width, inner = config.num_experts, config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(experts, inner, width))
        self.up_proj = nn.Parameter(torch.empty(experts, inner, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))
        for weight in self.parameters():
            nn.init.normal_(weight, std=config.initializer_range)


class MoE(nn.Module):
    """Router and experts: x (b, t, d) -> y (b, t, d) and the router's logits (b, t, e)."""

    def __init__(self, config: JambaConfig) -> None:
        super().__init__()
        self.chosen = config.num_experts_per_tok
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.router(x)
        weights, indices = route(logits.flatten(0, 1), self.chosen)
        gate, up, down = self.experts.gate_proj, self.experts.up_proj, self.experts.down_proj
        y = mixture(x.flatten(0, 1), weights.to(x.dtype), indices, gate, up, down)
        return y.view_as(x), logits
