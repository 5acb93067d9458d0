"""The causal convolution as Triton kernels: each number is read from memory once and written once.

Channels are independent, and memory holds those of one step side by side: neighbouring threads take neighbouring
channels. Nothing else matters here: four products an input are nothing beside the bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fused_overlap import gdc_launch_dependents, gdc_wait, overlap
from ..rungs import ceil_div

# What one program works on, and its warps of 32 threads.
FORWARD = {"T": 64, "C": 512, "AHEAD": 8, "num_warps": 4}
BACKWARD = {"T": 128, "C": 512, "AHEAD": 4, "num_warps": 4}
STEP = {"C": 128, "num_warps": 1}


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, documents: Tensor | None, activation: bool
) -> Tensor:
    """The function of `naive.conv`, same arguments; differentiable once.

    Any strides will do, but these kernels are fast only where channels are adjacent in memory, as in (b, t, c).
    """
    state = None if state is None else state.to(x.dtype)
    tensors = (x, weight, bias, state)
    remember = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    run = _operator if remember or torch.compiler.is_compiling() else _conv
    return run(x, weight, bias, state, documents, activation)


def step(
    window: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: bool, real: Tensor | None
) -> Tensor:
    """One token, x (b, c) -> y (b, c); the window (b, w-1, c) takes it in and drops its oldest, in place.

    In rows where `real` (b,) bool is False the window stays as it is.
    """
    run = _step_operator if torch.compiler.is_compiling() else _token
    return run(window, x, weight, bias, activation, real)


def _token(
    window: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: bool, real: Tensor | None
) -> Tensor:
    y = torch.empty_like(x)
    batch, channels = x.shape
    _step[ceil_div(channels, STEP["C"]), batch](
        window, window.stride(), x, x.stride(), real, weight.contiguous(), _dense(bias), y, y.stride(), channels,
        WIDTH=weight.shape[1], ACTIVATION=activation, WIDE=_wide(x), **STEP, **overlap(x.device),
    )  # fmt: skip
    return y


_step_operator = torch.library.custom_op("minijamba::conv_step", _token, mutates_args=("window",))


@_step_operator.register_fake
def _(window, x, weight, bias, activation, real):
    return torch.empty_like(x)


def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, documents: Tensor | None, activation: bool
) -> Tensor:
    batch, steps, channels = x.shape
    y = torch.empty_like(x)
    tiles = ceil_div(steps, FORWARD["T"]) * ceil_div(channels, FORWARD["C"])
    _forward[tiles, batch](
        x, x.stride(), state, _strides(state), documents, weight.contiguous(), _dense(bias), y, y.stride(),
        steps, channels, WIDTH=weight.shape[1], ACTIVATION=activation, WIDE=_wide(x), **FORWARD,
    )  # fmt: skip
    return y


@torch.library.custom_op("minijamba::conv_backward", mutates_args=())
def _conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, documents: Tensor | None,
    activation: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias and state; empty for a bias or state that is None."""
    batch, steps, channels = x.shape
    width, tiles = weight.shape[1], ceil_div(steps, BACKWARD["T"])
    dx, dstate = torch.empty_like(x), torch.empty_like(x[:, :0] if state is None else state)
    # Every program leaves its part of the filters' gradients in a row of its own. Their sum is always the same sum,
    # which atomic additions, in the order that programs happen to end, would not be.
    parts = x.new_empty(batch, tiles, width + 1, channels, dtype=torch.promote_types(x.dtype, torch.float32))
    _backward[tiles * ceil_div(channels, BACKWARD["C"]), batch](
        x, x.stride(), state, _strides(state), documents, weight.contiguous(), _dense(bias), dy, dy.stride(),
        dx, dx.stride(), dstate, dstate.stride(), parts, steps, channels,
        WIDTH=width, ACTIVATION=activation, WIDE=_wide(x), **BACKWARD,
    )  # fmt: skip
    *dweight, dbias = parts.sum((0, 1))
    dweight = torch.stack(dweight, dim=1).to(weight.dtype)
    return dx, dweight, x.new_empty(0) if bias is None else dbias.to(bias.dtype, copy=True), dstate


_operator = torch.library.custom_op("minijamba::conv", _conv, mutates_args=())


@_operator.register_fake
def _(x, weight, bias, state, documents, activation):
    return torch.empty_like(x)


@_conv_backward.register_fake
def _(dy, x, weight, bias, state, documents, activation):
    dbias, dstate = x.new_empty(0) if bias is None else bias, x[:, :0] if state is None else state
    return tuple(torch.empty_like(tensor) for tensor in (x, weight.contiguous(), dbias, dstate))


