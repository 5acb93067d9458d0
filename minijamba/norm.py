"""Root-mean-square normalisation, used before every mixer and feed-forward and inside every Mamba mixer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .rungs import choose, why_no_kernels


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), over the last axis.

    x: (..., size), any scale. The mean is taken in float32; y has the dtype of x, or the weight's where the stream is
    wider than the model. Under torch.autocast the kernels give y its dtype: what follows a norm are matrix products,
    which would cast y anyway, after it was written in full.
    Source: Jamba, section 6.4, for its place inside the mixer; Zhang and Sennrich, 2019, for the norm.
    """

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _choose(_norm, _fused_norm, x.device)(x, self.weight, self.eps)

    def of_sum(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """h = x + y and its norm: the stream, and what the next mixer or feed-forward sees of it. h = x without y."""
        if y is None:
            return x, self(x)
        return _choose(_norm_of_sum, _fused_norm_of_sum, x.device)(x, y, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


def _choose(plain: Callable, fused: Callable, device: torch.device) -> Callable:
    rungs = {"naive": plain, "parallel": plain}
    return choose("norm", "auto", rungs if why_no_kernels(device) else rungs | {"fused": fused}, device)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(_narrower(x, weight))


def _narrower(x: Tensor, weight: Tensor) -> torch.dtype:
    return weight.dtype if weight.itemsize < x.itemsize else x.dtype


def _norm_of_sum(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    h = x + y
    return h, _norm(h, weight, eps)


def _fused_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from .fused_norm import rms_norms

    return rms_norms(x, [weight], eps, _kernel_dtype(x, weight))[0]


def _fused_norm_of_sum(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from .fused_norm import add_rms_norm

    return add_rms_norm(x, y, weight, eps, _kernel_dtype(x, weight))


def _kernel_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    from .fused_norm import product_dtype

    return weight.dtype if weight.itemsize < x.itemsize else product_dtype(x)
