"""The mixture of experts on a GPU: sorted on the device, so that nothing waits for the host and a graph can record it.

    rows  = x[token]                                       a row for every choice, those of an expert side by side
    inner = weight act(rows gate^T) * (rows up^T)          with every row's own expert
    y_t   = sum of the k rows of (inner down^T) that are t's

The weight of a choice is applied inside, where the definition applies it to the result: the same, as `down` is linear,
but the rows that come out need not be kept for its gradient. Backward goes the same way with gather and sum exchanged:
no additions whose order could change.
"""

from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..fused_glu import weighted_gated, weighted_gated_backward
from ..fused_linear import product, unpack
from ..fused_norm import product_dtype
from ..fused_overlap import gdc_launch_dependents, gdc_wait, overlap
from ..packed import Packed
from ..rungs import ceil_div, operator
from .fused_route import sort

# Numbers that one program sums at once, and its warps of 32 threads.
TILE, WARPS = 2048, 4
# Bits -> choices an expert, up to which weights are read as stored. Beyond, other products are faster, also with the
# time for unpacking.
AS_STORED = {16: 16, 8: 256, 4: 128}
SORTED = 128  # choices that one program sorts


def mixture(
    x: Tensor, weights: Tensor, indices: Tensor, gate: Tensor, up: Tensor, down: Tensor,
    act: str = "silu", biases: None = None,
) -> Tensor:  # fmt: skip
    """The function of `naive.mixture`, same arguments, without biases, which no kernel adds; differentiable once.

    All experts at once in bfloat16 (or under autocast to it) where d and f are multiples of 8, on Hopper GPUs;
    otherwise one after the other, for which the host has to know how many tokens each has.
    """
    packed = isinstance(gate, Packed)
    learns = torch.is_grad_enabled() and (not packed or x.requires_grad or weights.requires_grad)
    if not learns and not torch.compiler.is_compiling() and (packed or x.dtype == gate.dtype):
        if reads_as_stored(indices.numel(), len(gate), _bits(gate)):
            return _as_stored(x, weights, indices, gate, up, down, act)
        if packed:
            return _mixture(x.contiguous(), weights.contiguous(), indices, gate, up, down, act)[0]
    dtype = product_dtype(x)
    x, gate, up, down = (_matrices(tensor).to(dtype).contiguous() for tensor in (x, gate, up, down))
    arguments = x, weights.contiguous(), indices, gate, up, down, act
    return _Mixture.apply(*arguments) if torch.is_grad_enabled() else _run(*arguments)[0]


def reads_as_stored(choices: int, experts: int, bits: int) -> bool:
    """Whether so few tokens meet the weights as they are stored, which asks nothing of the host."""
    return choices <= AS_STORED[bits] * experts


def _bits(stack: Tensor | Packed) -> int:
    return stack.bits if isinstance(stack, Packed) else 16


def _as_stored(
    x: Tensor, weights: Tensor, indices: Tensor, gate: Tensor | Packed, up: Tensor | Packed, down: Tensor | Packed,
    act: str,
) -> Tensor:  # fmt: skip
    """For few tokens an expert: the weights are read once, as they are stored, and no other expert's. No gradient."""
    weights, indices, k = weights.contiguous(), indices.contiguous(), indices.shape[1]
    if len(indices) == 1:  # one token chooses no expert twice
        inner = product(x, gate, up, act, weights, chosen=indices, gather=k)
        return product(inner, down, chosen=indices, add=True)
    order, place, ends = (sort if indices.numel() <= SORTED else _sort)(indices, len(gate))
    inner = product(x, gate, up, act, weights, order, ends, gather=k)
    return _sum_rows([product(inner, down, ends=ends)], place)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, indices, gate, up, down, act):
        y, *saved = _run(x, weights, indices, gate, up, down, act)
        ctx.act = act
        ctx.save_for_backward(x, weights, gate, up, down, *saved)
        return y

    @staticmethod
    def backward(ctx, dy):
        dx, dweights, *dstacks = _run_backward(dy, *ctx.saved_tensors, ctx.act)
        return dx, dweights, None, *dstacks, None


