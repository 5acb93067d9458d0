"""The dense feed-forward: SwiGLU."""

import torch.nn.functional as F
from torch import Tensor, nn

from .config import JambaConfig


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
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