def _save(ctx, inputs, output):
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dy):
    dx, dweight, dbias, dstate = _conv_backward(dy, *ctx.saved_tensors, ctx.activation)
    _, _, bias, state, _ = ctx.saved_tensors
    return dx, dweight, None if bias is None else dbias, None if state is None else dstate, None, None


_operator.register_autograd(_gradients, setup_context=_save)


def _strides(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tensor.stride()


def _dense(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _wide(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


# The kernels walk along time with the last w inputs in registers, C channels side by side. They read AHEAD steps at a
# time: memory takes no longer for several than for one. `x_at` are the strides of x over sequences, steps, channels;
# t counts from the program's first step; PAST = w - 1.


@triton.jit(do_not_specialize=["steps"])
def _forward(
    x, x_at, state, state_at, documents, weight, bias, y, y_at, steps, channels,
    WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr,
    T: tl.constexpr, C: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """y at T steps of C channels."""
    PAST: tl.constexpr = WIDTH - 1
    b, c, start, left = _place(steps, channels, T, C)
    taps, offset = _filter(weight, bias, c, channels, WIDTH, WIDE)
    inputs = _inputs_before(x, x_at, state, state_at, b, c, start, channels, PAST, WIDE)
    x, y = _from(x, x_at, b, start, c), _from(y, y_at, b, start, c)
    for first in tl.range(0, tl.minimum(left, T), AHEAD):
        ahead = ()
        for i in tl.static_range(AHEAD):
            ahead += (_read(x, x_at, first + i, first + i < left, c, channels),)
        for i in tl.static_range(AHEAD):
            t = first + i
            inputs += (ahead[i].to(WIDE),)
            near = None if documents is None else _documents(documents, b, start + t, steps, WIDTH)
            a = _dot(taps, _same(inputs, near, PAST, WIDTH), offset, WIDTH)
            _write(y, y_at, t, t < left, c, channels, a * _sigmoid(a) if ACTIVATION else a)
            inputs = inputs[1:]


@triton.jit(do_not_specialize=["steps"])
def _backward(
    x, x_at, state, state_at, documents, weight, bias, dy, dy_at, dx, dx_at, dstate, dstate_at, parts, steps, channels,
    WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr,
    T: tl.constexpr, C: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """dx at T steps of C channels, the state's gradient before the first step, the T steps' part of the filters'.

    g_t       = dy_t silu'(a_t),  a_t the sum before the activation, formed once more
    dx_t      = sum_k weight_{PAST - k} g_{t + k}      which is complete PAST steps later
    dweight_j = sum_t g_t x_{t - PAST + j}
    """
    PAST: tl.constexpr = WIDTH - 1
    b, c, start, left = _place(steps, channels, T, C)
    taps, offset = _filter(weight, bias, c, channels, WIDTH, WIDE)
    inputs = _inputs_before(x, x_at, state, state_at, b, c, start, channels, PAST, WIDE)
    x, dy, dx = _from(x, x_at, b, start, c), _from(dy, dy_at, b, start, c), _from(dx, dx_at, b, start, c)
    dstate = _from(dstate, dstate_at, b, 0, c)
    zero = tl.zeros([C], WIDE)
    g, dweight, dbias = (zero,) * PAST, (zero,) * WIDTH, zero
    for first in tl.range(0, tl.minimum(left, T) + PAST, AHEAD):
        x_ahead, dy_ahead = (), ()
        for i in tl.static_range(AHEAD):
            x_ahead += (_read(x, x_at, first + i, first + i < left, c, channels),)
            dy_ahead += (_read(dy, dy_at, first + i, first + i < left, c, channels),)
        for i in tl.static_range(AHEAD):
            t = first + i
            inputs += (x_ahead[i].to(WIDE),)
            near = None if documents is None else _documents(documents, b, start + t, steps, WIDTH)
            seen = _same(inputs, near, PAST, WIDTH)
            g_t = dy_ahead[i].to(WIDE)
            if ACTIVATION:
                a = _dot(taps, seen, offset, WIDTH)
                s = _sigmoid(a)
                g_t *= s + a * s * (1 - s)
            g += (g_t,)
            dx_t = _dot(taps[::-1], _same(g, near, 0, WIDTH), zero, WIDTH)
            _write(dx, dx_at, t - PAST, (t >= PAST) & (t < tl.minimum(left, T) + PAST), c, channels, dx_t)
            if state is not None:
                _write(dstate, dstate_at, t, (start == 0) & (t < PAST), c, channels, dx_t)
            own = tl.where(t < T, g_t, 0)
            dweight, dbias = _multiply_add(dweight, own, seen, WIDTH), dbias + own
            inputs, g = inputs[1:], g[1:]
    parts += (b * tl.cdiv(steps, T) + start // T) * (WIDTH + 1) * channels + c
    for j in tl.static_range(WIDTH):
        tl.store(parts + j * channels, dweight[j], mask=c < channels)
    tl.store(parts + WIDTH * channels, dbias, mask=c < channels)


@triton.jit
def _step(
    window, window_at, x, x_at, real, weight, bias, y, y_at, channels,
    WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The next token of C channels: y, and the window a step further, where the token is real."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    b = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * C + tl.arange(0, C)
    taps, offset = _filter(weight, bias, c, channels, WIDTH, WIDE)
    window, inputs = _from(window, window_at, b, 0, c), ()
    for j in tl.static_range(WIDTH - 1):
        inputs += (_read(window, window_at, j, True, c, channels),)
    new = tl.load(x + b * x_at[0] + c * x_at[1], mask=c < channels, other=0)
    inputs += (new.to(window.dtype.element_ty),)
    a = _dot(taps, inputs, offset, WIDTH)
    tl.store(y + b * y_at[0] + c * y_at[1], a * _sigmoid(a) if ACTIVATION else a, mask=c < channels)
    tl.debug_barrier()  # every thread has read the window before one of them writes to it
    moves = True if real is None else tl.load(real + b)
    for j in tl.static_range(WIDTH - 1):
        _write(window, window_at, j, moves, c, channels, inputs[j + 1])


@triton.jit
def _place(steps, channels, T: tl.constexpr, C: tl.constexpr):
    """A program's sequence, channels, first step and the steps left from there. Neighbours work on the same steps."""
    program, blocks = tl.program_id(0), tl.cdiv(channels, C)
    start = program // blocks * T
    c = program % blocks * C + tl.arange(0, C)
    return tl.program_id(1).to(tl.int64), c.to(tl.int64), start.to(tl.int64), steps - start


@triton.jit
def _filter(weight, bias, c, channels, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """The taps, oldest first, and the bias."""
    taps, offset = (), tl.zeros(c.shape, WIDE)
    for j in tl.static_range(WIDTH):
        taps += (tl.load(weight + c * WIDTH + j, mask=c < channels, other=0).to(WIDE),)
    if bias is not None:
        offset += tl.load(bias + c, mask=c < channels, other=0).to(WIDE)
    return taps, offset


@triton.jit
def _inputs_before(
    x, x_at, state, state_at, b, c, start, channels, PAST: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """The PAST inputs before step `start`; from the state, or zero, where they come before the first step of all."""
    inputs = ()
    for j in tl.static_range(PAST):
        value = _read(_from(x, x_at, b, start - PAST, c), x_at, j, start + j >= PAST, c, channels).to(WIDE)
        if state is not None:
            value += _read(_from(state, state_at, b, start, c), state_at, j, start + j < PAST, c, channels).to(WIDE)
        inputs += (value,)
    return inputs


@triton.jit
def _from(x, x_at, b, start, c):
    """Where step `start` of channels c stands in memory."""
    return x + b * x_at[0] + start * x_at[1] + c * x_at[2]


@triton.jit
def _read(x, x_at, t, exists, c, channels):
    """Step t of x, counted from where x points to; zero if it does not exist."""
    return tl.load(x + tl.cast(t, tl.int64) * x_at[1], mask=c < tl.where(exists, channels, 0), other=0)


@triton.jit
def _write(x, x_at, t, exists, c, channels, value):
    tl.store(x + tl.cast(t, tl.int64) * x_at[1], value, mask=c < tl.where(exists, channels, 0))


@triton.jit
def _documents(documents, b, t, steps, WIDTH: tl.constexpr):
    """The documents of step t and the PAST inputs before it, from the call's first step on."""
    near, inputs = (), steps + WIDTH - 1
    for j in tl.static_range(WIDTH):
        near += (tl.load(documents + b * inputs + t + j, mask=t + j < inputs, other=-1),)
    return near


@triton.jit
def _same(values, near, own: tl.constexpr, WIDTH: tl.constexpr):
    """The values that belong to the document of number `own` among them, zero in place of the others."""
    if near is None:
        kept = values
    else:
        kept = ()
        for j in tl.static_range(WIDTH):
            kept += (tl.where(near[j] == near[own], values[j], 0),)
    return kept


@triton.jit
def _dot(weights, values, total, WIDTH: tl.constexpr):
    for j in tl.static_range(WIDTH):
        total += weights[j] * values[j]
    return total


@triton.jit
def _multiply_add(sums, factor, values, WIDTH: tl.constexpr):
    new = ()
    for j in tl.static_range(WIDTH):
        new += (sums[j] + factor * values[j],)
    return new


@triton.jit
def _sigmoid(a):
    return 1 / (1 + tl.exp(-a))
