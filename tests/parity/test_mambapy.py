"""Equal to mambapy (mamba.py) where the architectures coincide: the scan, the mixer with inner norms, a whole Jamba."""

import json

import pytest
import torch
import torch.nn.functional as F
from mambapy import jamba, mamba
from safetensors.torch import save_file
from torch import Tensor

import minijamba as mj
from minijamba.cache import Layout, MambaState
from minijamba.mamba import Mamba
from minijamba.testing import assert_matches, assert_rejects

FLOAT64 = 1e-12  # sums of up to 257 terms, rounded by 1e-16 each
FLOAT32 = 1e-5  # some twenty operations in a row, rounded by 6e-8 each
LENGTHS = [1, 2, 3, 63, 100, 257]


def scan_arguments(length: int) -> dict[str, Tensor]:
    """Two sequences of 6 channels with 5 states; steps of 0.01 and so a memory of a hundred tokens."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    arguments = {
        "x": normal(2, length, 6),
        "delta": F.softplus(normal(2, length, 6) - 4.6),
        "A": -torch.arange(1.0, 6, dtype=torch.float64).repeat(6, 1) * normal(6, 5).exp(),
        "B": normal(2, length, 5),
        "C": normal(2, length, 5),
        "D": normal(6),
    }
    return {name: tensor.requires_grad_() for name, tensor in arguments.items()}


def values_and_gradients(scan, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    y = scan(**arguments)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype)
    gradients = torch.autograd.grad((weights * y).sum(), list(arguments.values()))
    return {"y": y, **dict(zip(arguments, gradients, strict=True))}


@pytest.mark.parametrize("rung", ["naive", "parallel"])
@pytest.mark.parametrize("length", LENGTHS)
def test_scan_equals_their_parallel_scan(length, rung):
    arguments = scan_arguments(length)
    theirs = values_and_gradients(lambda **kw: mamba.MambaBlock.selective_scan(None, **kw), arguments)

    def check(scan):
        assert_matches(values_and_gradients(scan, arguments), theirs, FLOAT64, "scan")

    def ours(**arguments):
        return mj.selective_scan(**arguments, rung=rung)

    def without_the_skip(x, D, **others):
        return ours(x=x, D=0 * D, **others)

    def reads_with_B(B, C, **others):
        return ours(B=C, C=B, **others)

    def growing(A, **others):
        return ours(A=-A, **others)

    check(ours)
    # A single step starts from nothing: A does not matter yet, and B and C may change places.
    assert_rejects(check, without_the_skip, *([reads_with_B, growing] if length > 1 else []))


MIXERS = {
    "plain": {},
    "no convolution bias": {"conv_bias": False},
    "biases, odd widths": {"d_model": 21, "dt_rank": 7, "d_state": 5, "d_conv": 3, "expand_factor": 3, "bias": True},
}


@pytest.fixture(params=MIXERS)
def mixers(request, randomise) -> tuple[mamba.MambaBlock, Mamba]:
    sizes = {"d_model": 24, "dt_rank": 6, "d_state": 8, **MIXERS[request.param]}
    theirs = mamba.MambaBlock(mamba.MambaConfig(n_layers=1, inner_layernorms=True, **sizes))
    config = mj.JambaConfig(
        hidden_size=theirs.config.d_model,
        num_attention_heads=1,
        num_key_value_heads=1,
        rms_norm_eps=theirs.config.rms_norm_eps,
        mamba_d_state=theirs.config.d_state,
        mamba_d_conv=theirs.config.d_conv,
        mamba_expand=theirs.config.expand_factor,
        mamba_dt_rank=theirs.config.dt_rank,
        mamba_conv_bias=theirs.config.conv_bias,
        mamba_proj_bias=theirs.config.bias,
    )
    ours = Mamba(config)
    weights = randomise(theirs).state_dict()
    small = {"B_layernorm": "b_layernorm", "C_layernorm": "c_layernorm"}
    ours.load_state_dict({renamed(name, small): weight for name, weight in weights.items()})
    return theirs, ours


def renamed(name: str, new: dict[str, str]) -> str:
    for theirs, ours in new.items():
        name = name.replace(theirs, ours)
    return name


@torch.no_grad()
@pytest.mark.parametrize("length", LENGTHS)
def test_mixer(mixers, length):
    theirs, ours = mixers
    x = torch.randn(2, length, theirs.config.d_model, generator=torch.Generator().manual_seed(length))

    def check(mixer):
        assert_matches(mixer(x, Layout()), theirs(x), FLOAT32, "mixer")

    def without_inner_norms(x, layout):
        with pytest.MonkeyPatch.context() as patch:
            for norm in (ours.dt_layernorm, ours.b_layernorm, ours.c_layernorm):
                patch.setattr(norm, "forward", lambda x, norm=norm: norm.weight * x)
            return ours(x, layout)

    check(ours)
    assert_rejects(check, without_inner_norms)


@torch.no_grad()
def test_step(mixers):
    """One token at a time through both caches."""
    theirs, ours = mixers
    about = theirs.config
    x = torch.randn(2, 30, about.d_model, generator=torch.Generator().manual_seed(0))

    def check(keep):
        cache = MambaState(
            torch.zeros(2, about.d_conv - 1, about.d_inner), torch.zeros(2, about.d_inner, about.d_state)
        )
        their_cache = (None, torch.zeros(2, about.d_inner, about.d_conv - 1))
        for t in range(30):
            expected, their_cache = theirs.step(x[:, t], their_cache)
            assert_matches(ours.step(x[:, t : t + 1], cache)[:, 0], expected, FLOAT32, f"step {t}")
            keep(cache)
        assert_matches(cache.state, their_cache[0], FLOAT32, "state")

    def all_of_it(cache):
        pass

    def no_state(cache):
        cache.state.zero_()

    def window_one_late(cache):
        cache.window.copy_(cache.window.roll(1, dims=1))

    check(all_of_it)
    assert_rejects(check, no_state, window_one_late)


@torch.no_grad()
def test_whole_model_from_a_checkpoint_of_the_first_release(randomise, tmp_path):
    """mambapy kept the parameter names of Jamba's first release, which `mj.load` reads."""
    sizes = {"d_model": 32, "n_layers": 8, "mlp_size": 40, "vocab_size": 61, "dt_rank": 6, "num_experts": 4}
    config = jamba.JambaLMConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_lm_weights=False)
    theirs = randomise(jamba.JambaLM(config))
    released = {"embedding.": "model.embed_tokens.", "jamba.": "model.", "final_layernorm": "model.final_layernorm"}
    weights = {renamed(name, released): weight for name, weight in theirs.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    about = mj.JambaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        mamba_dt_rank=6,
        rms_norm_eps=config.rms_norm_eps,
        dtype="float32",
    )
    (tmp_path / "config.json").write_text(json.dumps(about.to_dict()))
    ours = mj.load(tmp_path, device="cpu")

    tokens, trace = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(0)), mj.Trace()
    logits, router_logits = theirs(tokens)
    assert_matches(ours(tokens, trace=trace), logits, FLOAT32, "logits")
    # Their dense layers report a router of one expert.
    routers = [layer.view(2, 40, 4) for layer in router_logits if layer.shape[1] == 4]
    assert_matches(trace.router, routers, FLOAT32, "router logits")
