"""Norms as one Triton kernel: of whole rows, or of neighbouring parts of them, each part with its own weight.

A launch costs more than so little arithmetic, and each number is read from memory once and written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fused_overlap import gdc_launch_dependents, gdc_wait, overlap
from .rungs import ceil_div, operator

# Numbers that one program works on at once, and its rows at most. Programs of a backward pass, of which each has a part
# of the weights' gradients: enough to fill a GPU, too few for those parts to be much to add up.
TILE, ROWS, PROGRAMS = 2048, 8, 512


def rms_norms(x: Tensor, weights: list[Tensor], eps: float, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The parts of x (..., sum of sizes), each as `RMSNorm` with its own weight (size,). Differentiable once.

    They have the dtype of x, or the one that is given.
    """
    if torch.compiler.is_compiling():
        return _operator(x, weights, eps, dtype=dtype)
    if not torch.is_grad_enabled():
        return _norms(x, weights, eps, dtype=dtype)
    return list(_Norms.apply(x, eps, dtype, *weights))


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """h = x + y (..., size) and its norm, in the dtype that is given. Differentiable once."""
    return (_Sum.apply if torch.is_grad_enabled() else _run_sum)(x, y, weight, eps, dtype)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product takes x: another than its own under torch.autocast."""
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if autocast else x.dtype


def _norms(x: Tensor, weights: list[Tensor], eps: float, *, dtype: torch.dtype | None = None) -> list[Tensor]:
    rows, sizes = x.numel() // x.shape[-1], _sizes(weights)
    parts = [x.new_empty(*x.shape[:-1], size, dtype=dtype) for size in sizes]
    tile = _tile(sizes)
    _forward[ceil_div(rows, tile["ROWS"]),](
        x.contiguous(), None, None, tuple(weights), tuple(parts), eps, rows, x.shape[-1],
        SIZES=sizes, WIDE=_wide(x), **tile, **overlap(x.device),
    )  # fmt: skip
    return parts


def _norms_gradients(dparts: list[Tensor], x: Tensor, weights: list[Tensor], eps: float) -> tuple[Tensor, list[Tensor]]:
    dx = x.new_empty(x.shape)
    return dx, _write_gradients(dparts, x, weights, eps, dx)


def _write_gradients(
    dparts: list[Tensor], x: Tensor, weights: list[Tensor], eps: float,
    dx: Tensor, dy: Tensor | None = None, dh: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """Fill dx, dh included, and dy with the same. Returns the gradients of the weights."""
    rows, sizes = x.numel() // x.shape[-1], _sizes(weights)
    tile = _tile(sizes)
    programs = min(ceil_div(rows, tile["ROWS"]), PROGRAMS)
    # Each program's part of the weights' gradients in a row of its own, then one sum: the same at every run.
    dweights = x.new_empty(programs, x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32))
    _backward[programs,](
        x.contiguous(), tuple(weights), tuple(part.contiguous() for part in dparts), dh, dx, dy, dweights, eps, rows,
        x.shape[-1], SIZES=sizes, WIDE=_wide(x), **tile,
    )  # fmt: skip
    dweights = dweights.sum(0).split(sizes)
    return [d.to(weight.dtype, copy=len(sizes) > 1) for d, weight in zip(dweights, weights, strict=True)]


def _sum(x: Tensor, y: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    h = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, y.dtype))
    normed = x.new_empty(x.shape, dtype=dtype)
    rows, sizes = x.numel() // x.shape[-1], _sizes([weight])
    tile = _tile(sizes)
    _forward[ceil_div(rows, tile["ROWS"]),](
        x.contiguous(), y.contiguous(), h, (weight,), (normed,), eps, rows, x.shape[-1],
        SIZES=sizes, WIDE=_wide(h), **tile, **overlap(x.device),
    )  # fmt: skip
    return h, normed


def _sum_gradients(
    dh: Tensor, dnormed: Tensor, h: Tensor, weight: Tensor, eps: float, x_dtype: torch.dtype, y_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, y and the weight; that of y is empty where it is that of x."""
    dx = h.new_empty(h.shape, dtype=x_dtype)
    dy = None if x_dtype == y_dtype else h.new_empty(h.shape, dtype=y_dtype)
    (dweight,) = _write_gradients([dnormed], h, [weight], eps, dx, dy, dh.contiguous())
    return dx, h.new_empty(0) if dy is None else dy, dweight


