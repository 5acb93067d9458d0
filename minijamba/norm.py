"""Root-mean-square normalisation, used before every mixer and feed-forward and inside every Mamba mixer."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), over the last axis.

    x: (..., size), any scale. The mean is taken in float32; y has the dtype of x.
    Source: Jamba, section 6.4, for its place inside the mixer; Zhang and Sennrich, 2019, for the norm.
    """

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"
