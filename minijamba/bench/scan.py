"""The selective scan beside mamba-ssm, transformers and mambapy; z, D, bias and softplus included."""

import inspect
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rungs import why_no_kernels
from ..scan import selective_scan
from .measure import Component, Plan, Setting, Side, time_last


def ours(rung: str, setting: Setting) -> Side:
    if rung == "fused" and (reason := why_no_kernels(setting.device)):
        raise ImportError(reason)

    def scan(x, delta, A, B, C, D, z, delta_bias):
        return selective_scan(x, delta, A, B, C, D, z, delta_bias=delta_bias, delta_softplus=True, rung=rung)

    return Side(f"minijamba {rung}", scan)


def mamba_ssm(setting: Setting) -> Side:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def scan(x, delta, A, B, C, D, z, delta_bias):
        return selective_scan_fn(x, delta, A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=True)

    return Side("mamba-ssm", scan, time_last, frozenset({"mamba_ssm"}))


def mambapy(setting: Setting) -> Side:
    from mambapy.mamba import MambaBlock

    def scan(x, delta, A, B, C, D, z, delta_bias):
        return MambaBlock.selective_scan(None, x, F.softplus(delta + delta_bias), A, B, C, D) * F.silu(z)

    return Side("mambapy", scan)


def transformers(name: str, setting: Setting, compiled: bool = False, **path) -> Side:
    """The scan of its Jamba: a loop, or mambapy's pscan, or (only inside torch.compile) torch's associative scan."""
    from transformers import logging
    from transformers.models.jamba.modeling_jamba import mamba_selective_scan

    if path.get("use_mambapy"):
        import mambapy  # noqa: F401  (without it transformers runs its loop)

    logging.set_verbosity_error()
    own = inspect.unwrap(mamba_selective_scan)  # where mamba-ssm is installed, the wrapper calls that

    def scan(x, delta, A, B, C, D, z, delta_bias):
        return own(x, delta, A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=True, **path)

    return Side(name, torch.compile(scan, dynamic=False) if compiled else scan, time_last, compiled=compiled)


def arguments(setting: Setting, batch: int, steps: int) -> dict[str, Tensor]:
    """Random activations and a memory of a hundred steps. What a layer keeps in float32 is float32."""
    channels, states = setting.sizes["channels"], setting.sizes["states"]
    normal, device = setting.normals(), setting.device
    return {
        "x": normal(batch, steps, channels),
        "delta": normal(batch, steps, channels),
        "A": -torch.arange(1.0, states + 1, device=device).repeat(channels, 1),
        "B": normal(batch, steps, states),
        "C": normal(batch, steps, states),
        "D": torch.ones(channels, device=device),
        "z": normal(batch, steps, channels),
        "delta_bias": normal(channels, dtype=torch.float32) - 4.6,
    }


def least(setting: Setting, batch: int, steps: int) -> dict[str, int]:
    """Reading x, delta, z, B and C once and writing y once; one exponential a state and step."""
    channels, states = setting.sizes["channels"], setting.sizes["states"]
    tokens = batch * steps
    return {
        "bytes": tokens * (4 * channels + 2 * states) * setting.dtype.itemsize,
        "exponentials": tokens * channels * states,
    }


LOOP, PSCAN = "transformers", "transformers, mambapy"
COMPILED = "transformers, associative scan, compiled"
SHORT = [(1, 2048), (8, 2048), (1, 8192)]
LONG = [(1, 32768), (1, 65536), (1, 131072), (1, 262144)]
TRAINING = [*SHORT, LONG[0]]

SCAN = Component(
    name="scan",
    help="the selective scan, beside transformers, mambapy and mamba-ssm",
    plans={
        "cpu": Plan(
            dtype="float32",
            repeats=7,
            sizes={"channels": 256, "states": 16},
            sides=["minijamba parallel", "minijamba naive", "mambapy", LOOP, PSCAN, COMPILED],
            cases={
                "forward": [(1, 512), (1, 2048), (1, 8192)],
                "forward + backward": [(1, 2048)],
                "peak memory": [(1, 8192)],
            },
        ),
        # Without transformers' own ways: its loop launches several kernels a step, which takes seconds here, and with
        # gradients minutes; the others keep all states, 16 GiB for each of several copies at 32768 steps.
        "cuda": Plan(
            dtype="bfloat16",
            repeats=30,
            sizes={"channels": 8192, "states": 16},
            sides=["minijamba fused", "mamba-ssm"],
            cases={
                "forward": [*SHORT, *LONG],
                "floor of forward": [*SHORT, *LONG],
                "forward in a row": [(1, 2048), *LONG],
                "forward + backward": TRAINING,
                "forward + backward in a row": TRAINING,
                "peak memory of forward + backward": TRAINING[1:],
                "error of forward + backward": [(2, 257)],
            },
        ),
    },
    sides={
        **{f"minijamba {rung}": partial(ours, rung) for rung in ("fused", "parallel", "naive")},
        "mamba-ssm": mamba_ssm,
        "mambapy": mambapy,
        LOOP: partial(transformers, LOOP),
        PSCAN: partial(transformers, PSCAN, use_mambapy=True),
        COMPILED: partial(transformers, COMPILED, compiled=True, use_associative_scan=True),
    },
    reference=partial(ours, "naive"),
    arguments=arguments,
    least=least,
)
