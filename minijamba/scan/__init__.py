"""The selective scan of Mamba: over a sequence, over one token, and under mamba-ssm's name and layout."""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from ..rungs import choose, why_no_kernels
from . import naive, parallel


def rungs(device: torch.device) -> dict[str, Callable]:
    """The implementations that run on tensors of this device, slowest first."""
    implementations = {"naive": naive.scan, "parallel": parallel.scan}
    if why_no_kernels(device) is None:
        from . import fused

        implementations["fused"] = fused.scan
    return implementations


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    state: Tensor | None = None,
    return_state: bool = False,
    segments: Tensor | None = None,
    rung: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective state-space recurrence over time, channel by channel.

        state_t = exp(delta_t A) * state_{t-1} + delta_t B_t x_t
        y_t     = (<C_t, state_t> + D x_t) * silu(z_t)

    Any split of a sequence into calls, each given the state that the one before it returned, equals one call.

    Args:
        x:     (b, t, c)  activations after the convolution.
        delta: (b, t, c)  length of the step, >= 0, no unit; before bias and softplus where these are given.
        A:     (c, n)     decay rates, < 0.
        B, C:  (b, t, n)  what a token writes to and reads from the state; the same for all channels.
        D:     (c,)       skip connection; none when None.
        z:     (b, t, c)  gate; none when None.
        delta_bias: (c,)  added to delta.
        delta_softplus:   apply softplus to delta, after the bias. Then delta = -inf is a step of length zero, which
                          leaves the state as it was: that is how padding passes.
        state: (b, c, n)  to start from; zeros when None. float32, or float64 if x is float64. Not changed.
        return_state:     return the last state, too.
        segments: (b, t)  integer numbers of packed documents: the state starts at zero wherever the number changes.
                          The first token always continues `state`.
        rung: "naive" (loop over time, differentiable twice), "parallel" (in chunks, once), "fused" (a Triton kernel,
            once; on a GPU, or in Triton's interpreter), or "auto".
    Returns: y (b, t, c) in x's dtype, or (y, state) with state (b, c, n) as the argument. Computed in the state's dtype
        throughout. Gradients reach every floating-point argument, through y and through the state.
    Raises: ValueError if t == 0, an axis disagrees, or the state or segments have the wrong dtype.
    Source: Mamba, algorithm 2, as in its code: A is discretised by zero-order hold, B by Euler's rule.
    """
    _check("b, t, c", x, delta, A, B, C, D, z, delta_bias, state, segments)
    run = choose("scan", rung, rungs(x.device), x.device)
    y, state = run(x, delta, A, B, C, D, z, delta_bias, delta_softplus, state, segments)
    return (y, state) if return_state else y


def selective_step(
    state: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    rung: str = "auto",
) -> Tensor:
    """One step of `selective_scan`: x, delta, z (b, c); B, C (b, n); the rest as there. Returns y (b, c).

    The state (b, c, n) is updated in place, and so there are no gradients.
    """
    _check("b, c", x, delta, A, B, C, D, z, delta_bias, state)
    run = choose("scan", rung, step_rungs(x.device), x.device)
    return run(state, x, delta, A, B, C, D, z, delta_bias, delta_softplus)


def step_rungs(device: torch.device) -> dict[str, Callable]:
    """The implementations of `selective_step` on this device. One token leaves nothing to do in parallel."""
    implementations = {"naive": _step, "parallel": _step}
    if why_no_kernels(device) is None:
        from . import fused_step

        implementations["fused"] = fused_step.step
    return implementations


@torch.no_grad()
def _step(state, x, delta, A, B, C, D, z, delta_bias, delta_softplus) -> Tensor:
    x, delta, B, C, z = (None if tensor is None else tensor[:, None] for tensor in (x, delta, B, C, z))
    y, new = naive.scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus, state, None)
    state.copy_(new)
    return y[:, 0]


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan` under mamba-ssm's name, argument order and layout, which the fused kernels read as it is.

    This lets transformers' Jamba run on them, where `jamba` is its module modeling_jamba:

        jamba.mamba_selective_scan = lambda *a, use_mambapy, use_associative_scan, **k: selective_scan_fn(*a, **k)

    Args: u, delta, z (b, c, t); A (c, n), real; B, C (b, n, t) or (b, 1, n, t); D, delta_bias (c,).
    Returns: y (b, c, t), or (y, state) with state (b, c, n), whose gradient is kept.
    Raises: ValueError, also for what mamba-ssm takes and no Mamba layer uses: a complex A, a B or C that is constant
        in time (c, n) or comes in several groups of channels.
    """
    B, C = (_one_group(tensor, name) for tensor, name in ((B, "B"), (C, "C")))
    for name, tensor in {"u": u, "delta": delta, "B": B, "C": C, "z": z}.items():
        if tensor is not None and tensor.dim() != 3:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; selective_scan_fn needs three axes, time last")
    x, delta, B, C, z = (
        None if tensor is None else rearrange(tensor, "b c t -> b t c") for tensor in (u, delta, B, C, z)
    )
    y, state = selective_scan(
        x, delta, A, B, C, D, z, delta_bias=delta_bias, delta_softplus=delta_softplus, return_state=True
    )
    y = rearrange(y, "b t c -> b c t")
    return (y, state) if return_last_state else y


def _one_group(tensor: Tensor, name: str) -> Tensor:
    if tensor.dim() == 4 and tensor.shape[1] == 1:
        return tensor[:, 0]
    if tensor.dim() != 3:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; it must vary with time and be shared by all channels: "
            f"(b, n, t) or (b, 1, n, t)"
        )
    return tensor


def _check(axes, x, delta, A, B, C, D, z, delta_bias, state, segments=None) -> None:
    if x.dim() != len(axes.split()) or A.dim() != 2:
        raise ValueError(f"x must be ({axes}) and A (c, n), not {tuple(x.shape)} and {tuple(A.shape)}")
    if 0 in x.shape[1:-1]:
        raise ValueError(f"x {tuple(x.shape)} has no time steps: pass at least one token")
    *tokens, channels = x.shape
    states = A.shape[1]
    wanted = {
        "x": (x, (*tokens, channels)),
        "delta": (delta, (*tokens, channels)),
        "A": (A, (channels, states)),
        "B": (B, (*tokens, states)),
        "C": (C, (*tokens, states)),
        "D": (D, (channels,)),
        "z": (z, (*tokens, channels)),
        "delta_bias": (delta_bias, (channels,)),
        "state": (state, (tokens[0], channels, states)),
        "segments": (segments, tuple(tokens)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            beside = f"x {tuple(x.shape)} and A {tuple(A.shape)}"
            raise ValueError(f"{name} must be {shape} beside {beside}, not {tuple(tensor.shape)}")
        if tensor.is_floating_point() == (name == "segments") or tensor.is_complex():
            kind = "integers" if name == "segments" else "real floating-point numbers"
            raise ValueError(f"{name} must hold {kind}, not {tensor.dtype}")
    if state is not None and state.dtype != (wide := naive.state_dtype(x)):
        raise ValueError(f"state must be {wide} when x is {x.dtype}, not {state.dtype}: pass state.to({wide})")
