"""The short causal convolution in front of the scan, channel by channel, with the window carried between calls."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rungs import choose, why_no_kernels
from . import naive, parallel
from .naive import with_past


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor | None = None,
    return_state: bool = False,
    segments: Tensor | None = None,
    lengths: Tensor | None = None,
    activation: bool = True,
    rung: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution over time, then SiLU.

        y_t = silu(bias + sum_j weight_j x_{t - (w-1) + j}),   j = 0 .. w-1

    Args:
        x:        (b, t, c)  inputs.
        weight:   (c, w)     one filter a channel, oldest tap first.
        bias:     (c,)
        state:    (b, w-1, c) the inputs before x, oldest first; zeros when None.
        segments: (b, t) int  packed documents: a tap never reaches across a change. The first token continues `state`.
        lengths:  (b,) int    how many tokens of each row are real, from the left; the rest is padding and stays out of
                  the returned state. All of them when None.
        activation: False leaves the SiLU out.
    Returns: y (b, t, c), or (y, state) where state (b, w-1, c) continues the last real token's document.
    Raises:  ValueError if an axis disagrees.
    Source:  Mamba, section 3.4.
    """
    _check(x, weight, bias, state, segments, lengths)
    past = weight.shape[1] - 1
    documents = None if segments is None else _documents(segments, past)
    run = choose("conv", rung, rungs(x.device), x.device)
    y = run(x, weight, bias, state, documents, activation)
    return (y, _last_inputs(x, state, documents, lengths, past)) if return_state else y


def causal_conv_step(
    window: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: bool = True,
    real: Tensor | None = None,
    rung: str = "auto",
) -> Tensor:
    """One step of `causal_conv`: x (b, c), window (b, w-1, c) as its state; the rest as there. Returns y (b, c).

    The window is updated in place, and so there are no gradients; not in rows where `real` (b,) bool is False.
    """
    wanted = (x.shape[0], weight.shape[1] - 1, x.shape[1])
    if tuple(window.shape) != wanted or weight.shape[0] != x.shape[1]:
        at = f"beside x {tuple(x.shape)} and weight {tuple(weight.shape)}"
        raise ValueError(f"window must be {wanted} {at}, whose channels must agree; it is {tuple(window.shape)}")
    run = choose("conv", rung, step_rungs(x.device), x.device)
    return run(window, x, weight, bias, activation, real)


def rungs(device: torch.device) -> dict[str, Callable]:
    """The implementations that run on tensors of this device, slowest first."""
    implementations = {"naive": naive.conv, "parallel": parallel.conv}
    if why_no_kernels(device) is None:
        from . import fused

        implementations["fused"] = fused.conv
    return implementations


def step_rungs(device: torch.device) -> dict[str, Callable]:
    """The same for one step."""
    implementations = {"naive": naive.step, "parallel": naive.step}
    if why_no_kernels(device) is None:
        from . import fused

        implementations["fused"] = fused.step
    return implementations


def _documents(segments: Tensor, past: int) -> Tensor:
    """Number the documents along each row: (b, t) -> (b, w-1+t), the carried inputs counted to the first one.

    [7 7 3 7] with w = 3 becomes [0 0 | 0 0 1 2]: a number that returns later is another document.
    """
    changes = segments[:, 1:] != segments[:, :-1]
    return F.pad(changes.long().cumsum(1), (past + 1, 0))


def _last_inputs(
    x: Tensor, state: Tensor | None, documents: Tensor | None, lengths: Tensor | None, past: int
) -> Tensor:
    """The w-1 inputs up to each row's last real token; those of an earlier document read as zero."""
    batch, steps, channels = x.shape
    if lengths is None:
        last = with_past(x[:, max(steps - past, 0) :], state, past)
        last, near = last[:, last.shape[1] - past :], None if documents is None else documents[:, steps:]
    else:
        at = lengths[:, None] + torch.arange(past, device=x.device)
        last = with_past(x, state, past).gather(1, at[:, :, None].expand(-1, -1, channels))
        near = None if documents is None else documents.gather(1, at)
    return last if documents is None else last.masked_fill((near != near[:, -1:])[:, :, None], 0)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    lengths: Tensor | None,
) -> None:
    if x.dim() != 3 or weight.dim() != 2:
        raise ValueError(f"x must be (b, t, c) and weight (c, w), not {tuple(x.shape)} and {tuple(weight.shape)}")
    batch, steps, channels = x.shape
    if steps == 0:
        raise ValueError("x has no time steps: pass at least one token")
    width = weight.shape[1]
    wanted = {
        "weight": (weight, (channels, width)),
        "bias": (bias, (channels,)),
        "state": (state, (batch, width - 1, channels)),
        "segments": (segments, (batch, steps)),
        "lengths": (lengths, (batch,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape} beside x {tuple(x.shape)}, not {tuple(tensor.shape)}")
