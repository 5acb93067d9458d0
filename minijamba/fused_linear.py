"""Products with packed weights as Triton kernels: for few tokens the weights are read as they are stored, once.

A token of a large model costs one reading of its weights: half or a quarter of bfloat16's bytes are half or a quarter
of the time. For many tokens the products themselves are what takes time, and nothing multiplies faster than cuBLAS: the
weights are unpacked into a matrix that is thrown away afterwards.
"""

from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .fused_overlap import gdc_launch_dependents, gdc_wait, overlap
from .packed import GROUP, PLANES, Packed
from .rungs import ceil_div, interpreted

BLOCK = GROUP * PLANES  # weights of int4 that 64 words of 16 bits hold
FEW = 64  # tokens, up to which a dense matrix is read as stored
ENOUGH = 512  # programs keep a GPU's memory busy; fewer share out the inputs among them as well
# Bits -> outputs (ROWS) and inputs (COLUMNS) that a program reads at a time, its warps and how many reads are on their
# way at once: for one matrix, for two, for more than 16 tokens, and for 128. int4 always reads blocks of 256 weights.
TILES = {
    16: [(16, 128, 1, 5), (16, 128, 1, 5), (32, 64, 2, 4), (64, 64, 4, 4)],
    8: [(32, 128, 2, 4), (32, 128, 2, 4), (64, 128, 4, 4), (64, 64, 4, 4)],
    4: [(32, BLOCK, 2, 3), (32, BLOCK, 1, 3), (64, BLOCK, 4, 3)],
}
LEAST = 1024  # inputs that are worth a program of their own


