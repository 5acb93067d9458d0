"""The whole Mamba mixer beside transformers' Jamba with the same weights: a sequence at once, and token by token."""

from functools import partial

import torch
from torch import Tensor

from ..cache import Cache, Layout
from ..config import JambaConfig
from ..mamba import Mamba
from ..rungs import use_rung, why_no_kernels
from .measure import PEERS, Component, Plan, Setting, Side


def config(setting: Setting) -> JambaConfig:
    sizes = setting.sizes
    return JambaConfig(
        hidden_size=sizes["hidden"],
        mamba_d_state=sizes["states"],
        mamba_dt_rank=sizes["rank"],
        mamba_d_conv=sizes["width"],
        num_hidden_layers=1,
        num_attention_heads=1,  # of which it has none
        num_key_value_heads=1,
    )


def mamba(setting: Setting) -> Mamba:
    """A mixer in float32 whose weights the setting's dtype holds exactly: others keep fewer of them in float32."""
    devices = [setting.device] if setting.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.device(setting.device):
        torch.manual_seed(0)
        mixer = Mamba(config(setting)).requires_grad_(False)
    for weight in mixer.parameters():
        weight.copy_(weight.to(setting.dtype))
    return mixer


def ours(rung: str, setting: Setting, dtype: torch.dtype | None = None) -> Side:
    if rung == "fused" and (reason := why_no_kernels(setting.device)):
        raise ImportError(reason)
    dtype = dtype or setting.dtype
    mixer = mamba(setting).to(dtype)

    def run(x, memory=None):
        with use_rung(rung):
            return mixer(x, Layout(), memory)

    def decoder(prompt):
        (memory,) = Cache(config(setting), len(prompt), dtype=dtype, device=setting.device).layers
        run(prompt, memory)
        return lambda token: run(token, memory)

    return Side(f"minijamba {rung}", run, decoder=decoder)


def transformers(name: str, packages: tuple[str, ...], setting: Setting) -> Side:
    """It takes the kernels of `packages` by itself, if they can be imported, when its Jamba is."""
    from importlib import import_module

    for package in packages:
        import_module(package)
    import transformers
    from transformers.models.jamba.modeling_jamba import JambaMambaMixer

    transformers.logging.set_verbosity_error()
    jamba = transformers.JambaConfig(**config(setting).to_dict())
    with torch.device(setting.device):
        mixer = JambaMambaMixer(jamba, 0).to(setting.dtype).requires_grad_(False)
    mixer.load_state_dict(mamba(setting).state_dict())

    def decoder(prompt):
        memory = transformers.DynamicCache(config=jamba)
        mixer(prompt, cache_params=memory)
        return lambda token: mixer(token, cache_params=memory)

    return Side(name, mixer, packages=frozenset(packages), decoder=decoder)


def arguments(setting: Setting, batch: int, steps: int) -> dict[str, Tensor]:
    return {"x": setting.normals()(batch, steps, setting.sizes["hidden"])}


KERNELS, LOOP = "transformers, mamba-ssm, causal-conv1d", "transformers without kernels"
DECODE = [(1, 64), (64, 64)]

MIXER = Component(
    name="mixer",
    help="the whole Mamba mixer, beside transformers' with mamba-ssm and causal-conv1d",
    plans={
        "cpu": Plan(
            dtype="float32",
            repeats=7,
            sizes={"hidden": 128, "states": 16, "rank": 8, "width": 4},
            sides=["minijamba parallel", "minijamba naive", LOOP],
            cases={"forward": [(1, 512), (1, 2048)], "decode step": DECODE},
        ),
        "cuda": Plan(
            dtype="bfloat16",
            repeats=30,
            sizes={"hidden": 4096, "states": 16, "rank": 256, "width": 4},
            sides=["minijamba fused", KERNELS],
            cases={
                "forward": [(1, 8192), (8, 2048)],
                "decode step": DECODE,
                "decode step in a row": DECODE,
                "error of forward": [(2, 257)],
                "decode step in a CUDA graph": DECODE,
            },
        ),
    },
    sides={
        **{f"minijamba {rung}": partial(ours, rung) for rung in ("fused", "parallel", "naive")},
        KERNELS: partial(transformers, KERNELS, PEERS),
        LOOP: partial(transformers, LOOP, ()),
    },
    reference=partial(ours, "naive", dtype=torch.float64),
    arguments=arguments,
    is_layer=True,
)
