"""Checkpoints go both ways between minijamba and transformers, with equal logits and no tensor missing or left over."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, JambaForCausalLM

import minijamba as mj
from minijamba import checkpoint
from minijamba.families import FAMILIES, rename
from minijamba.testing import assert_matches, assert_rejects

# Both run in float32 and add the same numbers in another order: a few units in the last place (6e-8) for each of the
# some twenty operations that a value passes through.
FLOAT32 = 1e-5
# A product rounded to 8 bits is off by 2e-3; the two round at other places, some fifty times on the way.
BFLOAT16 = 3e-2

BASE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_layer_period": 4,
    "attn_layer_offset": 2,
    "num_experts": 4,
    "mamba_d_state": 8,
    "mamba_dt_rank": 6,
    # Their plain code: the fast paths are other programs, and refuse some widths.
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}
CHANGES = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "one expert": {"num_experts": 1},
    "no convolution bias": {"mamba_conv_bias": False},
    "projection bias": {"mamba_proj_bias": True},
}
SHARDS = [pytest.param("20KB", id="shards"), pytest.param("5GB", id="one file")]
TOKENS = torch.randint(1, BASE["vocab_size"], (2, 19), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def make(long_memory):
    """make(field=value, ...): a tiny model of transformers with random weights and a long memory."""

    def build(**changes) -> JambaForCausalLM:
        return long_memory(JambaForCausalLM(transformers.JambaConfig(**BASE | changes))).eval()

    return build


def load_here(folder: Path, **arguments) -> mj.Jamba:
    return mj.load(folder, device="cpu", **arguments)


def load_in_transformers(folder: Path, **arguments) -> JambaForCausalLM:
    """AutoModelForCausalLM on a folder; AssertionError if its report names any tensor."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", experts_implementation="eager", **arguments
    )
    assert not any(report.values()), report
    return model.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    if isinstance(model, mj.Jamba):
        return model(TOKENS)
    return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("shard_size", SHARDS)
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_a_checkpoint_of_transformers_loads_here(make, tmp_path, changes, shard_size):
    theirs = make(**changes)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (shard_size == "20KB")

    def check(load):
        assert_matches(logits(load(tmp_path)), logits(theirs), FLOAT32, "logits")

    def gate_and_up_swapped(folder):
        model = load_here(folder)
        for layer in model.model.layers:
            part = getattr(layer.feed_forward, "experts", layer.feed_forward)
            part.gate_proj, part.up_proj = part.up_proj, part.gate_proj
        return model

    def taps_from_newest_to_oldest(folder):
        model = load_here(folder)
        for layer in model.model.layers:
            if hasattr(layer, "mamba"):
                layer.mamba.conv1d.weight.data = layer.mamba.conv1d.weight.data.flip(-1)
        return model

    check(load_here)
    assert_rejects(check, gate_and_up_swapped, taps_from_newest_to_oldest)


@pytest.mark.parametrize("shard_bytes", [20_000, 5_000_000_000], ids=["shards", "one file"])
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_a_checkpoint_of_ours_loads_in_transformers(make, tmp_path, changes, shard_bytes):
    theirs = make(**changes)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_here(tmp_path / "theirs")
    mj.save(ours, tmp_path / "ours", shard_bytes=shard_bytes)
    again = load_in_transformers(tmp_path / "ours")
    for name, parameter in theirs.named_parameters():
        assert_matches(again.get_parameter(name), parameter, 0, name)
    assert_matches(logits(again), logits(ours), FLOAT32, "logits")
    assert_matches(logits(again), logits(theirs), 0, "logits")


def test_both_write_the_same_tensors(make, tmp_path):
    make().save_pretrained(tmp_path / "theirs")
    mj.save(load_here(tmp_path / "theirs"), tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert_matches(ours, theirs, 0, "file")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_both_ways(make, tmp_path, dtype):
    # All experts: which of two nearly equal ones is chosen would hang on the rounding.
    theirs = make(num_experts_per_tok=4).to(dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_here(tmp_path / "theirs")
    assert ours.dtype == dtype and ours.model.layers[0].mamba.A_log.dtype == torch.float32
    assert_matches(logits(ours), logits(theirs), BFLOAT16, "logits")
    mj.save(ours, tmp_path / "ours")
    again = load_in_transformers(tmp_path / "ours")
    for name, parameter in theirs.named_parameters():
        assert again.get_parameter(name).dtype == dtype
        assert_matches(again.get_parameter(name), parameter, 0, name)
    # In float32 nothing hides behind the rounding.
    wide = load_in_transformers(tmp_path / "ours", dtype=torch.float32)
    assert_matches(logits(load_here(tmp_path / "theirs", dtype="float32")), logits(wide), FLOAT32, "logits")


def test_the_report_of_transformers_tells_wrong_files(make, tmp_path):
    make().save_pretrained(tmp_path / "theirs")
    mj.save(load_here(tmp_path / "theirs"), tmp_path / "ours")
    file = tmp_path / "ours" / "model.safetensors"
    whole = load_file(file)

    def check(tensors):
        save_file(tensors, file, metadata={"format": "pt"})
        load_in_transformers(tmp_path / "ours")

    check(whole)
    without_D = {name: tensor for name, tensor in whole.items() if name != "model.layers.0.mamba.D"}
    older_norm = {name.replace("b_layernorm", "B_layernorm"): tensor for name, tensor in whole.items()}
    assert_rejects(check, without_D, whole | {"model.layers.0.mamba.E": torch.ones(2)}, older_norm)


def test_first_release_names_convert_to_what_transformers_loads(make, tmp_path):
    theirs = make()
    theirs.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}  # not mapped to the old file
    old = {rename(name, FAMILIES["jamba"].older): tensor for name, tensor in tensors.items()}
    assert "model.layers.0.moe.experts.0.gate_proj.weight" in old and "model.layers.1.moe.router.weight" in old
    save_file(old, file)
    checkpoint.convert(tmp_path / "theirs", tmp_path / "ours")
    assert_matches(logits(load_in_transformers(tmp_path / "ours")), logits(theirs), 0, "logits")
