"""One token's attention over a cache of fixed size, as Triton kernels: how much of it is in use is read on the GPU.

place      the token's queries, turned; its keys, turned, and values written to their slots
attend     the slots are shared out among many programs, whose softmaxes are put together at the end
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fused_linear import _dot, numbers, wide
from .fused_overlap import gdc_launch_dependents, gdc_wait, overlap
from .rungs import ceil_div

SLOTS = 64  # keys that a program reads at a time
# Bytes a number -> programs in all, their warps and how many reads are on their way at once.
TILES = {1: (528, 2, 3), 2: (264, 4, 4), 4: (264, 4, 3), 8: (264, 4, 2)}


def place(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, key_scales: Tensor | None = None,
    value_scales: Tensor | None = None, *, positions: Tensor, rates: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """q (b, h, p), turned by its position; k, turned as well, and v (b, g, p) go to slot positions_i of row i.

    keys, values (b, slots, g, p), or int8 with scales (b, slots, g); positions (b,) int64, slot and place of the token;
    rates (p / 2,) by which a position turns, or None.
    """
    batch, heads, size = q.shape
    groups, turned = k.shape[1], torch.empty_like(q)
    _place[heads + 2 * groups, batch](
        q, k, v, turned, keys, values, key_scales, value_scales, positions, rates, keys.shape[1], heads, groups,
        SIZE=size, HALF=triton.next_power_of_2(ceil_div(size, 2)), num_warps=1, **overlap(q.device),
    )  # fmt: skip
    return turned


def attend(
    q: Tensor, keys: Tensor, values: Tensor, key_scales: Tensor | None = None, value_scales: Tensor | None = None, *,
    ends: Tensor, window: int | None = None,
) -> Tensor:  # fmt: skip
    """Softmax attention of one token to the slots before ends_i, of which there is one at least.

    q (b, h, p), keys and values (b, slots, g, p), or int8 with scales (b, slots, g), ends (b,) int64 -> (b, h, p).
    `window`: to the last so many alone.
    """
    batch, heads, size = q.shape
    slots, groups = keys.shape[1:3]
    shared = heads // groups
    programs, warps, stages = TILES[keys.element_size()]
    splits = max(1, min(ceil_div(programs, batch * groups), ceil_div(slots, 4 * SLOTS)))
    wide_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    sums = q.new_empty(batch, heads, splits, size, dtype=wide_dtype)
    scales = q.new_empty(2, batch, heads, splits, dtype=wide_dtype)
    y, padded = torch.empty_like(q), max(16, triton.next_power_of_2(size))
    packed = key_scales is not None
    if packed:  # two numbers a word
        keys, values = keys.view(torch.int16), values.view(torch.int16)
    _attend[splits, groups, batch](
        q.contiguous(), keys, values, key_scales, value_scales, ends, sums, scales, window or slots + 1, size**-0.5,
        slots, batch, GROUPS=groups, SHARED=shared,
        HEADS=max(16, triton.next_power_of_2(shared)), SIZE=size // 2 if packed else size,
        PADDED=max(16, padded // 2) if packed else padded, SLOTS=SLOTS, NUMBERS=numbers(q.dtype), WIDE=wide(q),
        num_warps=warps, num_stages=stages, **overlap(q.device),
    )  # fmt: skip
    _merge[heads, batch](
        sums, scales, y, splits, batch, heads, SIZE=size, PADDED=padded, SPLITS=triton.next_power_of_2(splits),
        num_warps=4, **overlap(q.device),
    )  # fmt: skip
    return y


@triton.jit
def _place(
    q, k, v, turned, keys, values, key_scales, value_scales, positions, rates, slots, heads, groups,
    SIZE: tl.constexpr, HALF: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One head of queries, keys or values."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    head, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, HALF)
    real = i < (SIZE + 1) // 2
    position = tl.load(positions + b)
    second = (SIZE + 1) // 2 + i
    also = real & (second < SIZE)
    if head < heads:
        source = q + (b * heads + head) * SIZE
    elif head < heads + groups:
        source = k + (b * groups + head - heads) * SIZE
    else:
        source = v + (b * groups + head - heads - groups) * SIZE
    x, y = tl.load(source + i, mask=real, other=0), tl.load(source + second, mask=also, other=0)
    if rates is not None:  # noqa: SIM102 (known when the kernel is compiled, unlike what follows)
        if head < heads + groups:
            rate = tl.load(rates + i, mask=real, other=0)
            angle = position.to(rate.dtype) * rate
            cos, sin = tl.cos(angle), tl.sin(angle)
            u, w = x.to(rate.dtype), y.to(rate.dtype)
            x, y = (u * cos - w * sin).to(x.dtype), (w * cos + u * sin).to(y.dtype)
    if head < heads:
        target = turned + (b * heads + head) * SIZE
        tl.store(target + i, x, mask=real)
        tl.store(target + second, y, mask=also)
    else:
        slot = (b * slots + position) * groups
        if head < heads + groups:
            _keep(keys, key_scales, slot + head - heads, x, y, i, second, real, also, SIZE)
        else:
            _keep(values, value_scales, slot + head - heads - groups, x, y, i, second, real, also, SIZE)


@triton.jit
def _keep(cached, scales, number, x, y, i, second, real, also, SIZE: tl.constexpr):
    """Two halves of a head, as they are or as `cache.PackedKeyValues` packs them."""
    if scales is not None:
        scale = tl.maximum(tl.max(tl.abs(x.to(tl.float32)), 0), tl.max(tl.abs(y.to(tl.float32)), 0)) / 127
        tl.store(scales + number, scale)
        x, y = _eighth(x, scale), _eighth(y, scale)
    tl.store(cached + number * SIZE + i, x, mask=real)
    tl.store(cached + number * SIZE + second, y, mask=also)


@triton.jit
def _eighth(x, scale):
    """To 8 bits, the nearest, ties to even: adding 1.5 * 2^23 leaves no bits behind the point."""
    return (x.to(tl.float32) / tl.maximum(scale, 1e-30) + 12582912.0 - 12582912.0).to(tl.int8)


@triton.jit(do_not_specialize=["batch", "window"])
def _attend(
    q, keys, values, key_scales, value_scales, ends, sums, scales, window, scale: tl.constexpr, slots, batch,
    GROUPS: tl.constexpr, SHARED: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
    SLOTS: tl.constexpr, NUMBERS: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The queries that share a head of keys, over this program's part of the slots in use.

    Where two numbers of 8 bits share a word, SIZE counts words, and even and odd numbers are multiplied apart.
    """
    if EARLY:
        gdc_wait()
    split, splits = tl.program_id(0), tl.num_programs(0)
    group, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    n, p, s = tl.arange(0, HEADS), tl.arange(0, PADDED), tl.arange(0, SLOTS)
    head = b * GROUPS * SHARED + group * SHARED + n
    real_heads = (n < SHARED)[:, None] & (p < SIZE)[None, :]
    if key_scales is None:
        queries = tl.load(q + head[:, None] * SIZE + p[None, :], mask=real_heads, other=0).to(NUMBERS)
    else:
        q += head[:, None] * (2 * SIZE) + 2 * p[None, :]
        even = tl.load(q, mask=real_heads, other=0).to(WIDE)
        odd = tl.load(q + 1, mask=real_heads, other=0).to(WIDE)
        even, odd, largest = _within_one(even, odd)
        even, odd = _half(even, NUMBERS), _half(odd, NUMBERS)
    end = tl.load(ends + b)
    first = tl.maximum(end - window, 0)
    part = tl.cdiv(tl.cdiv(end - first, splits), SLOTS) * SLOTS
    begin = first + split * part
    stop = tl.minimum(begin + part, end)
    highest = tl.full([HEADS], -float("inf"), WIDE)
    total, y = tl.zeros([HEADS], WIDE), tl.zeros([HEADS, PADDED], WIDE)
    y_odd = y
    for slot in range(begin, stop, SLOTS):
        here = (slot + s).to(tl.int64)
        real = (here < stop)[:, None] & (p < SIZE)[None, :]
        number = (b * slots + here) * GROUPS + group
        k = tl.load(keys + number[:, None] * SIZE + p[None, :], mask=real, other=0)
        v = tl.load(values + number[:, None] * SIZE + p[None, :], mask=real, other=0)
        if key_scales is None:
            scores = _dot(queries, tl.trans(k.to(NUMBERS)), tl.zeros([HEADS, SLOTS], WIDE)) * scale
        else:
            k_even, k_odd = _bytes(tl.trans(k), NUMBERS)
            scores = _dot(odd, k_odd, _dot(even, k_even, tl.zeros([HEADS, SLOTS], WIDE)))
            scores *= tl.load(key_scales + number, mask=here < stop, other=0)[None, :] * (largest * scale)
        scores = tl.where((here < stop)[None, :], scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        highest = higher
        if value_scales is None:
            y = _dot(weights.to(NUMBERS), v.to(NUMBERS), y * shrink[:, None])
        else:
            v_even, v_odd = _bytes(v, NUMBERS)
            v_scales = tl.load(value_scales + number, mask=here < stop, other=0)
            top = tl.maximum(tl.max(v_scales, 0), 1e-30)
            weights = _half(weights * (v_scales / top)[None, :], NUMBERS)
            y = y * shrink[:, None] + _dot(weights, v_even, tl.zeros_like(y)) * top
            y_odd = y_odd * shrink[:, None] + _dot(weights, v_odd, tl.zeros_like(y)) * top
    if EARLY:
        gdc_launch_dependents()
    number = head * splits + split
    if value_scales is None:
        tl.store(sums + number[:, None] * SIZE + p[None, :], y, mask=real_heads)
    else:
        sums += number[:, None] * (2 * SIZE) + 2 * p[None, :]
        tl.store(sums, y, mask=real_heads)
        tl.store(sums + 1, y_odd, mask=real_heads)
    tl.store(scales + number, highest, mask=n < SHARED)
    tl.store(scales + batch * GROUPS * SHARED * splits + number, total, mask=n < SHARED)


@triton.jit
def _within_one(even, odd):
    """Both divided by the largest number in them, and that number."""
    largest = tl.maximum(tl.max(tl.max(tl.abs(even), 1), 0), tl.max(tl.max(tl.abs(odd), 1), 0))
    largest = tl.maximum(largest, 1e-30)
    return even / largest, odd / largest, largest


@triton.jit
def _half(x, NUMBERS: tl.constexpr):
    """float16 in place of bfloat16: numbers of 8 bits fit in both, and in float16 they cost less to unpack."""
    if tl.bfloat16 == NUMBERS:
        return x.to(tl.float16)
    else:
        return x.to(NUMBERS)


@triton.jit
def _bytes(words, NUMBERS: tl.constexpr):
    """The two numbers -128 .. 127 in each word of 16 bits."""
    if tl.bfloat16 == NUMBERS:
        low, high = _bytes_asm(words)
        low, high = low - 1152, high - 1152
    else:
        low, high = ((words << 8) >> 8).to(NUMBERS), (words >> 8).to(NUMBERS)
    return low, high


@triton.jit
def _bytes_asm(words):
    """1,152 plus the number, in float16: 128 more than it becomes the last bits of 1,024, two words at a time."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 b;
        shr.u32 b, $2, 8;
        lop3.b32 $0, $2, 0x00FF00FF, 0x64806480, 0x6A;
        lop3.b32 $1, b, 0x00FF00FF, 0x64806480, 0x6A;
        }""",
        "=r,=r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch"])
def _merge(
    sums, scales, y, splits, batch, heads,
    SIZE: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One head's result out of those of all parts."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    number = tl.program_id(1).to(tl.int64) * heads + tl.program_id(0)
    i, p = tl.arange(0, SPLITS), tl.arange(0, PADDED)
    highest = tl.load(scales + number * splits + i, mask=i < splits, other=-float("inf"))
    weight = tl.exp(highest - tl.max(highest, 0))
    total = tl.load(scales + (batch * heads + number) * splits + i, mask=i < splits, other=0)
    real = (i < splits)[:, None] & (p < SIZE)[None, :]
    parts = tl.load(sums + (number * splits + i)[:, None] * SIZE + p[None, :], mask=real, other=0)
    result = tl.sum(parts * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(y + number * SIZE + p, result, mask=p < SIZE)
