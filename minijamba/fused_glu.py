"""The gate of SwiGLU and GEGLU as Triton kernels: each number is read from memory once and written once.

In a mixture of experts each row also has a weight, by which its choice counts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rungs import ceil_div, operator

# Numbers that one program works on at once, the most of them in one row, and its warps of 32 threads.
TILE, COLUMNS, WARPS = 2048, 1024, 4


def gated(gate: Tensor, up: Tensor, act: str = "silu") -> Tensor:
    """act(gate) * up of tensors (..., f); differentiable once. They may be the two halves of one product's rows."""
    return _Gated.apply(gate, up, act) if torch.is_grad_enabled() else _run(gate, up, act)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, act):
        ctx.act = act
        ctx.save_for_backward(gate, up)
        return _run(gate, up, act)

    @staticmethod
    def backward(ctx, dy):
        return *_run_backward(dy, *ctx.saved_tensors, ctx.act), None


def weighted_gated(
    gate: Tensor, up: Tensor, weights: Tensor | None = None, order: Tensor | None = None, act: str = "silu"
) -> Tensor:
    """y_i = w_i act(gate_i) * up_i of rows i, w_i being weight number order_i, or 1 without weights. No gradient."""
    y = gate.new_empty(gate.shape)
    gate, up = _rows(gate), _rows(up)
    rows, size = gate.shape
    tile = _tile(size)
    _forward[ceil_div(rows, tile["ROWS"]),](
        gate, gate.stride(0), up, up.stride(0), weights, order, y, rows,
        SIZE=size, WIDE=_wide(gate), GELU=act == "gelu", **tile,
    )  # fmt: skip
    return y


def weighted_gated_backward(
    dy: Tensor, gate: Tensor, up: Tensor, weights: Tensor | None = None, order: Tensor | None = None, act: str = "silu"
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of gate and up; with weights also theirs, in their order, and y once more."""
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    y = dweights = None
    if weights is not None:
        y, dweights = gate.new_empty(gate.shape), weights.new_empty(weights.shape)
    dy, gate, up = _rows(dy), _rows(gate), _rows(up)
    rows, size = gate.shape
    tile = _tile(size)
    _backward[ceil_div(rows, tile["ROWS"]),](
        dy, dy.stride(0), gate, gate.stride(0), up, up.stride(0), weights, order, dgate, dup, y, dweights, rows,
        SIZE=size, WIDE=_wide(gate), GELU=act == "gelu", **tile,
    )  # fmt: skip
    return dgate, dup, dweights, y


def _unweighted(gate: Tensor, up: Tensor, act: str) -> Tensor:
    return weighted_gated(gate, up, act=act)


def _gradients(dy: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor]:
    return weighted_gated_backward(dy, gate, up, act=act)[:2]


_run = operator("gated", _unweighted, lambda gate, up, act: gate.new_empty(gate.shape))
_run_backward = operator(
    "gated_backward", _gradients, lambda dy, gate, up, act: (gate.new_empty(gate.shape), up.new_empty(up.shape))
)


def _rows(x: Tensor) -> Tensor:
    """As rows (r, f) whose numbers are neighbours in memory; a copy only where they are not."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _tile(size: int) -> dict[str, int]:
    columns = min(1 << (size - 1).bit_length(), COLUMNS)
    return {"ROWS": TILE // columns, "COLUMNS": columns, "num_warps": WARPS}


def _wide(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


@triton.jit(do_not_specialize=["rows"])
def _forward(
    gate, gate_at, up, up_at, weights, order, y, rows,
    SIZE: tl.constexpr, WIDE: tl.constexpr, GELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if weights is not None:
        weight = tl.load(weights + tl.load(order + row, mask=row < rows, other=0)).to(WIDE)[:, None]
    for first in range(0, SIZE, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (c < SIZE)[None, :]
        g = tl.load(gate + row[:, None] * gate_at + c, mask=inside, other=0).to(WIDE)
        u = tl.load(up + row[:, None] * up_at + c, mask=inside, other=0).to(WIDE)
        value = (g * _normal(g) if GELU else g / (1 + tl.exp(-g))) * u
        if weights is not None:
            value *= weight
        tl.store(y + row[:, None] * SIZE + c, value, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    dy, dy_at, gate, gate_at, up, up_at, weights, order, dgate, dup, y, dweights, rows,
    SIZE: tl.constexpr, WIDE: tl.constexpr, GELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """With s = sigmoid(gate), a = gate s and dy of a row times its weight:

    dup = dy a,  dgate = dy up (s + a (1 - s)),  dweight = sum of a row's dy a up, without the weight

    For GELU s is the normal distribution, and its density n gives dgate = dy up (s + gate n).
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if weights is not None:
        choice = tl.load(order + row, mask=row < rows, other=0)
        weight = tl.load(weights + choice).to(WIDE)[:, None]
        dweight = tl.zeros([ROWS, COLUMNS], WIDE)
    for first in range(0, SIZE, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (c < SIZE)[None, :]
        at = row[:, None] * SIZE + c
        g = tl.load(gate + row[:, None] * gate_at + c, mask=inside, other=0).to(WIDE)
        u = tl.load(up + row[:, None] * up_at + c, mask=inside, other=0).to(WIDE)
        d = tl.load(dy + row[:, None] * dy_at + c, mask=inside, other=0).to(WIDE)
        s = _normal(g) if GELU else 1 / (1 + tl.exp(-g))
        a = g * s
        slope = s + g * 0.3989422804014327 * tl.exp(-0.5 * g * g) if GELU else s + a * (1 - s)
        if weights is not None:
            dweight += d * a * u
            d *= weight
            tl.store(y + at, weight * a * u, mask=inside)
        tl.store(dup + at, d * a, mask=inside)
        tl.store(dgate + at, d * u * slope, mask=inside)
    if weights is not None:
        tl.store(dweights + choice, tl.sum(dweight, 1), mask=row < rows)


@triton.jit
def _normal(x):
    """The normal distribution, the probability of a number below x."""
    return 0.5 * (1 + tl.erf(x * 0.7071067811865476))
