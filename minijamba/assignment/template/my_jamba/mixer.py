"""Part 5: the Mamba mixer of Jamba: convolution, inner norms, scan, gate."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .scan import selective_scan


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, state: Tensor | None = None, return_state: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Every channel sees itself and its w-1 last inputs through a filter of its own; then SiLU.

        y_t = silu(bias + sum_j weight_j x_{t - (w-1) + j}),   j = 0 .. w-1

    Args:
        x:      (b, t, c)  inputs; t may be shorter than the filter.
        weight: (c, w)     one filter a channel, oldest tap first.
        bias:   (c,)
        state:  (b, w-1, c) the inputs before x, oldest first; zeros when None. It must not be changed.
        return_state:      return the last w-1 inputs, too: the state of the next call.
    Returns: y (b, t, c), or (y, state).
    Source:  Mamba, section 3.4.
    """
    # <solution>
    steps, width = x.shape[1], weight.shape[1]
    inputs = F.pad(x, (0, 0, width - 1, 0)) if state is None else torch.cat([state, x], dim=1)
    y = sum(weight[:, j] * inputs[:, j : j + steps] for j in range(width))
    y = F.silu(y if bias is None else y + bias)
    return (y, inputs[:, steps:]) if return_state else y
    # </solution>


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), over the last axis. The mean is taken in float32 at least."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # <solution>
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        # </solution>


def initial_bias(c: int) -> Tensor:
    """The bias (c,) that delta starts from: softplus(bias) is log-uniform in [0.001, 0.1].

        bias = delta + log(1 - exp(-delta)),   the inverse of softplus

    With a bias of zero every step has length 0.69, and the slowest state forgets half within one token.
    Source: Mamba, section 3.6.
    """
    # <solution>
    delta = 10 ** torch.empty(c).uniform_(-3, -1)
    return delta + torch.log(-torch.expm1(-delta))
    # </solution>


class MambaMixer(nn.Module):
    """x (b, t, d) -> y (b, t, d).

        x, z        = in_proj(x)                               two halves (b, t, c), in this order
        x           = causal_conv(x)
        delta, B, C = x_proj(x)                                (b, t, r), (b, t, n), (b, t, n), each through its norm
        delta       = softplus(dt_proj(delta))                 (b, t, c), a step length, > 0
        y           = selective_scan(x, delta, A, B, C, D)     A = -exp(A_log) < 0
        output      = out_proj(y silu(z))

    The cache is the pair of the convolution's state (b, w-1, c) and the scan's (b, c, n); None before the first token.
    Returns: the output and the new cache. The old one must not be changed.
    Source: Mamba, section 3.4; Jamba, section 6.4, for the three inner norms.
    """

    def __init__(self, d: int, c: int, n: int, r: int, w: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.sizes = r, n, n
        self.in_proj = nn.Linear(d, 2 * c, bias=False)
        self.conv1d = nn.Conv1d(c, c, w, groups=c)  # for its weight (c, 1, w) and its bias (c,)
        self.x_proj = nn.Linear(c, r + 2 * n, bias=False)
        self.dt_layernorm, self.b_layernorm, self.c_layernorm = (RMSNorm(size, eps) for size in self.sizes)
        self.dt_proj = nn.Linear(r, c)
        self.dt_proj.bias = nn.Parameter(initial_bias(c))
        self.A_log = nn.Parameter(torch.arange(1.0, n + 1).log().repeat(c, 1))
        self.D = nn.Parameter(torch.ones(c))
        self.out_proj = nn.Linear(c, d, bias=False)

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        # <solution>
        window, state = cache or (None, None)
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x, window = causal_conv(x, self.conv1d.weight[:, 0], self.conv1d.bias, state=window, return_state=True)
        delta, B, C = self.x_proj(x).split(self.sizes, dim=-1)
        delta, B, C = self.dt_layernorm(delta), self.b_layernorm(B), self.c_layernorm(C)
        delta = F.softplus(self.dt_proj(delta))
        y, state = selective_scan(x, delta, -self.A_log.exp(), B, C, self.D, state=state, return_state=True)
        return self.out_proj(y * F.silu(z)), (window, state)
        # </solution>
