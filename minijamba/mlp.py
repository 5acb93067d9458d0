"""The dense feed-forward: a gated linear unit, SwiGLU in all but BlackMamba, where it is GEGLU."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import JambaConfig
from .quantize import PackedLinear
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
        if isinstance(self.gate_proj, PackedLinear) and self.gate_proj.bias is None and not torch.is_grad_enabled():
            run = choose("mlp", "auto", _packed_rungs(x.device), x.device)
            return self.down_proj(run(self, x))
        return self.down_proj(self.gated(x))

    def gated(self, x: Tensor) -> Tensor:
        """act(gate(x)) * up(x): x (..., d) -> (..., f)."""
        gated = choose("mlp", "auto", rungs(x.device), x.device)
        return gated(self.gate_proj(x), self.up_proj(x), self.act)


def rungs(device: torch.device) -> dict[str, Callable]:
    """The implementations that run on tensors of this device, slowest first, of what is between the products."""
    implementations = {"naive": _gated, "parallel": _gated}
    if why_no_kernels(device) is None:
        from .fused_glu import gated

        implementations["fused"] = gated
    return implementations


def _packed_rungs(device: torch.device) -> dict[str, Callable]:
    """The same with packed weights, products included."""
    implementations = {"naive": MLP.gated, "parallel": MLP.gated}
    return implementations if why_no_kernels(device) else implementations | {"fused": _fused_packed}


def _fused_packed(mlp: MLP, x: Tensor) -> Tensor:
    from .fused_linear import FEW, product

    rows = x.numel() // x.shape[-1]
    if rows > FEW:
        return mlp.gated(x)
    inner = product(x.reshape(rows, -1), mlp.gate_proj.weight.packed(), mlp.up_proj.weight.packed(), mlp.act)
    return inner.view(*x.shape[:-1], -1)


def _gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    return getattr(F, act)(gate) * up
