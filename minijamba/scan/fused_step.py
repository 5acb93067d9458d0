"""One token of the selective scan as one Triton kernel; for the mixer, together with what selects delta, B and C.

A token is little work: what counts is how many kernels it takes, and that weights and states are read once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fused_norm import read_row, read_rows, rms_norm
from ..fused_overlap import gdc_launch_dependents, gdc_wait, overlap
from ..rungs import ceil_div
from .fused import _sigmoid, _softplus

# Channels (BLOCK) and sequences (ROWS) that one program works on, and its warps of 32 threads.
STEP = {"BLOCK": 64, "num_warps": 2}
ALONE = {"BLOCK": 16, "ROWS": 1, "num_warps": 4}
TOGETHER = {"BLOCK": 32, "ROWS": 16, "num_warps": 8}
TILE = 16  # the least side of a matrix product on tensor cores
FEW = 8  # sequences: fewer go alone, each reading dt_proj's weights


def step(
    state: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool,
) -> Tensor:  # fmt: skip
    """The function of `selective_step`: returns y (b, c); the state (b, c, n) is updated in place."""
    run = _step_operator if torch.compiler.is_compiling() else _token
    return run(state, x, delta, A, B, C, D, z, delta_bias, delta_softplus)


def select_and_step(
    state: Tensor, x: Tensor, z: Tensor, selected: Tensor, norms: list[Tensor], eps: float,
    dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, real: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """From `selected` (b, r + 2n), what x_proj gives, to y (b, c): three norms if any, dt_proj, the step, the gate.

    x, z (b, c); norms: the weights of the norms of delta (r,), B (n,) and C (n,), or none; dt_weight (c, r);
    dt_bias, D (c,); A = -exp(A_log) (c, n). The state (b, c, n) is updated in place, in rows where real (b,) is True.
    """
    run = _select_and_step_operator if torch.compiler.is_compiling() else _selected_token
    return run(state, x, z, selected, norms, eps, dt_weight, dt_bias, A_log, D, real)


def _token(
    state: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool,
) -> Tensor:  # fmt: skip
    x, delta, B, C, z, D, delta_bias = (
        None if tensor is None else _rows(tensor) for tensor in (x, delta, B, C, z, D, delta_bias)
    )
    batch, channels, states = state.shape
    y, dense = x.new_empty(x.shape), state.contiguous()
    _step[ceil_div(channels, STEP["BLOCK"]), batch](
        dense, x, delta, A.contiguous(), B, C, D, z, delta_bias, y, batch, channels,
        x.stride(0), delta.stride(0), B.stride(0), C.stride(0), 0 if z is None else z.stride(0),
        STATES=states, SOFTPLUS=delta_softplus, **STEP,
    )  # fmt: skip
    return y if dense is state else _copied(dense, state, y)


def _selected_token(
    state: Tensor, x: Tensor, z: Tensor, selected: Tensor, norms: list[Tensor], eps: float,
    dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, real: Tensor | None = None,
) -> Tensor:  # fmt: skip
    x, z, selected = _rows(x), _rows(z), _rows(selected)
    batch, channels, states = state.shape
    y, dense = x.new_empty(x.shape), state.contiguous()
    rank = dt_weight.shape[1]
    sizes = TOGETHER if batch >= FEW and rank >= TILE and x.element_size() == 2 else ALONE
    _select_and_step[ceil_div(channels, sizes["BLOCK"]), ceil_div(batch, sizes["ROWS"])](
        dense, x, z, selected, *(norms or [None] * 3), eps, dt_weight, dt_bias, A_log, D, real, y, batch, channels,
        x.stride(0), z.stride(0), selected.stride(0), STATES=states, RANK=rank, **sizes, **overlap(x.device),
    )  # fmt: skip
    return y if dense is state else _copied(dense, state, y)


_step_operator = torch.library.custom_op("minijamba::step", _token, mutates_args=("state",))
_select_and_step_operator = torch.library.custom_op(
    "minijamba::select_and_step", _selected_token, mutates_args=("state",)
)


@_step_operator.register_fake
@_select_and_step_operator.register_fake
def _(state, x, *rest):
    return x.new_empty(x.shape)


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _copied(dense: Tensor, state: Tensor, y: Tensor) -> Tensor:
    state.copy_(dense)
    return y


@triton.jit(do_not_specialize=["batch"])
def _step(
    state, x, delta, A, B, C, D, z, bias, y, batch, channels, x_b, delta_b, B_b, C_b, z_b,
    STATES: tl.constexpr, SOFTPLUS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    wide = state.dtype.element_ty
    b = tl.program_id(1).to(tl.int64) + tl.arange(0, 1)
    c, n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, triton.next_power_of_2(STATES))
    inside = c[None, :] < channels
    delta = tl.load(delta + b[:, None] * delta_b + c[None, :], mask=inside, other=0).to(wide)
    if bias is not None:
        delta += tl.load(bias + c[None, :], mask=inside, other=0).to(wide)
    if SOFTPLUS:
        delta = _softplus(delta)
    A = read_rows(A, STATES, c, channels, STATES).to(wide)
    B, C = read_rows(B, B_b, b, batch, STATES).to(wide), read_rows(C, C_b, b, batch, STATES).to(wide)
    _advance(state, x, delta, A, B, C, D, z, y, b, c, n, batch, channels, STATES, x_b, z_b)


@triton.jit(do_not_specialize=["batch"])
def _select_and_step(
    state, x, z, selected, dt_norm, B_norm, C_norm, eps: tl.constexpr, dt_weight, dt_bias, A_log, D, real, y, batch,
    channels, x_b, z_b, selected_b, STATES: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    wide = state.dtype.element_ty
    b = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c, n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, triton.next_power_of_2(STATES))
    weight = tl.trans(read_rows(dt_weight, RANK, c, channels, RANK)).to(wide)
    A = -tl.exp(read_rows(A_log, STATES, c, channels, STATES).to(wide))
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    delta = _part(selected, selected_b, b, batch, dt_norm, eps, RANK, wide)
    B = _part(selected + RANK, selected_b, b, batch, B_norm, eps, STATES, wide)
    C = _part(selected + RANK + STATES, selected_b, b, batch, C_norm, eps, STATES, wide)
    delta = _times(delta.to(wide), weight, ROWS).to(x.dtype.element_ty).to(wide)
    delta = _softplus(delta + tl.load(dt_bias + c, mask=c < channels, other=0).to(wide)[None, :])
    if real is not None:  # a step of length zero: it neither decays the state nor adds to it
        delta = tl.where(tl.load(real + b, mask=b < batch, other=False)[:, None], delta, 0)
    _advance(state, x, delta, A, B.to(wide), C.to(wide), D, z, y, b, c, n, batch, channels, STATES, x_b, z_b)


@triton.jit
def _part(selected, stride, b, batch, norm, eps: tl.constexpr, SIZE: tl.constexpr, wide: tl.constexpr):
    """Neighbouring numbers of every sequence, through their norm if there is one."""
    part = read_rows(selected, stride, b, batch, SIZE)
    if norm is not None:
        part = rms_norm(part, read_row(norm, SIZE), eps, SIZE, wide)
    return part


@triton.jit
def _times(rows, matrix, ROWS: tl.constexpr):
    """rows (ROWS, r) times matrix (r, c); on tensor cores, whose tf32 holds all numbers of 16 bits exactly."""
    return tl.sum(tl.trans(rows) * matrix, 0)[None, :] if ROWS == 1 else tl.dot(rows, matrix, input_precision="tf32")


@triton.jit
def _advance(state, x, delta, A, B, C, D, z, y, b, c, n, batch, channels, STATES: tl.constexpr, x_b, z_b):
    """The step itself, with the sequences b, channels c and states n on the axes of one tile (b, c, n)."""
    inside = (b[:, None] < batch) & (c[None, :] < channels)
    u = tl.load(x + b[:, None] * x_b + c[None, :], mask=inside, other=0).to(delta.dtype)
    place = state + (b[:, None, None] * channels + c[None, :, None]) * STATES + n[None, None, :]
    real = inside[:, :, None] & (n[None, None, :] < STATES)
    h = tl.load(place, mask=real, other=0)
    h = tl.exp(delta[:, :, None] * A[None, :, :]) * h + (delta * u)[:, :, None] * B[:, None, :]
    tl.store(place, h, mask=real)
    out = tl.sum(h * C[:, None, :], 2)
    if D is not None:
        out += tl.load(D + c, mask=c < channels, other=0).to(u.dtype)[None, :] * u
    if z is not None:
        gate = tl.load(z + b[:, None] * z_b + c[None, :], mask=inside, other=0).to(u.dtype)
        out *= gate * _sigmoid(gate)
    tl.store(y + b[:, None] * channels + c[None, :], out, mask=inside)