def _mixture(
    x: Tensor, weights: Tensor, indices: Tensor, gate: Tensor, up: Tensor, down: Tensor, act: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, and what the gradient needs again."""
    order, place, ends = _sort(indices, len(gate))
    product = _product(gate.shape, x.dtype, x.device, ends)
    rows = _sum_rows([x], order // indices.shape[1])
    g, u = product(rows, _matrices(gate).mT), product(rows, _matrices(up).mT)
    inner = weighted_gated(g, u, weights, order, act)
    return _sum_rows([product(inner, _matrices(down).mT)], place), g, u, order, place, ends


def _matrices(stack: Tensor | Packed) -> Tensor:
    """Packed ones are unpacked when they are needed, so that memory holds one stack of them at a time."""
    return unpack(stack) if isinstance(stack, Packed) else stack


def _gradients(
    dy: Tensor, x: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor,
    g: Tensor, u: Tensor, order: Tensor, place: Tensor, ends: Tensor, act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weights, gate, up and down."""
    token, product = order // weights.shape[1], _product(gate.shape, gate.dtype, gate.device, ends)
    rows, drows = _sum_rows([x], token), _sum_rows([dy], token)
    dg, du, dweights, inner = weighted_gated_backward(product(drows, down), g, u, weights, order, act)
    dx = _sum_rows([product(dg, gate), product(du, up)], place)
    return dx, dweights, product(dg.mT, rows), product(du.mT, rows), product(drows.mT, inner)


def _shapes(x, weights, indices, gate, up, down, act):
    experts, inner, _ = gate.shape
    choices = indices.numel()
    g, u = x.new_empty(choices, inner), x.new_empty(choices, inner)
    order, place = indices.new_empty(choices), indices.new_empty(indices.shape)
    return x.new_empty(x.shape), g, u, order, place, indices.new_empty(experts, dtype=torch.int32)


def _gradients_shapes(dy, x, weights, gate, up, down, *saved):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, weights, gate, up, down))


_run = operator("mixture", _mixture, _shapes)
_run_backward = operator("mixture_backward", _gradients, _gradients_shapes)


def _sort(indices: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choices (tokens, k), numbered row by row, in order of their experts.

    [[1 0] [1 1]] gives the order [1 | 0 2 3], the place [[1 0] [2 3]] of every choice in it, and where each expert's
    choices end, [1 4] (int32).
    """
    choices = indices.flatten().int()  # the sort goes over all bits that there are
    chosen, order = choices.sort(stable=True)
    number = torch.arange(len(choices), device=indices.device)
    place = torch.empty_like(order).scatter_(0, order, number).view(indices.shape)
    expert = torch.arange(experts, device=indices.device, dtype=torch.int32)
    return order, place, torch.searchsorted(chosen, expert, right=True, out_int32=True)


def _product(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, ends: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function that multiplies group by group, where group i of rows ends before ends_i.

    (m, i) and one matrix a group (e, i, o) -> (m, o);  (i, m) and (m, o), both cut along m -> (e, i, o).
    """
    _, inner, width = shape
    if all_at_once(inner, width, dtype, device):
        return partial(F.grouped_mm, offs=ends)
    groups = list(pairwise([0, *ends.tolist()]))

    def one_by_one(a: Tensor, b: Tensor) -> Tensor:
        if b.dim() == 3:
            return torch.cat([a[i:j] @ matrix for (i, j), matrix in zip(groups, b, strict=True)])
        return torch.stack([a[:, i:j] @ b[i:j] for i, j in groups])

    return one_by_one


def all_at_once(inner: int, width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether one kernel multiplies all groups, so that the host need not know how large they are."""
    # Strides of 16 bytes are what the kernel can load.
    return dtype == torch.bfloat16 and inner % 8 == width % 8 == 0 and _has_kernel(device)


@cache
def _has_kernel(device: torch.device) -> bool:
    """Older GPUs ask the host for the groups; newer ones leave the gradient of a group without rows unwritten."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device)[0] == 9


def _sum_rows(sources: list[Tensor], index: Tensor) -> Tensor:
    """y_i = sum over the sources and over j of source[index_ij]: sources (m, d), index (r,) or (r, k) -> y (r, d)."""
    rows, size = len(index), sources[0].shape[1]
    y = sources[0].new_empty(rows, size)
    columns = min(1 << (size - 1).bit_length(), TILE)
    tile = {"ROWS": TILE // columns, "COLUMNS": columns, "num_warps": WARPS}
    _sum[ceil_div(rows, tile["ROWS"]), ceil_div(size, columns)](
        tuple(source.contiguous() for source in sources), index.contiguous(), y, rows,
        SIZE=size, K=index.numel() // rows, WIDE=tl.float64 if y.dtype == torch.float64 else tl.float32, **tile,
        **overlap(y.device),
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["rows"])
def _sum(
    sources, index, y, rows,
    SIZE: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (c < SIZE)[None, :]
    total = tl.zeros([ROWS, COLUMNS], WIDE)
    for j in tl.static_range(K):
        place = tl.load(index + row * K + j, mask=row < rows, other=0)[:, None] * SIZE + c
        for i in tl.static_range(len(sources)):
            total += tl.load(sources[i] + place, mask=inside, other=0).to(WIDE)
    tl.store(y + row[:, None] * SIZE + c, total, mask=inside)
