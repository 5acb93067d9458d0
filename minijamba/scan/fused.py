"""The selective scan as Triton kernels, which keep the states in registers.

The recurrence is per channel and per state, so a program takes a block of channels with all their states, keeps the
states in registers and walks along time. On its way it meets two kinds of work:

    per token and channel:          softplus, the gate, loads and stores, done for a tile (c, T) of T steps at once;
    per token, channel and state:   state = exp2(delta A) state + (delta x) B, then y = sum_n C state, step by step.

`_rows` takes a tile apart into steps and `_tile` puts steps together again: both only move data between threads. B and
C are loaded as tiles, too, and all tiles well before their use: memory is hundreds of clocks away.

Sums cross threads, which costs more than the arithmetic if it is done for every step. So a thread adds up what it
holds, and the parts of a whole tile are exchanged at once (`_over_states`, `_over_channels`): again `_rows`.

Backward needs the states again. The forward pass keeps one in CHUNK steps for it, and the gradient kernel, walking from
the last chunk to the first, computes the ones between. What it carries backwards in time is the adjoint, the gradient
of the loss with respect to the state; it obeys the same recurrence with time reversed:

    adjoint_{t-1} = exp2(delta_t A) (adjoint_t + dy_t C_t)

Where channels are too few to fill a GPU, time is split: every part first runs from zero, then all run again, each from
the ends of those before. That costs the exponentials twice.

Gradients of B and C are sums over all channels, of which a program has few: what each has, its piece, waits in memory
to be added up. So that pieces do not fill it, the parts are walked back a window of time after the other.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..rungs import ceil_div
from .naive import state_dtype
from .parallel import refuse_to_differentiate_twice
from .parallel import starts as document_starts

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x LOG2E), and exp2 is what the hardware has
FORGET = tl.constexpr("evict_first")  # what the kernels do not read again leaves the cache first
ENDLESS = tl.constexpr(1e30)  # a step so long that every state decays to zero, as A < 0: a new document starts


# What kernels are made of.


@triton.jit
def _softplus(v):
    """log(1 + exp(v)) = max(v, 0) + log(1 + e), e = exp(-|v|). For small e the logarithm of the special-function unit
    has lost what matters, so float32 takes a polynomial: right to 2e-7 of its value for 0 <= e <= 1."""
    e = tl.exp2(tl.abs(v) * -LOG2E)
    if e.dtype == tl.float64:
        log1p = tl.where(e < 1e-5, e - 0.5 * e * e, tl.log(1 + e))
    else:
        log1p = -0.029505213 + e * 0.005232688
        log1p = -0.136632423 + e * (0.07822591 + e * log1p)
        log1p = -0.248429818 + e * (0.191060051 + e * log1p)
        log1p = -0.499994931 + e * (0.333190968 + e * log1p)
        log1p = e * (0.99999997 + e * log1p)
    return tl.maximum(v, 0) + log1p


@triton.jit
def _sigmoid(v):
    """1 / (1 + exp(-v)); in float32 by a reciprocal square root: two instructions, where a division takes five."""
    inverse = 1 + tl.exp2(v * -LOG2E)
    if v.dtype == tl.float64:
        sigmoid = 1 / inverse
    else:
        root = tl.rsqrt(inverse)
        sigmoid = root * root
    return sigmoid


@triton.jit
def _at(x, x_b, x_t, x_c, b, start, c, t):
    """Where the steps start + t of channels c stand in memory: pointers (c, T). Numbers pass 2^31: b, start int64."""
    return x + b * x_b + start * x_t + c.to(tl.int64)[:, None] * x_c + t[None, :] * x_t


@triton.jit
def _rows(tile, T: tl.constexpr):
    """A tile (c, k, T) as T rows (c, k), one a step."""
    C: tl.constexpr = tile.shape[0]
    K: tl.constexpr = tile.shape[1]
    if T == 1:
        rows = (tl.reshape(tile, (C, K)),)
    else:
        even, odd = tl.split(tl.reshape(tile, (C, K, T // 2, 2)))
        even = _rows(even, T // 2)
        odd = _rows(odd, T // 2)
        rows = ()
        for i in tl.static_range(T // 2):
            rows = rows + (even[i], odd[i])
    return rows


@triton.jit
def _tile(rows, T: tl.constexpr, first: tl.constexpr = 0, step: tl.constexpr = 1):
    """The inverse: T rows (...) as a tile (..., T)."""
    if T == 2:
        tile = tl.join(rows[first], rows[first + step])
    else:
        even = _tile(rows, T // 2, first, 2 * step)
        odd = _tile(rows, T // 2, first + step, 2 * step)
        tile = tl.reshape(tl.join(even, odd), rows[first].shape + (T,))
    return tile


@triton.jit
def _sum(tensors, first: tl.constexpr = 0, step: tl.constexpr = 1):
    """The sum of tensors, of every step-th from `first` on, as a tree: in a chain each addition waits for another."""
    if first + step >= len(tensors):
        total = tensors[first]
    else:
        total = _sum(tensors, first, 2 * step) + _sum(tensors, first + step, 2 * step)
    return total


@triton.jit
def _over_channels(rows, T: tl.constexpr):
    """Sums over the channels of T tensors (n, c): (n, T). A thread adds its two channels, then sums are exchanged."""
    N: tl.constexpr = rows[0].shape[0]
    BLOCK: tl.constexpr = rows[0].shape[1]
    parts = tl.sum(tl.reshape(_tile(rows, T), (N, 2, BLOCK // 2, T)), 1)
    return _sum(_rows(tl.permute(parts, (0, 2, 1)), BLOCK // 2))


@triton.jit
def _over_states(rows, T: tl.constexpr, LANES: tl.constexpr):
    """Sums over the states of T tensors (n, c): (c, T), likewise."""
    N: tl.constexpr = rows[0].shape[0]
    BLOCK: tl.constexpr = rows[0].shape[1]
    parts = ()
    for i in tl.static_range(T):
        parts = parts + (tl.sum(tl.reshape(rows[i], (LANES, N // LANES, BLOCK)), 1),)
    return _sum(_rows(tl.permute(_tile(parts, T), (1, 2, 0)), LANES))


@triton.jit
def _fetch(BC, N: tl.constexpr):
    """A tile of B and C as they are stored, for the pointers of B (..., T)."""
    return (tl.load(BC),) if BC.dtype.element_ty == tl.int32 else (tl.load(BC), tl.load(BC + N))


@triton.jit
def _by_step(tiles, T: tl.constexpr):
    """What was fetched, (c, k, T), as T rows (c, k), a step each: of B and of C, or twice of their words."""
    B = _rows(tiles[0], T)
    C = _rows(tiles[len(tiles) - 1], T)
    rows = ()
    for i in tl.static_range(T):
        rows = rows + ((B[i], C[i]),)
    return rows


@triton.jit
def _pair(row):
    """B_t and C_t of such a row. The halves of a word are bfloat16, and those are the upper halves of float32."""
    B, C = row
    if B.dtype == tl.int32:
        B, C = (B << 16).to(tl.float32, bitcast=True), (C & -65536).to(tl.float32, bitcast=True)
    return B, C


@triton.jit
def _length(v, bias, inside, SOFTPLUS: tl.constexpr):
    """The length of a step, (c, T); nothing happens in a step of length zero, such as those behind the end."""
    if bias is not None:
        v += bias[:, None]
    if SOFTPLUS:
        v = _softplus(v)
    return tl.where(inside, v, 0)


@triton.jit
def _read(
    x, delta, BC, x_t, delta_t, first, count, channel, t, ROW: tl.constexpr, N: tl.constexpr, AT_ONCE: tl.constexpr
):
    """AT_ONCE tiles of a chunk with `count` steps, the first at step `first`: each is x, delta, and B with C."""
    tiles = ()
    for i in tl.static_range(AT_ONCE):
        at = first + i * t.shape[0]
        inside = channel[:, None] & (at + t < count)[None, :]
        x_ = tl.load(x + at * x_t, mask=inside, other=0)
        delta_ = tl.load(delta + at * delta_t, mask=inside, other=0)
        tiles = tiles + ((x_, delta_, _fetch(BC + (tl.where(at < count, at, 0) + t) * ROW, N)),)
    return tiles


@triton.jit
def _halves(tile):
    """(r, 2k) as two tiles (r, k)."""
    R: tl.constexpr = tile.shape[0]
    K: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (R, 2, K)), (0, 2, 1)))


# The kernels.


@triton.jit
def _forward_kernel(
    x, delta, A, BC, D, z, bias, resets, state, ends, spans, y, saved, final,
    steps, split, channels,
    x_b, x_t, x_c, delta_b, delta_t, delta_c, z_b, z_t, z_c, y_b, y_t, y_c, BC_b,
    SOFTPLUS: tl.constexpr, N: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Run a part of time from where the one before ends: outputs y, the states at the starts of chunks (saved) and
    the last state. Without y, run it from zero: outputs the state at its end and its span, from which later parts find
    their starts."""
    wide = final.dtype.element_ty
    ROW: tl.constexpr = N if BC.dtype.element_ty == tl.int32 else 2 * N
    K: tl.constexpr = N // W
    k, w, t = tl.arange(0, K), tl.arange(0, W), tl.arange(0, T)
    n = k[:, None] + K * w[None, :]
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part, parts = tl.program_id(1), tl.num_programs(1)
    b = tl.program_id(2).to(tl.int64)
    first = part * split
    last = tl.minimum(first + split, steps)
    channel = c < channels
    real = channel[None, :, None]
    of_state = n[:, None, :] + c[None, :, None] * N
    size = channels * N

    A_ = tl.load(A + of_state, mask=real, other=-1).to(wide) * LOG2E
    h = tl.zeros((K, BLOCK, W), wide)
    if y is not None:
        if state is not None:
            h += tl.load(state + b * size + of_state, mask=real, other=0)
        if ends is not None:
            for earlier in range(part):
                place = b * (parts - 1) + earlier
                decay = tl.exp2(tl.load(spans + place * channels + c, mask=channel, other=0)[None, :, None] * A_)
                h = decay * h + tl.load(ends + place * size + of_state, mask=real, other=0)
    bias_ = None if bias is None else tl.load(bias + c, mask=channel, other=0).to(wide)
    D_ = None if D is None else tl.load(D + c, mask=channel, other=0).to(wide)
    span = tl.zeros((BLOCK, T), wide)

    begin = first.to(tl.int64)
    if saved is not None:
        saved += (b * tl.cdiv(steps, CHUNK) + begin // CHUNK) * size + of_state
    x = _at(x, x_b, x_t, x_c, b, begin, c, t)
    delta = _at(delta, delta_b, delta_t, delta_c, b, begin, c, t)
    BC += b * BC_b + begin * ROW + n[:, :, None] + t * ROW
    if y is not None:
        y = _at(y, y_b, y_t, y_c, b, begin, c, t)
    if z is not None:
        z = _at(z, z_b, z_t, z_c, b, begin, c, t)

    inside = channel[:, None] & (first + t < last)[None, :]
    x_next = tl.load(x, mask=inside, other=0)
    delta_next = tl.load(delta, mask=inside, other=0)
    BC_next = _fetch(BC, N)
    if z is not None:
        z_next = tl.load(z, mask=inside, other=0)
    for start in range(first, last, T):
        if saved is not None:  # a mask, not a branch: the compiler orders instructions within one piece of code
            tl.store(saved, h, mask=real & (start % CHUNK == 0))
            saved += tl.where(start % CHUNK == 0, size, 0)
        # The next tile is on its way while this one is worked on.
        x_, delta_, rows, now = x_next.to(wide), delta_next.to(wide), _by_step(BC_next, T), inside
        inside = channel[:, None] & (start + T + t < last)[None, :]
        BC += tl.where(start + T < last, T * ROW, 0)
        BC_next = _fetch(BC, N)
        if z is not None:
            z_ = z_next.to(wide)
            z += T * z_t
            z_next = tl.load(z, mask=inside, other=0)
        x += T * x_t
        x_next = tl.load(x, mask=inside, other=0)
        delta += T * delta_t
        delta_next = tl.load(delta, mask=inside, other=0)

        if z is not None:
            gate = z_ * _sigmoid(z_)  # early: at the end, the store would wait for it
        delta_ = _length(delta_, bias_, now, SOFTPLUS)
        u = delta_ * x_
        if resets is not None:
            reset = tl.load(resets + b * steps + start + t, mask=start + t < last, other=0)
            delta_ = tl.where(reset[None, :] != 0, ENDLESS, delta_)
        if y is None:
            span += delta_
        steps_ = _rows(tl.permute(tl.join(delta_, u), (0, 2, 1)), T)
        y_rows = ()
        for i in tl.static_range(T):
            delta_i, u_i = tl.split(steps_[i])
            B_i, C_i = _pair(rows[i])
            h = tl.exp2(delta_i[None, :, None] * A_) * h + u_i[None, :, None] * B_i[:, None, :]
            if y is not None:
                y_rows = y_rows + (tl.sum(h * C_i[:, None, :], 0),)
        if y is not None:
            y_ = _sum(_rows(tl.permute(_tile(y_rows, T), (0, 2, 1)), W))
            if D is not None:
                y_ += D_[:, None] * x_
            if z is not None:
                y_ *= gate
            tl.store(y, y_, mask=now)
            y += T * y_t
    if y is None:
        tl.store(ends + (b * parts + part) * size + of_state, h, mask=real)
        tl.store(spans + (b * parts + part) * channels + c, tl.sum(span, 1), mask=channel)
    elif part == parts - 1:
        tl.store(final + b * size + of_state, h, mask=real)


@triton.jit
def _adjoint_kernel(
    delta, A, BC, z, bias, resets, dy, ends, spans,
    steps, split, reach, channels,
    delta_b, delta_t, delta_c, z_b, z_t, z_c, dy_b, dy_t, dy_c, BC_b,
    SOFTPLUS: tl.constexpr, N: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Run a stretch of a part of time backwards from an adjoint of zero: outputs the adjoint before its first step,
    and its span. The first part is left out, since nothing starts where it ends. A short part has empty stretches."""
    wide = ends.dtype.element_ty
    ROW: tl.constexpr = N if BC.dtype.element_ty == tl.int32 else 2 * N
    K: tl.constexpr = N // W
    k, w, t = tl.arange(0, K), tl.arange(0, W), tl.arange(0, T)
    n = k[:, None] + K * w[None, :]
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(2).to(tl.int64)
    place = b * tl.num_programs(1) + tl.program_id(1)
    stretches = tl.cdiv(split, reach)
    part, stretch = 1 + tl.program_id(1) // stretches, tl.program_id(1) % stretches
    first = tl.minimum(part * split + stretch * reach, steps)
    last = tl.minimum(tl.minimum(first + reach, part * split + split), steps)
    channel = c < channels
    real = channel[None, :, None]
    of_state = n[:, None, :] + c[None, :, None] * N
    size = channels * N

    A_ = tl.load(A + of_state, mask=real, other=-1).to(wide) * LOG2E
    g = tl.zeros((K, BLOCK, W), wide)
    bias_ = None if bias is None else tl.load(bias + c, mask=channel, other=0).to(wide)
    span = tl.zeros((BLOCK, T), wide)

    latest = first + (tl.cdiv(last - first, T) - 1) * T
    at = latest.to(tl.int64)
    delta = _at(delta, delta_b, delta_t, delta_c, b, at, c, t)
    dy = _at(dy, dy_b, dy_t, dy_c, b, at, c, t)
    BC += b * BC_b + at * ROW + n[:, :, None] + t * ROW
    if z is not None:
        z = _at(z, z_b, z_t, z_c, b, at, c, t)

    inside = channel[:, None] & (latest + t < last)[None, :]
    delta_next = tl.load(delta, mask=inside, other=0)
    dy_next = tl.load(dy, mask=inside, other=0)
    BC_next = _fetch(BC, N)
    if z is not None:
        z_next = tl.load(z, mask=inside, other=0)
    for back in range(0, last - first, T):
        start = latest - back
        delta_, dy_, rows, now = delta_next.to(wide), dy_next.to(wide), _by_step(BC_next, T), inside
        inside = channel[:, None] & (start - T + t >= first)[None, :]
        BC -= tl.where(start > first, T * ROW, 0)
        BC_next = _fetch(BC, N)
        delta -= T * delta_t
        dy -= T * dy_t
        delta_next = tl.load(delta, mask=inside, other=0)
        dy_next = tl.load(dy, mask=inside, other=0)
        if z is not None:
            z_ = z_next.to(wide)
            z -= T * z_t
            z_next = tl.load(z, mask=inside, other=0)
            dy_ *= z_ * _sigmoid(z_)
        delta_ = _length(delta_, bias_, now, SOFTPLUS)
        if resets is not None:
            reset = tl.load(resets + b * steps + start + t, mask=start + t < last, other=0)
            delta_ = tl.where(reset[None, :] != 0, ENDLESS, delta_)
        span += delta_
        steps_ = _rows(tl.permute(tl.join(delta_, dy_), (0, 2, 1)), T)
        for i in tl.static_range(T - 1, -1, -1):
            delta_i, dy_i = tl.split(steps_[i])
            _, C_i = _pair(rows[i])
            g = tl.exp2(delta_i[None, :, None] * A_) * (g + dy_i[None, :, None] * C_i[:, None, :])
    tl.store(ends + place * size + of_state, g, mask=real)
    tl.store(spans + place * channels + c, tl.sum(span, 1), mask=channel)


@triton.jit(do_not_specialize=["begin", "fresh"])
def _gradient_kernel(
    x, delta, A, BC, D, z, bias, resets, saved, dlast, ends, spans, dy,
    dx, ddelta, dz, dA, sums, pieces, adjoint, scratch,
    steps, split, window, begin, fresh, reach, channels,
    x_b, x_t, x_c, delta_b, delta_t, delta_c, z_b, z_t, z_c, dy_b, dy_t, dy_c,
    dx_b, dx_t, dx_c, ddelta_b, ddelta_t, ddelta_c, dz_b, dz_t, dz_c, BC_b,
    SOFTPLUS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr, CHUNK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Walk a window of a part of time from its last chunk to its first, given the states before chunks: outputs all
    gradients. The adjoint and the sums over time wait in memory for the window before. A fresh walk finds its adjoint
    from the ends of the later parts."""
    wide = saved.dtype.element_ty
    LANES: tl.constexpr = N // 4 if N > 4 else 1
    ROW: tl.constexpr = N if BC.dtype.element_ty == tl.int32 else 2 * N
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part, parts = tl.program_id(1), tl.num_programs(1)
    b = tl.program_id(2).to(tl.int64)
    n, t = tl.arange(0, N), tl.arange(0, T)
    first = part * split + begin
    last = tl.minimum(tl.minimum(first + window, part * split + split), steps)
    channel = c < channels
    real = channel[None, :]
    of_state = n[:, None] + c[None, :] * N
    size = channels * N
    place = b * parts + part

    A_ = tl.load(A + of_state, mask=real, other=-1).to(wide) * LOG2E
    bias_ = None if bias is None else tl.load(bias + c, mask=channel, other=0).to(wide)
    D_ = None if D is None else tl.load(D + c, mask=channel, other=0).to(wide)
    adjoint += place * size + of_state
    dA += place * size + of_state
    dD = sums + place * (2 * channels) + c
    dbias = dD + channels
    if fresh != 0:
        g = tl.zeros((N, BLOCK), wide)
        if dlast is not None:
            g += tl.load(dlast + b * size + of_state, mask=real, other=0)
        if ends is not None:
            stretches = tl.cdiv(split, reach)
            for later in range((parts - 1) * stretches - 1, part * stretches - 1, -1):
                behind = b * ((parts - 1) * stretches) + later
                decay = tl.exp2(tl.load(spans + behind * channels + c, mask=channel, other=0)[None, :] * A_)
                g = decay * g + tl.load(ends + behind * size + of_state, mask=real, other=0)
    else:
        g = tl.load(adjoint, mask=real, other=0)
    dA_ = tl.zeros((N, BLOCK), wide)
    sum_D = tl.zeros((BLOCK, T), wide)
    sum_bias = tl.zeros((BLOCK, T), wide)

    BC += b * BC_b + n[:, None, None]
    width = tl.num_programs(0) * (2 * N)
    pieces += place * window * width + tl.program_id(0) * (2 * N) + n[:, None] + t[None, :] * width
    scratch += (place * tl.num_programs(0) + tl.program_id(0)) * (CHUNK // T * N * BLOCK)
    scratch += n[:, None] + tl.arange(0, BLOCK)[None, :] * N

    chunks = tl.cdiv(tl.maximum(last - first, 0), CHUNK)
    for back in range(chunks):
        chunk = first // CHUNK + chunks - 1 - back
        start = (chunk * CHUNK).to(tl.int64)
        count = tl.minimum(CHUNK, last - chunk * CHUNK)
        BC_at = BC + start * ROW
        x_at = _at(x, x_b, x_t, x_c, b, start, c, t)
        delta_at = _at(delta, delta_b, delta_t, delta_c, b, start, c, t)
        dy_at = _at(dy, dy_b, dy_t, dy_c, b, start, c, t)
        dx_at = _at(dx, dx_b, dx_t, dx_c, b, start, c, t)
        ddelta_at = _at(ddelta, ddelta_b, ddelta_t, ddelta_c, b, start, c, t)
        if z is not None:
            z_at = _at(z, z_b, z_t, z_c, b, start, c, t)
            dz_at = _at(dz, dz_b, dz_t, dz_c, b, start, c, t)

        # The last tile's dy and z are not in the cache; its x and delta will be, after the way forwards.
        tiles = tl.cdiv(count, T)
        at = (tiles - 1) * T
        inside = channel[:, None] & (at + t < count)[None, :]
        dy_next = tl.load(dy_at + at * dy_t, mask=inside, other=0, eviction_policy=FORGET)
        if z is not None:
            z_next = tl.load(z_at + at * z_t, mask=inside, other=0, eviction_policy=FORGET)

        # Forwards, for the states at the starts of the chunk's tiles. A tile is done before the loads of the next one
        # could arrive, so those of several go out together, while several others are worked on.
        h = tl.load(saved + (b * tl.cdiv(steps, CHUNK) + chunk) * size + of_state, mask=real, other=0)
        ahead = _read(x_at, delta_at, BC_at, x_t, delta_t, 0, count, channel, t, ROW, N, AT_ONCE)
        for begun in range(0, count, AT_ONCE * T):
            several = ahead
            later = begun + AT_ONCE * T
            ahead = _read(x_at, delta_at, BC_at, x_t, delta_t, later, count, channel, t, ROW, N, AT_ONCE)
            for i in tl.static_range(AT_ONCE):
                here = begun + i * T
                x_, v, BC_ = several[i]
                rows = _by_step(BC_, T)
                delta_ = _length(v.to(wide), bias_, channel[:, None] & (here + t < count)[None, :], SOFTPLUS)
                u = delta_ * x_.to(wide)
                if resets is not None:
                    reset = tl.load(resets + b * steps + start + here + t, mask=here + t < count, other=0)
                    delta_ = tl.where(reset[None, :] != 0, ENDLESS, delta_)
                steps_ = _rows(tl.permute(tl.join(delta_, u), (0, 2, 1)), T)
                tl.store(scratch + here // T * (N * BLOCK), h)
                for k in tl.static_range(T):
                    delta_k, u_k = tl.split(steps_[k])
                    B_k, _ = _pair(rows[k])
                    h = tl.exp2(delta_k[None, :] * A_) * h + u_k[None, :] * B_k
        tl.debug_barrier()

        # Backwards, tile by tile.
        pieces_at = pieces + (start - first) * width
        dD_ = tl.zeros((BLOCK, T), wide)
        dbias_ = tl.zeros((BLOCK, T), wide)
        x_next = tl.load(x_at + at * x_t, mask=inside, other=0, eviction_policy=FORGET)
        delta_next = tl.load(delta_at + at * delta_t, mask=inside, other=0, eviction_policy=FORGET)
        BC_next = _fetch(BC_at + (at + t) * ROW, N)
        h_next = tl.load(scratch + (tiles - 1) * (N * BLOCK))
        for _ in range(tiles):
            h = h_next
            x_, v, dy_, rows = x_next.to(wide), delta_next.to(wide), dy_next.to(wide), _by_step(BC_next, T)
            if z is not None:
                z_ = z_next.to(wide)
            here, now = at, inside
            at = tl.maximum(at - T, 0)
            inside = channel[:, None] & (at + t < count)[None, :]
            # These loads and h_next's, seven instructions, share one of the six counters of loads under way that a warp
            # has. An eighth gets the counter of an exchange between threads, which then waits for memory.
            dy_next = tl.load(dy_at + at * dy_t, mask=inside, other=0, eviction_policy=FORGET)
            BC_next = _fetch(BC_at + (at + t) * ROW, N)
            x_next = tl.load(x_at + at * x_t, mask=inside, other=0, eviction_policy=FORGET)
            delta_next = tl.load(delta_at + at * delta_t, mask=inside, other=0, eviction_policy=FORGET)
            delta_ = _length(v, bias_, now, SOFTPLUS)
            if z is not None:
                z_next = tl.load(z_at + at * z_t, mask=inside, other=0, eviction_policy=FORGET)
                gate = _sigmoid(z_)
                dout = dy_
                dy_ = dout * z_ * gate
            length = delta_
            if resets is not None:
                reset = tl.load(resets + b * steps + start + here + t, mask=here + t < count, other=0)
                length = tl.where(reset[None, :] != 0, ENDLESS, delta_)
            u_rows = _rows(tl.permute(tl.join(length, delta_ * x_), (0, 2, 1)), T)
            dy_rows = _rows(tl.expand_dims(dy_, 1), T)
            decays, before, y_rows, dC_rows = (), (), (), ()
            for i in tl.static_range(T):
                length_i, u_i = tl.split(u_rows[i])
                B_i, C_i = _pair(rows[i])
                decay = tl.exp2(length_i[None, :] * A_)
                decays = decays + (decay,)
                before = before + (h,)
                h = decay * h + u_i[None, :] * B_i
                if z is not None:
                    y_rows = y_rows + (h * C_i,)
                dC_rows = dC_rows + (h * tl.reshape(dy_rows[i], (1, BLOCK)),)
            du_rows, dlength_rows, dB_rows = (), (), ()
            for i in tl.static_range(T - 1, -1, -1):
                length_i, u_i = tl.split(u_rows[i])
                B_i, C_i = _pair(rows[i])
                g += tl.reshape(dy_rows[i], (1, BLOCK)) * C_i
                du_rows = (g * B_i,) + du_rows
                dB_rows = (g * u_i[None, :],) + dB_rows
                g *= decays[i]
                dexponent = g * before[i]
                dlength_rows = (dexponent * A_,) + dlength_rows
                dA_ += dexponent * length_i[None, :]
            if z is not None:
                y_ = _over_states(y_rows, T, LANES)
            du, dlength = _halves(_over_states(du_rows + dlength_rows, 2 * T, LANES))
            h_next = tl.load(scratch + at // T * (N * BLOCK))
            tl.store(pieces_at + here * width, _over_channels(dB_rows, T))
            tl.store(pieces_at + here * width + N, _over_channels(dC_rows, T))
            dx_ = du * delta_
            ddelta_ = du * x_ + dlength / LOG2E
            if SOFTPLUS:
                if bias is not None:
                    v += bias_[:, None]
                ddelta_ *= _sigmoid(v)
            if D is not None:
                dx_ += dy_ * D_[:, None]
            dD_ += dy_ * x_
            dbias_ += tl.where(now, ddelta_, 0)
            tl.store(dx_at + here * dx_t, dx_, mask=now, eviction_policy=FORGET)
            tl.store(ddelta_at + here * ddelta_t, ddelta_, mask=now, eviction_policy=FORGET)
            if z is not None:
                if D is not None:
                    y_ += D_[:, None] * x_
                dz_ = dout * y_ * gate * (1 + z_ * (1 - gate))
                tl.store(dz_at + here * dz_t, dz_, mask=now, eviction_policy=FORGET)
        sum_D += dD_  # by chunk, and below by window: rounding errors add up less than step by step
        sum_bias += dbias_
        tl.debug_barrier()
    sum_D, sum_bias = tl.sum(sum_D, 1), tl.sum(sum_bias, 1)
    if fresh == 0:
        dA_ += tl.load(dA, mask=real, other=0)
        sum_D += tl.load(dD, mask=channel, other=0)
        sum_bias += tl.load(dbias, mask=channel, other=0)
    tl.store(adjoint, g, mask=real)
    tl.store(dA, dA_, mask=real)
    tl.store(dD, sum_D, mask=channel)
    tl.store(dbias, sum_bias, mask=channel)


@triton.jit(do_not_specialize=["begin"])
def _add_kernel(
    pieces, dB, dC, blocks, steps, split, window, begin, dB_b, dB_t, dB_n, dC_b, dC_t, dC_n,
    STATES: tl.constexpr, N: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """Gradients of B and C for a token of a window: the sum of what the blocks of channels have of them."""
    n, deep = tl.arange(0, N), tl.arange(0, DEEP)
    row, part, parts, b = tl.program_id(0), tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    if begin + row >= tl.minimum(split, steps - part * split):
        return
    pieces += ((b * parts + part) * window + row) * blocks * (2 * N) + tl.arange(0, 2 * N)[None, :]
    total = tl.zeros((DEEP, 2 * N), pieces.dtype.element_ty)
    for block in range(0, blocks, DEEP):
        places = (block + deep)[:, None]
        total += tl.load(pieces + places * (2 * N), mask=places < blocks, other=0, eviction_policy=FORGET)
    dB_, dC_ = tl.split(tl.permute(tl.reshape(tl.sum(total, 0), (2, N)), (1, 0)))
    step = (part * split + begin + row).to(tl.int64)
    tl.store(dB + b * dB_b + step * dB_t + n * dB_n, dB_, mask=n < STATES)
    tl.store(dC + b * dC_b + step * dC_t + n * dC_n, dC_, mask=n < STATES)


# Launching them.

BLOCK = 16  # channels a program of the scans
TILES = {"few": 32, "many": 16}  # steps of their tiles at most, where programs are few and where they are many
# Of the gradient kernel: channels a program, steps of a tile, tiles whose loads go out at once on the way forwards.
GRADIENT = {"BLOCK": 32, "T": 4, "AT_ONCE": 4}
ADD = {"DEEP": 128, "num_warps": 4}  # of the sum over blocks: blocks at once
CHUNK = 64  # steps from one kept state to the next: tiles, and all that are read at once, fit
WINDOWS = 6  # that the backward pass cuts the tokens into, one after the other, which bounds its memory
WINDOW = 1536  # tokens that one has at least
# Warps that an SM should have, or else time is split; with "many", shorter tiles leave room for more of them at once.
WARPS = {"forward": 4, "adjoint": 32, "backward": 8, "many": 12}


def scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, state: Tensor | None, segments: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The function of `naive.scan`, same arguments, any strides. Differentiable once."""
    arguments = (x, delta, A, B, C, D, z, delta_bias, delta_softplus, state, segments)
    tensors = (argument for argument in arguments if isinstance(argument, Tensor))
    remember = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    # torch.compile needs the operator; otherwise its dispatch would take nearly as long as a short scan.
    if torch.compiler.is_compiling():
        return _operator(*arguments, remember)[:2]
    return _Differentiable.apply(*arguments) if remember else _forward(*arguments, False)[:2]


def _forward(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, state: Tensor | None, segments: Tensor | None, remember: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the last state, and with `remember` the states that backward starts from, (b, chunks, c, n) with n filled."""
    batch, steps, channels = x.shape
    D, delta_bias = (_contiguous(tensor) for tensor in (D, delta_bias))
    A, state, states = _filled(A, -1), _filled(state, 0), A.shape[1]
    blocks = ceil_div(channels, BLOCK)
    y, last, saved = _outputs(x, A, remember)
    BC, resets = _pack(B, C, last.dtype), _resets(segments)
    tiling = _tiling(A, BC, batch * blocks)
    parts, split = _split(steps, batch * blocks * tiling["num_warps"], WARPS["forward"], x.device)
    ends, spans = _between(last, parts - 1)

    def launch(parts, y, saved):
        gate = None if y is None else z
        _forward_kernel[blocks, parts, batch](
            x, delta, A, BC, D, gate, delta_bias, resets, state, ends, spans, y, saved, last,
            steps, split, channels,
            *x.stride(), *delta.stride(), *_strides(gate), *_strides(y), BC.stride(0),
            SOFTPLUS=delta_softplus, CHUNK=CHUNK, **tiling,
        )  # fmt: skip

    if parts > 1:
        launch(parts - 1, None, None)  # nothing starts where the last part ends
    launch(parts, y, saved if remember else None)
    return y, last[..., :states].contiguous(), saved


_operator = torch.library.custom_op("minijamba::selective_scan", _forward, mutates_args=())


@_operator.register_fake
def _(x, delta, A, B, C, D, z, delta_bias, delta_softplus, state, segments, remember):
    y, last, saved = _outputs(x, _filled(A, -1), remember)
    return y, last[..., : A.shape[1]].contiguous(), saved


def _outputs(x: Tensor, A: Tensor, remember: bool) -> tuple[Tensor, Tensor, Tensor]:
    chunks = ceil_div(x.shape[1], CHUNK) if remember else 0
    last = x.new_empty(len(x), *A.shape, dtype=state_dtype(x))
    return torch.empty_like(x), last, last.new_empty(len(x), chunks, *A.shape)


def _backward(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, segments: Tensor | None, saved: Tensor,
    dy: Tensor, dlast: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, delta, A, B, C, D, z, delta_bias and state; empty where the argument was None.

    Sums over channels, for B and C, and over time, for A, D and the bias, are kept in pieces, one a program, and added
    up afterwards: atomic additions would come in another order every time.
    """
    batch, steps, channels = x.shape
    D_, bias = (_contiguous(tensor) for tensor in (D, delta_bias))
    A_, dlast, states = _filled(A, -1), _filled(dlast, 0), A.shape[1]
    warps = ceil_div(channels, GRADIENT["BLOCK"]) * _gradient_warps(A_)
    group, parts, split, window = _walk(batch, steps, warps, x.device)
    dx, ddelta, dB, dC = (torch.empty_like(tensor) for tensor in (x, delta, B, C))
    dz = None if z is None else torch.empty_like(z)
    adjoint, dA = (saved.new_empty(batch, parts, *A_.shape) for _ in range(2))
    sums = saved.new_empty(batch, parts, 2, channels)
    BC, resets = _pack(B, C, saved.dtype), _resets(segments)
    of_batch = x, delta, BC, z, resets, saved, dlast, dy, dx, ddelta, dB, dC, dz, dA, sums, adjoint
    for first in range(0, batch, group):
        some = (None if tensor is None else tensor[first : first + group] for tensor in of_batch)
        _walk_back(A_, D_, bias, delta_softplus, split, window, *some)
    dA, dD, dbias = (
        None if like is None else pieces.sum((0, 1)).to(like.dtype)
        for pieces, like in ((dA[..., :states], A), (sums[:, :, 0], D), (sums[:, :, 1], delta_bias))
    )
    grads = dx, ddelta, dA, dB, dC, dD, dz, dbias
    return *(x.new_empty(0) if grad is None else grad for grad in grads), adjoint[:, 0, :, :states].contiguous()


def _walk_back(
    A, D, bias, softplus, split, window, x, delta, BC, z, resets, saved, dlast, dy,
    dx, ddelta, dB, dC, dz, dA, sums, adjoint,
):  # fmt: skip
    """Write the gradients of some sequences, window by window from the last; the adjoints before all parts remain."""
    batch, steps, channels = x.shape
    N, parts, blocks = A.shape[1], adjoint.shape[1], ceil_div(channels, GRADIENT["BLOCK"])
    pieces = saved.new_empty(blocks * batch * parts * window * 2 * N)
    scratch = saved.new_empty(batch * parts * blocks * CHUNK // GRADIENT["T"] * N * GRADIENT["BLOCK"])
    of_adjoint = *delta.stride(), *_strides(z), *dy.stride(), BC.stride(0)
    of_gradient = *x.stride(), *delta.stride(), *_strides(z), *dy.stride()
    of_gradient += *dx.stride(), *ddelta.stride(), *_strides(dz), BC.stride(0)

    programs = batch * ceil_div(channels, BLOCK) * (parts - 1)
    tiling = _tiling(A, BC, programs * ceil_div(split, CHUNK))
    _, reach = _split(split, programs * tiling["num_warps"], WARPS["adjoint"], x.device)
    stretches = (parts - 1) * ceil_div(split, reach)
    ends, spans = _between(adjoint[:, 0], stretches)
    if parts > 1:
        _adjoint_kernel[ceil_div(channels, BLOCK), stretches, batch](
            delta, A, BC, z, bias, resets, dy, ends, spans, steps, split, reach, channels, *of_adjoint,
            SOFTPLUS=softplus, **tiling,
        )  # fmt: skip
    constants = {"SOFTPLUS": softplus, "N": N, "CHUNK": CHUNK, **GRADIENT, "num_warps": _gradient_warps(A)}
    gradient = _again(_gradient_kernel, (blocks, parts, batch), constants)
    add = _again(_add_kernel, (window, parts, batch), {"STATES": dB.shape[2], "N": N, **ADD})
    for begin in reversed(range(0, split, window)):
        gradient(
            x, delta, A, BC, D, z, bias, resets, saved, dlast, ends, spans, dy,
            dx, ddelta, dz, dA, sums, pieces, adjoint, scratch,
            steps, split, window, begin, int(begin + window >= split), reach, channels, *of_gradient,
        )  # fmt: skip
        add(pieces, dB, dC, blocks, steps, split, window, begin, *dB.stride(), *dC.stride())


def _again(kernel, grid: tuple[int, int, int], constants: dict[str, object]) -> Callable[..., None]:
    """A function that launches a kernel, from the second time on without asking which version of it fits the
    arguments: they must differ only in numbers for which there is one version. That saves 30 of 45 microseconds."""
    compiled = None
    in_order = [constants[name] for name in kernel.arg_names if name in constants]

    def launch(*arguments):
        nonlocal compiled
        if compiled is None:
            compiled = kernel[grid](*arguments, **constants)  # None in the interpreter
        else:
            compiled[grid](*arguments, *in_order)

    return launch


_backward_operator = torch.library.custom_op("minijamba::selective_scan_backward", _backward, mutates_args=())


@_backward_operator.register_fake
def _(x, delta, A, B, C, D, z, delta_bias, delta_softplus, segments, saved, dy, dlast):
    grads = (x.new_empty(0) if v is None else torch.empty_like(v) for v in (x, delta, A, B, C, D, z, delta_bias))
    return *grads, saved.new_empty(len(x), *A.shape)


def _remember(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # or the saved states, whose gradient nobody has, would get zeros of their size
    *tensors, ctx.delta_softplus, state, segments = inputs[:11]
    _, _, saved = output
    ctx.has_state = state is not None
    ctx.save_for_backward(*tensors, segments, saved)


def _gradients(ctx, dy, dlast, run):
    *tensors, segments, saved = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    *grads, dstate = run(*tensors, ctx.delta_softplus, segments, saved, dy, dlast)
    grads = (None if tensor is None else grad for tensor, grad in zip(tensors, grads, strict=True))
    return *grads, None, dstate if ctx.has_state else None, None


_operator.register_autograd(
    lambda ctx, dy, dlast, *_: (*_gradients(ctx, dy, dlast, _backward_operator), None), setup_context=_remember
)


class _Differentiable(torch.autograd.Function):
    """The operator for autograd alone, without its dispatch."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs, True)
        _remember(ctx, inputs, output)
        return output[:2]

    @staticmethod
    def backward(ctx, dy, dlast):
        refuse_to_differentiate_twice("fused")
        return _gradients(ctx, dy, dlast, _backward)


def _tiling(A: Tensor, BC: Tensor, programs: int) -> dict[str, int]:
    """How a program of the scans is cut: W threads share the states of a channel, and a tile has the steps whose B and
    C fit the registers."""
    N = A.shape[1]
    W = min(N, 4)
    warps = max(BLOCK * W // 32, 1)
    many = programs * warps >= WARPS["many"] * _processors(A.device)
    T = min(TILES["many" if many else "few"], (128 if BC.dtype == torch.int32 else 64) * W // N)
    return {"N": N, "W": W, "BLOCK": BLOCK, "T": T, "num_warps": warps}


def _gradient_warps(A: Tensor) -> int:
    """A warp has the registers for 8 states of a block."""
    return max(A.shape[1] // 8, 1)


def _pack(B: Tensor, C: Tensor, wide: torch.dtype) -> Tensor:
    """B and C side by side, with zeros for states up to a power of two and for steps up to a whole tile.

    Returns (b, t+, N) int32, each a pair of bfloat16, or (b, t+, 2, N) in the state's dtype.
    """
    batch, steps, states = B.shape
    shape = batch, ceil_div(steps, TILES["few"]) * TILES["few"], _power_of_2(states)
    if B.dtype == C.dtype == torch.bfloat16:
        if shape[1:] == (steps, states):
            return torch.stack((B, C), -1).view(torch.int32).squeeze(3)
        pairs = B.new_zeros(*shape, 2)
        pairs[:, :steps, :states, 0], pairs[:, :steps, :states, 1] = B, C
        return pairs.view(torch.int32).squeeze(3)
    rows = B.new_zeros(*shape[:2], 2, shape[2], dtype=wide)
    rows[:, :steps, 0, :states], rows[:, :steps, 1, :states] = B, C
    return rows


def _resets(segments: Tensor | None) -> Tensor | None:
    """(b, t) int8, 1 where a document starts."""
    return None if segments is None else document_starts(segments).view(torch.int8)


def _walk(batch: int, steps: int, warps: int, device: torch.device) -> tuple[int, int, int, int]:
    """How the backward pass goes: sequences at once, parts of time that are walked side by side, the steps of a part,
    and the steps that each goes back at once.

    Pieces take memory for each token of a window and scratch for each program, so a batch that fills the GPU several
    times is cut, too.
    """
    wanted = WARPS["backward"]
    group = max(min(round(wanted * _processors(device) / max(warps, 1)), batch), 1)
    parts, split = _split(steps, group * warps, wanted, device)
    window = max(batch * steps // WINDOWS, WINDOW) // (group * parts)
    return group, parts, split, min(ceil_div(max(window, 1), CHUNK) * CHUNK, split)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _split(steps: int, warps: int, wanted: int, device: torch.device) -> tuple[int, int]:
    """How many parts to split the time into, so that every SM has the wanted warps; and the steps of a part."""
    parts = min(max(wanted * _processors(device) // max(warps, 1), 1), ceil_div(steps, CHUNK))
    split = ceil_div(ceil_div(steps, parts), CHUNK) * CHUNK
    return ceil_div(steps, split), split


def _between(state: Tensor, parts: int) -> tuple[Tensor | None, Tensor | None]:
    """Room for what so many parts or stretches make of zero, (b, parts, c, n), and for their spans (b, parts, c)."""
    batch, channels, states = state.shape
    if parts == 0:
        return None, None
    return state.new_empty(batch, parts, channels, states), state.new_empty(batch, parts, channels)


def _power_of_2(size: int) -> int:
    """The next one. triton.next_power_of_2 does the same and takes microseconds."""
    return 1 << (size - 1).bit_length()


def _filled(tensor: Tensor | None, value: float) -> Tensor | None:
    """(..., n) with n filled up to a power of two, so that the states of a thread are neighbours in memory."""
    if tensor is None:
        return None
    missing = _power_of_2(tensor.shape[-1]) - tensor.shape[-1]
    return F.pad(tensor, (0, missing), value=value) if missing else tensor.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if tensor is None else tensor.stride()
