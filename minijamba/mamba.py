"""The Mamba mixer, with or without Jamba's inner norms: convolution, scan, gate. All tokens at once, or one."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import Layout, MambaState
from .config import JambaConfig
from .conv import causal_conv, causal_conv_step
from .norm import RMSNorm
from .rungs import choose, why_no_kernels
from .scan import selective_scan, selective_step


class Mamba(nn.Module):
    """x (b, t, d) -> (b, t, d).

        x, z        = in_proj(x)                          two halves (b, t, c)
        x           = silu(conv(x))
        delta, B, C = x_proj(x)                           (b, t, r), (b, t, n), (b, t, n), in Jamba each through a norm
        delta       = softplus(dt_proj(delta) + bias)     (b, t, c), a step length, > 0
        y           = scan(x, delta, A, B, C, D) silu(z)  A = -exp(A_log) < 0
        output      = out_proj(y)

    A_log and delta's bias stay float32 when the model is cast to half precision: the recurrence raises their rounding
    to the power of the time remembered.

    Source: Mamba, section 3.4; Jamba, section 6.4, for the three inner norms.
    """

    def __init__(self, config: JambaConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.d_inner
        rank, states = config.mamba_dt_rank, config.mamba_d_state
        self.in_proj = nn.Linear(width, 2 * inner, bias=config.mamba_proj_bias)
        self.conv1d = nn.Conv1d(inner, inner, config.mamba_d_conv, groups=inner, bias=config.mamba_conv_bias)
        self.x_proj = nn.Linear(inner, rank + 2 * states, bias=False)
        self.sizes = rank, states, states
        if config.mamba_inner_layernorms:
            self.dt_layernorm = RMSNorm(rank, config.rms_norm_eps)
            self.b_layernorm = RMSNorm(states, config.rms_norm_eps)
            self.c_layernorm = RMSNorm(states, config.rms_norm_eps)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, states))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=config.mamba_proj_bias)
        if not self.A_log.is_meta:  # there, torch would take seconds to get ready for arithmetic on nothing
            with torch.no_grad():
                self.A_log.copy_(torch.arange(1.0, states + 1).log())
            init_delta(self.dt_proj)

    @property
    def A(self) -> Tensor:
        """(c, n) decay rates, < 0."""
        return -self.A_log.exp()

    @property
    def norms(self) -> tuple[RMSNorm, ...]:
        """Of delta, B and C; empty where there are none."""
        return (self.dt_layernorm, self.b_layernorm, self.c_layernorm) if hasattr(self, "dt_layernorm") else ()

    def forward(self, x: Tensor, layout: Layout, cache: MambaState | None = None) -> Tensor:
        if cache is not None and x.shape[1] == 1 and layout.documents is None and not torch.is_grad_enabled():
            return self.step(x, cache, None if layout.real is None else layout.real[:, 0])
        x, z = self.in_proj(x).chunk(2, dim=-1)
        window, state = _continue(cache, layout)
        x, window = causal_conv(
            x,
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            state=window,
            segments=layout.documents,
            lengths=layout.lengths,
            return_state=True,
        )
        delta, B, C = self.select(x)
        if layout.real is not None:
            # A step of length zero: softplus(-inf) = 0, so padding neither decays the state nor adds to it.
            delta = delta.masked_fill(~layout.real[:, :, None], -torch.inf)
        y, state = selective_scan(
            x, delta, self.A, B, C, self.D, z,
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
            state=state,
            segments=layout.documents,
            return_state=True,
        )  # fmt: skip
        if cache is not None:
            cache.window, cache.state = window.to(cache.window.dtype), state
        return self.out_proj(y)

    def select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What makes the scan selective: x (b, t, c) -> delta (b, t, c) before bias and softplus, B and C (b, t, n)."""
        selected = self.x_proj(x)
        if self.norms:
            norm = choose("scan", "auto", _rungs(x.device, _norms, _fused_norms), x.device)
            delta, B, C = norm(selected, self.norms)
        else:
            delta, B, C = selected.split(self.sizes, dim=-1)
        return F.linear(delta, self.dt_proj.weight), B, C

    def step(self, x: Tensor, cache: MambaState, real: Tensor | None = None) -> Tensor:
        """One token: x (b, 1, d) -> (b, 1, d). Window and state are updated in place, where `real` (b,) bool says so.

        No gradients.
        """
        x, z = self.in_proj(x[:, 0]).chunk(2, dim=-1)
        x = causal_conv_step(cache.window, x, self.conv1d.weight[:, 0], self.conv1d.bias, real=real)
        select_and_step = choose("scan", "auto", _rungs(x.device, _select_and_step, _fused_select_and_step), x.device)
        return self.out_proj(select_and_step(self, x, z, cache.state, real))[:, None]

    def _apply(self, fn, recurse=True):
        kept = [(self, "A_log"), (self.dt_proj, "bias")]
        before = [getattr(owner, name).data for owner, name in kept]
        super()._apply(fn, recurse)
        for (owner, name), original in zip(kept, before, strict=True):
            parameter = getattr(owner, name)
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = original.to(parameter.device, torch.float32)
        return self


