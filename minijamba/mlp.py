"""The dense feed-forward: a gated linear unit, SwiGLU in all but BlackMamba, where it is GEGLU."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import JambaConfig
from .rungs import choose, why_no_kernels


class MLP(nn.Module):
    """y = down(act(gate(x)) * up(x)),   act = silu, or gelu (by the normal distribution, not its tanh form).

    x, y: (..., d); the product inside: (..., f). Source: Shazeer, 2020; Jamba, section 2.
    """

    def __init__(self, config: JambaConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.act = config.hidden_act
        self.gate_proj = nn.Linear(width, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(width, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, width, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gated = choose("mlp", "auto", rungs(x.device), x.device)
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.act))


def rungs(device: torch.device) -> dict[str, Callable]:
    """The implementations that run on tensors of this device, slowest first, of what is between the products."""
    implementations = {"naive": _gated, "parallel": _gated}
    if why_no_kernels(device) is None:
        from .fused_glu import gated

        implementations["fused"] = gated
    return implementations


def _gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    return getattr(F, act)(gate) * up
