"""Cross-entropy as Triton kernels that read the logits as they are: the largest tensor of a training step by far.

Forward reads them once and keeps one number a row, the logarithm of the sum of exponentials; backward reads them again
and writes their gradient, in their own dtype. The arithmetic is float32 at least.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rungs import ceil_div, operator

# Logits that one program works on at once, and its warps of 32 threads.
BLOCK, WARPS = 4096, 8


def cross_entropy(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """The function of `loss.cross_entropy`; differentiable once. A target out of range makes the loss NaN."""
    return _CrossEntropy.apply(logits, targets, ignored)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, ignored):
        loss, sums, judged = _run(logits, targets, ignored)
        ctx.ignored = ignored
        ctx.save_for_backward(logits, targets, sums, judged)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        return _run_backward(dloss, *ctx.saved_tensors, ctx.ignored), None, None


def _loss(logits: Tensor, targets: Tensor, ignored: int) -> tuple[Tensor, Tensor, Tensor]:
    """The mean; of every row, the logarithm of its sum of exponentials; how many targets are judged."""
    rows, size = logits.shape
    logits, wide = _rows(logits), torch.promote_types(logits.dtype, torch.float32)
    losses, sums = logits.new_empty(rows, dtype=wide), logits.new_empty(rows, dtype=wide)
    _forward[rows,](
        logits, logits.stride(0), targets.contiguous(), losses, sums,
        SIZE=size, IGNORED=ignored, BLOCK=_block(size), num_warps=WARPS,
    )  # fmt: skip
    judged = (targets != ignored).sum()
    return losses.sum() / judged, sums, judged


def _gradient(dloss: Tensor, logits: Tensor, targets: Tensor, sums: Tensor, judged: Tensor, ignored: int) -> Tensor:
    rows, size = logits.shape
    logits, dlogits, block = _rows(logits), logits.new_empty(rows, size), _block(size)
    _backward[rows, ceil_div(size, block)](
        logits, logits.stride(0), targets.contiguous(), sums, dloss / judged, dlogits,
        SIZE=size, IGNORED=ignored, BLOCK=block, num_warps=WARPS,
    )  # fmt: skip
    return dlogits


def _shapes(logits, targets, ignored):
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty((), dtype=wide), logits.new_empty(len(logits), dtype=wide), targets.new_empty(())


def _gradient_shape(dloss, logits, targets, sums, judged, ignored):
    return logits.new_empty(logits.shape)


_run = operator("cross_entropy", _loss, _shapes)
_run_backward = operator("cross_entropy_backward", _gradient, _gradient_shape)


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _block(size: int) -> int:
    return min(1 << (size - 1).bit_length(), BLOCK)


@triton.jit
def _forward(
    logits, logits_at, targets, losses, sums, SIZE: tl.constexpr, IGNORED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A row: ln sum exp = m + ln(sum exp(x - m)), where m is the largest so far and the sum is scaled as it grows."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_at
    wide = sums.dtype.element_ty
    largest, total = tl.full([], -1e38, wide), tl.zeros([], wide)
    for first in range(0, SIZE, BLOCK):
        c = first + tl.arange(0, BLOCK)
        x = tl.load(logits + c, mask=c < SIZE, other=-float("inf")).to(wide)
        larger = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), 0)
        largest = larger
    logarithm = largest + tl.log(total)
    target = tl.load(targets + row)
    x = tl.load(logits + target, mask=(target >= 0) & (target < SIZE), other=float("nan")).to(wide)
    tl.store(losses + row, tl.where(target == IGNORED, 0, logarithm - x))
    tl.store(sums + row, logarithm)


@triton.jit
def _backward(
    logits, logits_at, targets, sums, scale, dlogits, SIZE: tl.constexpr, IGNORED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A piece of a row: (softmax - 1 at the target) times the scale of the loss, and zero where nothing is judged."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target, logarithm, scale = tl.load(targets + row), tl.load(sums + row), tl.load(scale)
    x = tl.load(logits + row * logits_at + c, mask=c < SIZE, other=0).to(logarithm.dtype)
    gradient = (tl.exp(x - logarithm) - tl.where(c == target, 1, 0)) * scale
    tl.store(dlogits + row * SIZE + c, tl.where(target == IGNORED, 0, gradient), mask=c < SIZE)
