"""The short causal convolution with its SiLU, beside causal-conv1d and torch."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from ..conv import causal_conv
from ..rungs import why_no_kernels
from .measure import Component, Plan, Setting, Side, time_last


def ours(rung: str, setting: Setting) -> Side:
    if rung == "fused" and (reason := why_no_kernels(setting.device)):
        raise ImportError(reason)
    return Side(f"minijamba {rung}", partial(causal_conv, rung=rung))


def causal_conv1d(name: str, layout, setting: Setting) -> Side:
    from causal_conv1d import causal_conv1d_fn

    return Side(name, partial(causal_conv1d_fn, activation="silu"), layout, frozenset({"causal_conv1d"}))


def conv1d(setting: Setting) -> Side:
    def conv(x, weight, bias):
        channels, width = weight.shape
        y = F.conv1d(x, weight[:, None], bias, padding=width - 1, groups=channels)
        return F.silu(y[..., : x.shape[-1]])

    return Side("torch", conv, time_last)


def arguments(setting: Setting, batch: int, steps: int) -> dict[str, Tensor]:
    channels, width = setting.sizes["channels"], setting.sizes["width"]
    normal = setting.normals()
    return {"x": normal(batch, steps, channels), "weight": normal(channels, width), "bias": normal(channels)}


def least(setting: Setting, batch: int, steps: int) -> dict[str, int]:
    """Reading x once and writing y once."""
    return {"bytes": 2 * batch * steps * setting.sizes["channels"] * setting.dtype.itemsize}


CHANNEL_LAST, CHANNEL_FIRST = "causal-conv1d, channel last", "causal-conv1d, channel first"
CASES = [(1, 2048), (8, 2048), (1, 8192), (1, 32768)]

CONV = Component(
    name="conv",
    help="the causal convolution, beside causal-conv1d and torch",
    plans={
        "cpu": Plan(
            dtype="float32",
            repeats=20,
            sizes={"channels": 256, "width": 4},
            sides=["minijamba parallel", "minijamba naive", "torch"],
            cases={"forward": [(1, 512), (1, 2048), (1, 8192)], "forward + backward": [(1, 2048)]},
        ),
        "cuda": Plan(
            dtype="bfloat16",
            repeats=30,
            sizes={"channels": 8192, "width": 4},
            sides=["minijamba fused", "minijamba parallel", CHANNEL_LAST, CHANNEL_FIRST, "torch"],
            cases={
                "forward": CASES,
                "floor of forward": CASES,
                "forward in a row": [(1, 2048)],
                "forward + backward": CASES,
                "forward + backward in a row": [(1, 2048)],
                "peak memory of forward + backward": [(1, 8192)],
                "error of forward + backward": [(2, 257)],
            },
        ),
    },
    sides={
        **{f"minijamba {rung}": partial(ours, rung) for rung in ("fused", "parallel", "naive")},
        CHANNEL_LAST: partial(causal_conv1d, CHANNEL_LAST, lambda tensor: tensor.mT),
        CHANNEL_FIRST: partial(causal_conv1d, CHANNEL_FIRST, time_last),
        "torch": conv1d,
    },
    reference=partial(ours, "naive"),
    arguments=arguments,
    least=least,
)
