"""The dense feed-forward: SwiGLU."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import JambaConfig
from .rungs import choose, why_no_kernels


class MLP(nn.Module):
    """y = down(silu(gate(x)) * up(x)).

    x, y: (..., d); the product inside: (..., f). Source: Shazeer, 2020; Jamba, section 2.
    """

    def __init__(self, config: JambaConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        swiglu = choose("mlp", "auto", rungs(x.device), x.device)
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def rungs(device: torch.device) -> dict[str, Callable]:
    """The implementations that run on tensors of this device, slowest first, of what is between the products."""
    implementations = {"naive": _swiglu, "parallel": _swiglu}
    if why_no_kernels(device) is None:
        from .fused_swiglu import swiglu

        implementations["fused"] = swiglu
    return implementations


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up
