"""The mixture of experts: a router picks k of e feed-forwards for every token. No token is ever dropped."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..config import ACTIVATIONS, JambaConfig
from ..quantize import Packed, PackedWeight
from ..rungs import choose, why_no_kernels
from . import grouped, naive
from .router import Routing, balance_loss, expert_load, route, sinkhorn

ROUTED = 128  # choices, up to which one kernel multiplies by the router and chooses

__all__ = ["Experts", "MoE", "Routing", "balance_loss", "expert_load", "mixture", "route", "sinkhorn", "waits_for_host"]


def rungs(device: torch.device, biased: bool = False) -> dict[str, Callable]:
    """The implementations that run on tensors of this device, slowest first; no kernel adds biases."""
    implementations = {"naive": naive.mixture, "parallel": grouped.mixture}
    if why_no_kernels(device) is None and not biased:
        from . import fused

        implementations["fused"] = fused.mixture
    return implementations


def waits_for_host(
    config: JambaConfig, dtype: torch.dtype, device: torch.device, tokens: int | None = None, bits: int = 16
) -> bool:  # fmt: skip
    """Whether the mixture, computed in this dtype, must know on the host how many tokens each expert got.

    Then no CUDA graph can record it. tokens: of a call without gradients, whose experts have so many bits a weight.
    """
    if all(layer.feed_forward != "moe" for layer in config.layers):
        return False
    if why_no_kernels(device) is not None or config.mlp_bias:
        return True
    from .fused import all_at_once, reads_as_stored

    if tokens is not None and reads_as_stored(tokens * config.num_experts_per_tok, config.num_experts, bits):
        return False
    return not all_at_once(config.intermediate_size, config.hidden_size, dtype, device)


def mixture(
    x: Tensor, weights: Tensor, indices: Tensor, gate: Tensor | Packed, up: Tensor | Packed, down: Tensor | Packed, *,
    act: str = "silu", biases: tuple[Tensor, Tensor, Tensor] | None = None, rung: str = "auto",
) -> Tensor:  # fmt: skip
    """The weighted sum of the chosen experts, each a gated linear unit.

        y = sum over the k chosen experts i of  weight_i  down_i (act(gate_i x) * up_i x)

    Args:
        x:        (tokens, d)
        weights:  (tokens, k) what each chosen expert counts for, from `route`.
        indices:  (tokens, k) int64, which experts were chosen, 0 .. e-1.
        gate, up: (e, f, d);  down: (e, d, f);  each a tensor or packed in fewer bits, then not differentiable.
        act:      "silu" or "gelu".
        biases:   of gate and up (e, f), and of down (e, d), added to their products.
    Returns: y (tokens, d).
    Source:  Jamba, section 2.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"act is {act!r}, but must be one of {', '.join(ACTIVATIONS)}")
    run = choose("moe", rung, rungs(x.device, biases is not None), x.device)
    return run(x, weights, indices, gate, up, down, act, biases)


class Experts(nn.Module):
    """The weights of e feed-forwards, stacked: gate_proj, up_proj (e, f, d) and down_proj (e, d, f).

    With biases also gate_bias, up_bias (e, f) and down_bias (e, d).
    """

    def __init__(self, config: JambaConfig) -> None:
        super().__init__()
        experts, width, inner = config.num_experts, config.hidden_size, config.intermediate_size
        self.act, self.biased = config.hidden_act, config.mlp_bias
        self.gate_proj = nn.Parameter(torch.empty(experts, inner, width))
        self.up_proj = nn.Parameter(torch.empty(experts, inner, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))
        for weight in self.parameters():
            nn.init.normal_(weight, std=config.initializer_range)
        if self.biased:
            self.gate_bias = nn.Parameter(torch.zeros(experts, inner))
            self.up_bias = nn.Parameter(torch.zeros(experts, inner))
            self.down_bias = nn.Parameter(torch.zeros(experts, width))

    def forward(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        biases = (self.gate_bias, self.up_bias, self.down_bias) if self.biased else None
        stacks = (
            stack.packed() if isinstance(stack, PackedWeight) else stack
            for stack in (self.gate_proj, self.up_proj, self.down_proj)
        )
        return mixture(x, weights, indices, *stacks, act=self.act, biases=biases)


class MoE(nn.Module):
    """Router and experts: x (b, t, d) -> y (b, t, d), and how the tokens were routed.

    Sinkhorn's choice, which depends on all tokens, is made in training alone: in training mode, with gradients on.
    Whoever only reads a model reads each token by itself. Of all tokens only those count that `real` (b, t) bool says
    are no padding.
    """

    def __init__(self, config: JambaConfig) -> None:
        super().__init__()
        self.chosen, self.routing, self.renormalise = config.num_experts_per_tok, config.routing, config.norm_topk_prob
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=config.router_bias)
        self.experts = Experts(config)

    def forward(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Routing]:
        tokens = x.flatten(0, 1)
        few = len(tokens) * self.chosen <= ROUTED and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        run = choose("moe", "auto", _route_rungs(x.device, few), x.device)
        logits, weights, indices = run(self, tokens, None if real is None else real.flatten())
        y = self.experts(tokens, weights.to(x.dtype), indices)
        logits, indices = (tensor.view(*x.shape[:2], -1) for tensor in (logits, indices))
        return y.view_as(x), Routing(logits, indices)


def _route_rungs(device: torch.device, few: bool) -> dict[str, Callable]:
    """How tokens (tokens, d) are routed; in one kernel where they are few and nothing is to be differentiated."""
    implementations = {"naive": _route, "parallel": _route}
    if why_no_kernels(device) is None:
        implementations["fused"] = _fused_route if few else _route
    return implementations


def _route(moe: MoE, tokens: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    logits = moe.router(tokens)
    training = moe.training and torch.is_grad_enabled()
    return logits, *route(logits, moe.chosen, moe.routing, renormalise=moe.renormalise, training=training, real=real)


def _fused_route(moe: MoE, tokens: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    from .fused_route import route as fused_route

    return fused_route(tokens, moe.router.weight, moe.router.bias, moe.chosen, moe.routing, moe.renormalise)
