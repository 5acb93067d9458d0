"""Norms of neighbouring parts of a tensor as one Triton kernel: a launch costs more than so little arithmetic."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rungs import ceil_div

# Rows that one program works on, and its warps of 32 threads.
TILE = {"ROWS": 8, "num_warps": 4}


def rms_norms(x: Tensor, weights: list[Tensor], eps: float) -> list[Tensor]:
    """The parts of x (..., sum of sizes), each as `RMSNorm` with its own weight (size,). Differentiable once."""
    remember = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights))
    run = _operator if remember or torch.compiler.is_compiling() else _norms
    return run(x, weights, eps)


def _norms(x: Tensor, weights: list[Tensor], eps: float) -> list[Tensor]:
    rows = x.numel() // x.shape[-1]
    parts = [x.new_empty(*x.shape[:-1], len(weight)) for weight in weights]
    _forward[ceil_div(rows, TILE["ROWS"]),](
        x.contiguous(), tuple(weights), tuple(parts), eps, rows, x.shape[-1],
        SIZES=_sizes(weights), WIDE=_wide(x), **TILE,
    )  # fmt: skip
    return parts


@torch.library.custom_op("minijamba::rms_norms_backward", mutates_args=())
def _norms_backward(dparts: list[Tensor], x: Tensor, weights: list[Tensor], eps: float) -> tuple[Tensor, list[Tensor]]:
    rows = x.numel() // x.shape[-1]
    programs = ceil_div(rows, TILE["ROWS"])
    dx = x.new_empty(x.shape)
    # Each program's part of the weights' gradients in a row of its own, then one sum: the same at every run.
    dweights = x.new_empty(programs, x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32))
    _backward[programs,](
        x.contiguous(), tuple(weights), tuple(part.contiguous() for part in dparts), dx, dweights, eps, rows,
        x.shape[-1], SIZES=_sizes(weights), WIDE=_wide(x), **TILE,
    )  # fmt: skip
    dweights = dweights.sum(0).split(_sizes(weights))
    return dx, [d.to(weight.dtype, copy=True) for d, weight in zip(dweights, weights, strict=True)]


_operator = torch.library.custom_op("minijamba::rms_norms", _norms, mutates_args=())


@_operator.register_fake
def _(x, weights, eps):
    return [x.new_empty(*x.shape[:-1], len(weight)) for weight in weights]


@_norms_backward.register_fake
def _(dparts, x, weights, eps):
    return x.new_empty(x.shape), [torch.empty_like(weight) for weight in weights]


def _save(ctx, inputs, output):
    x, weights, ctx.eps = inputs
    ctx.save_for_backward(x, *weights)


def _gradients(ctx, dparts):
    x, *weights = ctx.saved_tensors
    return *_norms_backward(dparts, x, weights, ctx.eps), None


_operator.register_autograd(_gradients, setup_context=_save)


def _sizes(weights: list[Tensor]) -> tuple[int, ...]:
    return tuple(len(weight) for weight in weights)


def _wide(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x, weights, parts, eps: tl.constexpr, rows, columns,
    SIZES: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    for i in tl.static_range(len(SIZES)):
        part, weight = read_rows(x, columns, row, rows, SIZES[i]), read_row(weights[i], SIZES[i])
        write_rows(parts[i], SIZES[i], row, rows, rms_norm(part, weight, eps, SIZES[i], WIDE), SIZES[i])
        x += SIZES[i]


@triton.jit(do_not_specialize=["rows"])
def _backward(
    x, weights, dparts, dx, dweights, eps: tl.constexpr, rows, columns,
    SIZES: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dx = (g - u mean(g u)) / rms(x)  with u = x / rms(x) and g = weight dy;  dweight = sum over rows of dy u."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dweights += tl.program_id(0).to(tl.int64) * columns
    for i in tl.static_range(len(SIZES)):
        part, dy = read_rows(x, columns, row, rows, SIZES[i]), read_rows(dparts[i], SIZES[i], row, rows, SIZES[i])
        part, dy, weight = part.to(WIDE), dy.to(WIDE), read_row(weights[i], SIZES[i]).to(WIDE)
        scale = inverse_rms(part, eps, SIZES[i])
        u, g = part * scale, dy * weight
        write_rows(dx, columns, row, rows, (g - u * (tl.sum(g * u, 1) / SIZES[i])[:, None]) * scale, SIZES[i])
        c = tl.arange(0, triton.next_power_of_2(SIZES[i]))
        tl.store(dweights + c, tl.sum(dy * u, 0), mask=c < SIZES[i])
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