def linear(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """The function of `quantize.linear`."""
    rows = x.numel() // x.shape[-1]
    if rows > FEW or torch.is_grad_enabled() and x.requires_grad:
        return F.linear(x, unpack(weight), bias)
    y = product(x.reshape(rows, -1), weight).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def product(
    x: Tensor, first: Packed | Tensor, second: Packed | Tensor | None = None, act: str | None = None,
    weights: Tensor | None = None, order: Tensor | None = None, ends: Tensor | None = None,
    chosen: Tensor | None = None, gather: int = 0, add: bool = False,
) -> Tensor:  # fmt: skip
    """Row by row first x, or with a second matrix act(first x) * (second x), times the row's weight if there is one.

    Args:
        x:       (rows, in), or with `gather` (rows / gather, in): row i is then that of number order_i / gather.
        first:   (out, in), or a stack (e, out, in) with `ends` (e,) int32: the rows before ends_i that belong to no
                 matrix before i are multiplied by matrix i.
        chosen:  (rows,) int64, in place of `ends`: row i is multiplied by matrix chosen_i, each by another one.
        order:   (rows,) int64; when None, 0, 1, 2, ...
        weights: as many as rows, of any shape: row i has weight number order_i.
    Returns: (rows, out), or with `add` (1, out), the sum of the rows that are `chosen`. No gradient.
    """
    rows = max(gather, 1) * len(x)
    values, scales, bits = _parts(first)
    outputs, inputs = first.shape[-2:]
    experts = 1 if ends is None else len(values)
    tokens, tile = _tile(1 if chosen is not None else rows, experts, bits, second is not None)
    blocks = ceil_div(outputs, tile["ROWS"])
    if chosen is not None:
        tiles = rows
    else:
        tiles = ceil_div(rows, tokens) if ends is None else min(experts, rows) + rows // tokens
    split = 1 if second is not None else _split(blocks * tiles, inputs, tile["COLUMNS"])
    terms = tiles if add else 1
    y = x.new_empty(1 if add else rows, outputs)
    sums = x.new_empty(split * terms, len(y), outputs, dtype=y.dtype if y.dtype == torch.float64 else torch.float32)
    arrivals = _arrivals(x.device, blocks * tiles)
    second_values, second_scales = (None, None) if second is None else _parts(second)[:2]
    _product[blocks, tiles, split](
        x.contiguous(), order, ends, chosen, weights, values, scales, second_values, second_scales, y, sums, arrivals,
        rows, outputs, IN=inputs, EXPERTS=experts, GATHER=gather, ACT=act, BITS=bits, TOKENS=tokens, SPLIT=split,
        TERMS=terms, WIDE=wide(x), NUMBERS=numbers(x.dtype), **tile, **overlap(x.device),
    )  # fmt: skip
    return y


def unpack(weight: Packed) -> Tensor:
    """The function of `quantize.unpack`."""
    outputs = weight.values.numel() // weight.values.shape[-1]
    matrix = weight.values.new_empty(weight.shape, dtype=weight.dtype)
    columns = min(triton.next_power_of_2(weight.inputs), 4096)
    _unpack[outputs, ceil_div(weight.inputs, columns)](
        weight.values, weight.scales, matrix, weight.values.shape[-1], weight.inputs,
        BITS=weight.bits, COLUMNS=max(columns, BLOCK), num_warps=4,
    )  # fmt: skip
    return matrix


def _parts(weight: Packed | Tensor) -> tuple[Tensor, Tensor | None, int]:
    if isinstance(weight, Packed):
        return weight.values, weight.scales, weight.bits
    return weight.contiguous(), None, 16


def _tile(rows: int, experts: int, bits: int, gated: bool) -> tuple[int, dict[str, int]]:
    """Rows of x that a program multiplies at once, and its tile of the weights."""
    usual = rows if experts == 1 else ceil_div(2 * rows, experts)  # experts are not chosen evenly
    tokens = min(max(triton.next_power_of_2(usual), 16 if interpreted() else 8), FEW)
    kind = 2 if tokens > 16 else int(gated)
    if usual >= 256 and bits > 4:
        tokens, kind = 128, 3
    outputs, columns, warps, stages = TILES[bits][kind]
    return tokens, {"ROWS": outputs, "COLUMNS": columns, "num_warps": warps, "num_stages": stages}


def _split(programs: int, inputs: int, columns: int) -> int:
    """Into how many parts the inputs are shared out, to be summed at the end."""
    split = 1
    while programs * split < ENOUGH and inputs >= 2 * split * LEAST and inputs % (2 * split * columns) == 0:
        split *= 2
    return split


def _arrivals(device: torch.device, size: int) -> Tensor:
    """Counters at zero, to which a kernel returns them: calls that follow each other can share them.

    Those of a stream do, and graphs that are replayed on one. A graph's counters are made before it is recorded: what
    is recorded does not run, so they would not be zero until the graph does.
    """
    size, stream = max(triton.next_power_of_2(size), 4096), 0
    graph = _zeros(device, "graph", size)
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return graph
        stream = torch.cuda.current_stream(device).cuda_stream
    return _zeros(device, stream, size)


@cache
def _zeros(device: torch.device, who: int | str, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int32, device=device)


def numbers(dtype: torch.dtype) -> tl.dtype:
    """What is multiplied. The interpreter takes products of bfloat16 for products of integers."""
    return tl.float32 if interpreted() and dtype == torch.bfloat16 else getattr(tl, str(dtype).removeprefix("torch."))


def wide(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


@triton.jit(do_not_specialize=["rows"])
def _product(
    x, order, ends, chosen, weights, first, first_scales, second, second_scales, y, sums, arrivals, rows,
    OUT: tl.constexpr, IN: tl.constexpr, EXPERTS: tl.constexpr, GATHER: tl.constexpr, ACT: tl.constexpr,
    BITS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr, TERMS: tl.constexpr, WIDE: tl.constexpr,
    NUMBERS: tl.constexpr, EARLY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of TOKENS rows that share a matrix.

    With SPLIT programs for parts of the inputs, or TERMS for rows to be added, the last one to come adds up all of it.
    """
    if EARLY:
        gdc_wait()
    expert, t, inside = _rows_of_tile(ends, chosen, rows, EXPERTS, TOKENS)
    if ends is not None:  # noqa: SIM102 (known when the kernel is compiled, unlike what follows)
        if expert >= EXPERTS:
            return
    number = t
    if order is not None:
        number = tl.load(order + t, mask=inside, other=0).to(tl.int32)
    row = t
    if GATHER:
        row = number // GATHER
    row = tl.where(inside, row, 0).to(tl.int64)
    out = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    stored = expert.to(tl.int64) * OUT + tl.minimum(out, OUT - 1)  # of the rows that are there
    parts: tl.constexpr = IN // SPLIT
    start = tl.program_id(2) * parts
    total = tl.zeros([ROWS, TOKENS], WIDE)
    up = total  # of the second matrix
    if BITS == 4:
        total, up = _dots4(
            x, row, inside, first, first_scales, second, second_scales, stored, start, total, up,
            NUMBERS, IN, parts, COLUMNS,
        )  # fmt: skip
    else:
        total, up = _dots(
            x, row, inside, first, first_scales, second, second_scales, stored, start, total, up,
            NUMBERS, IN, parts, COLUMNS,
        )  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
    if second is not None:
        total = _act(total, ACT) * up
    if weights is not None:
        total *= tl.load(weights + number, mask=inside, other=0).to(WIDE)[None, :]
    at = t.to(tl.int64)[None, :] * OUT + out[:, None]
    real = inside[None, :] & (out < OUT)[:, None]
    if SPLIT * TERMS > 1:
        part, size = tl.program_id(2), rows.to(tl.int64) * OUT
        arrivals += tl.program_id(0)
        if TERMS > 1:
            part, size = part + tl.program_id(1) * SPLIT, OUT
            at -= tl.program_id(1) * OUT
        else:
            arrivals += tl.program_id(1) * tl.num_programs(0)
        tl.store(sums + part * size + at, total, mask=real)
        tl.debug_barrier()  # every thread has written its part
        if tl.atomic_add(arrivals, 1, sem="acq_rel") < SPLIT * TERMS - 1:
            return
        total = tl.zeros([ROWS, TOKENS], WIDE)
        for i in tl.static_range(SPLIT * TERMS):
            total += tl.load(sums + i * size + at, mask=real, other=0, cache_modifier=".cg")
        tl.store(arrivals, 0)
    tl.store(y + at, total, mask=real)


@triton.jit
def _rows_of_tile(ends, chosen, rows, EXPERTS: tl.constexpr, TOKENS: tl.constexpr):
    """The matrix of this program's tile, its rows, and which of them are there. No matrix where there is no tile."""
    tile = tl.program_id(1)
    if chosen is not None:
        t = tile + tl.arange(0, TOKENS)
        expert, inside = tl.load(chosen + tile).to(tl.int32), t == tile
    elif ends is None:
        t = tile * TOKENS + tl.arange(0, TOKENS)
        expert, inside = tile * 0, t < rows
    else:
        e = tl.arange(0, triton.next_power_of_2(EXPERTS))
        end = tl.load(ends + e, mask=e < EXPERTS, other=0)
        begin = tl.load(ends + e - 1, mask=(e > 0) & (e < EXPERTS), other=0)
        tiles = (end - begin + TOKENS - 1) // TOKENS
        last = tl.cumsum(tiles, 0)
        own = (tile < last) & (tile >= last - tiles)
        expert = tl.sum(tl.where(own, e, 0), 0) + tl.where(tile < tl.sum(tiles, 0), 0, EXPERTS)
        t = tl.sum(tl.where(own, begin + (tile - last + tiles) * TOKENS, 0), 0) + tl.arange(0, TOKENS)
        inside = t < tl.sum(tl.where(own, end, 0), 0)
    return expert, t, inside


@triton.jit
def _dots(
    x, row, inside, first, first_scales, second, second_scales, stored, start, total, up,
    NUMBERS: tl.constexpr, IN: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sums over a part of the inputs, with weights of 8 or 16 bits."""
    k = tl.arange(0, COLUMNS)
    x += row[None, :] * IN + start
    first += stored[:, None] * IN + start
    if second is not None:
        second += stored[:, None] * IN + start
    for k0 in range(0, PARTS, COLUMNS):
        here = k0 + k
        if PARTS % COLUMNS == 0:
            tokens = tl.load(x + here[:, None], mask=inside[None, :], other=0)
            w = tl.load(first + here[None, :])
        else:
            tokens = tl.load(x + here[:, None], mask=inside[None, :] & (here < PARTS)[:, None], other=0)
            w = tl.load(first + here[None, :], mask=(here < PARTS)[None, :], other=0)
        total = _dot(w.to(NUMBERS), tokens.to(NUMBERS), total)
        if second is not None:
            if PARTS % COLUMNS == 0:
                w = tl.load(second + here[None, :])
            else:
                w = tl.load(second + here[None, :], mask=(here < PARTS)[None, :], other=0)
            up = _dot(w.to(NUMBERS), tokens.to(NUMBERS), up)
    if first_scales is not None:
        total *= tl.load(first_scales + stored)[:, None]
        if second is not None:
            up *= tl.load(second_scales + stored)[:, None]
    return total, up


@triton.jit
def _dots4(
    x, row, inside, first, first_scales, second, second_scales, stored, start, total, up,
    NUMBERS: tl.constexpr, IN: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The same with weights of 4 bits, block by block of 256, whose words hold one weight of each group of 64."""
    BLOCKS: tl.constexpr = (IN + COLUMNS - 1) // COLUMNS
    j = tl.arange(0, 64)
    before = start // COLUMNS
    x += row[None, :] * IN + start
    first += stored[:, None] * (64 * BLOCKS) + before * 64 + j[None, :]
    first_scales += stored * (4 * BLOCKS) + before * 4
    if second is not None:
        second += stored[:, None] * (64 * BLOCKS) + before * 64 + j[None, :]
        second_scales += stored * (4 * BLOCKS) + before * 4
    LAST: tl.constexpr = (PARTS + COLUMNS - 1) // COLUMNS - 1
    # Scales are read a block ahead: what is read for a product comes early by itself, they would be waited for.
    scale, next_scale = _four(first_scales, 0, total.dtype), _four(first_scales, 0, total.dtype)
    if second is not None:
        other, next_other = _four(second_scales, 0, total.dtype), _four(second_scales, 0, total.dtype)
    for block in range(0, LAST + 1):
        next_scale = _four(first_scales, tl.minimum(block + 1, LAST), total.dtype)
        w = _planes(tl.load(first + block * 64), NUMBERS)
        if second is not None:
            next_other = _four(second_scales, tl.minimum(block + 1, LAST), total.dtype)
            v = _planes(tl.load(second + block * 64), NUMBERS)
        for i in tl.static_range(4):
            k = block * COLUMNS + 64 * i + j
            if PARTS % COLUMNS == 0:
                tokens = tl.load(x + k[:, None], mask=inside[None, :], other=0)
            else:
                tokens = tl.load(x + k[:, None], mask=inside[None, :] & (start + k < IN)[:, None], other=0)
            total += scale[i][:, None] * _dot(w[i], tokens.to(NUMBERS), tl.zeros_like(total))
            if second is not None:
                up += other[i][:, None] * _dot(v[i], tokens.to(NUMBERS), tl.zeros_like(total))
        scale = next_scale
        if second is not None:
            other = next_other
    return total, up


@triton.jit
def _four(scales, block, dtype: tl.constexpr):
    """The scales of a block's four groups."""
    scales += block * 4
    return (
        tl.load(scales).to(dtype), tl.load(scales + 1).to(dtype),
        tl.load(scales + 2).to(dtype), tl.load(scales + 3).to(dtype),
    )  # fmt: skip


@triton.jit
def _dot(w, tokens, total):
    return tl.dot(w, tokens, total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def _planes(words, NUMBERS: tl.constexpr):
    """The four weights in each word of 16 bits, -8 .. 7."""
    if tl.bfloat16 == NUMBERS:
        a, b, c, d = _planes_asm(words)
        planes = (a - 136, b - 136, c - 136, d - 136)
    else:
        words = words.to(tl.int32)
        planes = (
            ((words & 15) - 8).to(NUMBERS), ((words >> 4 & 15) - 8).to(NUMBERS),
            ((words >> 8 & 15) - 8).to(NUMBERS), ((words >> 12 & 15) - 8).to(NUMBERS),
        )  # fmt: skip
    return planes


@triton.jit
def _planes_asm(words):
    """128 plus the unsigned number, in bfloat16: the number becomes the last bits of 128, two words at a time."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 b, c, d;
        shr.u32 b, $4, 4;
        shr.u32 c, $4, 8;
        shr.u32 d, $4, 12;
        lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 $1, b, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 $2, c, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 $3, d, 0x000F000F, 0x43004300, 0xEA;
        }""",
        "=r,=r,=r,=r,r", [words], dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def _act(x, ACT: tl.constexpr):
    if ACT == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    return x / (1 + tl.exp(-x))


@triton.jit
def _unpack(values, scales, matrix, stored, IN, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """COLUMNS weights of one output."""
    out = tl.program_id(0).to(tl.int64)
    if BITS == 8:
        k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        w = tl.load(values + out * stored + k, mask=k < IN, other=0).to(tl.float32)
        tl.store(matrix + out * IN + k, w * tl.load(scales + out), mask=k < IN)
    else:
        word = tl.program_id(1) * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
        words = tl.load(values + out * stored + word, mask=word < stored, other=0).to(tl.int32)
        for i in tl.static_range(4):
            group = word // 64 * 4 + i
            k = group * 64 + word % 64
            scale = tl.load(scales + out * (stored // 16) + group, mask=word < stored, other=0).to(tl.float32)
            tl.store(matrix + out * IN + k, ((words >> 4 * i & 15) - 8).to(tl.float32) * scale, mask=k < IN)