_operator = torch.library.custom_op("minijamba::rms_norms", _norms, mutates_args=())
_norms_backward = torch.library.custom_op("minijamba::rms_norms_backward", _norms_gradients, mutates_args=())


@_operator.register_fake
def _(x, weights, eps, *, dtype=None):
    return [x.new_empty(*x.shape[:-1], len(weight), dtype=dtype) for weight in weights]


@_norms_backward.register_fake
def _(dparts, x, weights, eps):
    return x.new_empty(x.shape), [torch.empty_like(weight) for weight in weights]


def _save(ctx, inputs, output=None, keyword_only_inputs=None):
    x, weights, ctx.eps = inputs
    ctx.save_for_backward(x, *weights)


def _gradients(ctx, dparts):
    x, *weights = ctx.saved_tensors
    return *_norms_backward(dparts, x, weights, ctx.eps), None


_operator.register_autograd(_gradients, setup_context=_save)


class _Norms(torch.autograd.Function):
    """The operator for autograd alone, without its dispatch."""

    @staticmethod
    def forward(ctx, x, eps, dtype, *weights):
        _save(ctx, (x, weights, eps))
        return tuple(_norms(x, weights, eps, dtype=dtype))

    @staticmethod
    def backward(ctx, *dparts):
        x, *weights = ctx.saved_tensors
        # Under create_graph=True the operator, which refuses to be differentiated a second time.
        run = _norms_backward if torch.is_grad_enabled() else _norms_gradients
        dx, dweights = run(dparts, x, weights, ctx.eps)
        return dx, None, None, *dweights


def _sum_shapes(x, y, weight, eps, dtype):
    h = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, y.dtype))
    return h, x.new_empty(x.shape, dtype=dtype)


def _sum_gradients_shapes(dh, dnormed, h, weight, eps, x_dtype, y_dtype):
    dx, dy = (h.new_empty(h.shape, dtype=dtype) for dtype in (x_dtype, y_dtype))
    return dx, h.new_empty(0) if x_dtype == y_dtype else dy, torch.empty_like(weight)


_run_sum = operator("add_rms_norm", _sum, _sum_shapes)
_run_sum_backward = operator("add_rms_norm_backward", _sum_gradients, _sum_gradients_shapes)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, weight, eps, dtype):
        h, normed = _run_sum(x, y, weight, eps, dtype)
        ctx.eps, ctx.dtypes = eps, (x.dtype, y.dtype)
        ctx.save_for_backward(h, weight)
        return h, normed

    @staticmethod
    def backward(ctx, dh, dnormed):
        dx, dy, dweight = _run_sum_backward(dh, dnormed, *ctx.saved_tensors, ctx.eps, *ctx.dtypes)
        return dx, dy if dy.numel() else dx, dweight, None, None


def _sizes(weights: list[Tensor]) -> tuple[int, ...]:
    return tuple(len(weight) for weight in weights)