def _rungs(device: torch.device, plain: Callable, fused: Callable) -> dict[str, Callable]:
    rungs = {"naive": plain, "parallel": plain}
    return rungs if why_no_kernels(device) else rungs | {"fused": fused}


def _norms(x: Tensor, norms: tuple[RMSNorm, ...]) -> list[Tensor]:
    """Neighbouring parts of the last axis, each through its own norm."""
    parts = x.split([len(norm.weight) for norm in norms], dim=-1)
    return [norm(part) for norm, part in zip(norms, parts, strict=True)]


def _fused_norms(x: Tensor, norms: tuple[RMSNorm, ...]) -> list[Tensor]:
    from .fused_norm import rms_norms

    return rms_norms(x, [norm.weight for norm in norms], norms[0].eps)


def _select_and_step(mamba: Mamba, x: Tensor, z: Tensor, state: Tensor, real: Tensor | None) -> Tensor:
    """From the convolution's output to the gate's, all (b, c); the state is updated in place."""
    delta, B, C = mamba.select(x)
    if real is not None:
        delta = delta.masked_fill(~real[:, None], -torch.inf)
    return selective_step(
        state, x, delta, mamba.A, B, C, mamba.D, z, delta_bias=mamba.dt_proj.bias, delta_softplus=True
    )


def _fused_select_and_step(mamba: Mamba, x: Tensor, z: Tensor, state: Tensor, real: Tensor | None) -> Tensor:
    """The same in two launches: x_proj, then all the rest."""
    from .fused_linear import FEW, product
    from .scan.fused_step import select_and_step

    few = len(x) <= FEW and not torch.compiler.is_compiling()
    selected = product(x, mamba.x_proj.weight) if few else mamba.x_proj(x)
    weights, eps = [norm.weight for norm in mamba.norms], mamba.norms[0].eps if mamba.norms else 0.0
    return select_and_step(
        state, x, z, selected, weights, eps,
        mamba.dt_proj.weight, mamba.dt_proj.bias, mamba.A_log, mamba.D, real,
    )  # fmt: skip


def _continue(cache: MambaState | None, layout: Layout) -> tuple[Tensor | None, Tensor | None]:
    """Window and state to start from; zero in rows that start a new document."""
    if cache is None:
        return None, None
    if layout.fresh is None:
        return cache.window, cache.state
    fresh = layout.fresh[:, None, None]
    return cache.window.masked_fill(fresh, 0), cache.state.masked_fill(fresh, 0)


@torch.no_grad()
def init_delta(dt_proj: nn.Linear, shortest: float = 1e-3, longest: float = 0.1, floor: float = 1e-4) -> None:
    """Mamba's own start: step lengths log-uniform in [0.001, 0.1], stored as the inverse of softplus.

        bias = delta + log(1 - exp(-delta)),   weight uniform in +- r^-0.5

    With the usual bias of zero every step has length 0.69, and the slowest state forgets half within one token.
    Source: Mamba, section 3.6, and its code.
    """
    delta = torch.empty_like(dt_proj.bias).uniform_(math.log(shortest), math.log(longest)).exp().clamp(min=floor)
    dt_proj.bias.copy_(delta + torch.log(-torch.expm1(-delta)))
    nn.init.uniform_(dt_proj.weight, -(dt_proj.in_features**-0.5), dt_proj.in_features**-0.5)