def _tile(sizes: tuple[int, ...]) -> dict[str, int]:
    """Rows of a program and its warps of 32 threads."""
    widest = 1 << (max(sizes) - 1).bit_length()
    return {"ROWS": min(max(TILE // widest, 1), ROWS), "num_warps": min(max(widest // 512, 4), 16)}


def _wide(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x, y, h, weights, parts, eps: tl.constexpr, rows, columns,
    SIZES: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Norms of the parts of x, or of h = x + y, which has one part."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    for i in tl.static_range(len(SIZES)):
        part, weight = read_rows(x, columns, row, rows, SIZES[i]), read_row(weights[i], SIZES[i])
        if y is not None:
            part = part.to(WIDE) + read_rows(y, columns, row, rows, SIZES[i]).to(WIDE)
            part = part.to(h.dtype.element_ty)
            write_rows(h, columns, row, rows, part, SIZES[i])
        write_rows(parts[i], SIZES[i], row, rows, rms_norm(part, weight, eps, SIZES[i], WIDE), SIZES[i])
        x += SIZES[i]


@triton.jit(do_not_specialize=["rows"])
def _backward(
    x, weights, dparts, dh, dx, dy, dweights, eps: tl.constexpr, rows, columns,
    SIZES: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dx = (g - u mean(g u)) / rms(x) + dh  with u = x / rms(x), g = weight dpart;  dweight = sum over rows of dpart u.

    dh, where it is given, reaches x otherwise than through the norm; dy is the same as dx, in another dtype.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    dweights += program.to(tl.int64) * columns
    for i in tl.static_range(len(SIZES)):
        weight = read_row(weights[i], SIZES[i]).to(WIDE)
        dweight = tl.zeros([ROWS, triton.next_power_of_2(SIZES[i])], WIDE)
        for first in tl.range(program * ROWS, rows, programs * ROWS):
            row = (first + tl.arange(0, ROWS)).to(tl.int64)
            part = read_rows(x, columns, row, rows, SIZES[i]).to(WIDE)
            dpart = read_rows(dparts[i], SIZES[i], row, rows, SIZES[i]).to(WIDE)
            scale = inverse_rms(part, eps, SIZES[i])
            u, g = part * scale, dpart * weight
            gradient = (g - u * (tl.sum(g * u, 1) / SIZES[i])[:, None]) * scale
            if dh is not None:
                gradient += read_rows(dh, columns, row, rows, SIZES[i]).to(WIDE)
            write_rows(dx, columns, row, rows, gradient, SIZES[i])
            if dy is not None:
                write_rows(dy, columns, row, rows, gradient, SIZES[i])
            dweight += dpart * u
        c = tl.arange(0, triton.next_power_of_2(SIZES[i]))
        tl.store(dweights + c, tl.sum(dweight, 0), mask=c < SIZES[i])
        x, dx, dweights = x + SIZES[i], dx + SIZES[i], dweights + SIZES[i]


@triton.jit
def rms_norm(x, weight, eps: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """`RMSNorm` of rows (rows, SIZE, padded with zeros to a power of two), rounded where it rounds."""
    wide = x.to(WIDE)
    rounded = (wide * inverse_rms(wide, eps, SIZE)).to(x.dtype)
    return (weight.to(WIDE) * rounded.to(WIDE)).to(x.dtype)


@triton.jit
def inverse_rms(x, eps: tl.constexpr, SIZE: tl.constexpr):
    # As a constant, eps has all the digits that float64 needs; a floating-point argument is a float32.
    square = tl.sum(x * x, 1) / SIZE + eps
    return (1 / tl.sqrt(square) if square.dtype == tl.float64 else tl.rsqrt(square))[:, None]


@triton.jit
def read_row(x, SIZE: tl.constexpr):
    c = tl.arange(0, triton.next_power_of_2(SIZE))[None, :]
    return tl.load(x + c, mask=c < SIZE, other=0)


@triton.jit
def read_rows(x, stride, row, rows, SIZE: tl.constexpr):
    row, c = row[:, None], tl.arange(0, triton.next_power_of_2(SIZE))[None, :]
    return tl.load(x + row * stride + c, mask=(row < rows) & (c < SIZE), other=0)


@triton.jit
def write_rows(x, stride, row, rows, values, SIZE: tl.constexpr):
    row, c = row[:, None], tl.arange(0, triton.next_power_of_2(SIZE))[None, :]
    tl.store(x + row * stride + c, values, mask=(row < rows) & (c < SIZE))
