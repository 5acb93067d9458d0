"""Families: presets as the papers count them, config.json in each layout and what it refuses, one model for all."""

import ast
import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

import minijamba as mj
from minijamba.config import PRESETS, JambaConfig, preset
from minijamba.families import FAMILIES
from minijamba.testing import assert_matches, assert_rejects

PACKAGE = Path(mj.__file__).parent

# Presets, counted as their papers and releases count them


# Name -> all parameters, those that one token uses, and GiB of keys and values of 262,144 tokens in 16 bits.
SIZES = {
    "mixtral-8x7b": (46_702_792_704, 12_879_925_248, 32),
    "mistral-7b": (7_241_732_096, 7_241_732_096, 32),
    "llama-2-7b": (6_738_415_616, 6_738_415_616, 128),
    "llama-2-13b": (13_015_864_320, 13_015_864_320, 200),
    "llama-2-70b": (68_976_648_192, 68_976_648_192, 80),
    "mamba-130m": (129_135_360, 129_135_360, 0),
    "mamba-370m": (371_516_416, 371_516_416, 0),
    "mamba-790m": (793_204_224, 793_204_224, 0),
    "mamba-1.4b": (1_372_178_432, 1_372_178_432, 0),
    "mamba-2.8b": (2_768_345_600, 2_768_345_600, 0),
    "blackmamba-1.5b": (1_458_462_072, 343.7e6, 0),
    "blackmamba-2.8b": (2_783_213_584, 628.8e6, 0),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_released_models(name):
    total, active, gibibytes = SIZES[name]

    def check(config):
        table = mj.budget(config, context=262_144, dtype="bfloat16")
        assert table.total_params == total
        # BlackMamba's active parameters are published in millions, with one decimal.
        assert table.active_params == active or round(table.active_params / 1e6, 1) * 1e6 == active
        assert table.kv_bytes == gibibytes * 2**30

    config = preset(name)
    check(config)
    wrong = [replace(config, num_hidden_layers=config.num_hidden_layers + 1), replace(config, vocab_size=50257)]
    wrong += [replace(config, tie_word_embeddings=not config.tie_word_embeddings, model_type=None)]
    if gibibytes:
        wrong += [replace(config, num_key_value_heads=config.num_key_value_heads // 2)]
    else:
        wrong += [replace(config, mamba_inner_layernorms=True), replace(config, mamba_d_state=8)]
    assert_rejects(check, *wrong)


def test_every_other_family_has_a_preset():
    assert {preset(name).family.name for name in PRESETS} == FAMILIES.keys() - {"minijamba"}
    assert SIZES.keys() == {name for name in PRESETS if preset(name).family.name != "jamba"}


def again(config: JambaConfig) -> JambaConfig:
    """Through the text of a config.json."""
    return JambaConfig.from_dict(json.loads(json.dumps(config.to_dict())))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip_through_config_json(name):
    config = preset(name)

    def check(read):
        assert read(config) == config
        assert read(config).family.name == config.family.name
        assert config.to_dict()["architectures"] == [config.family.architecture]

    def a_layer_more(config):
        return replace(again(config), num_hidden_layers=config.num_hidden_layers + 1)

    def another_first_token(config):
        return JambaConfig.from_dict(config.to_dict() | {"bos_token_id": 3})

    check(again)
    named = [family for family in FAMILIES if name.startswith(f"{family}-")]
    assert config.family.name == (named or ["jamba"])[0]
    assert_rejects(check, a_layer_more, *([] if config.family.name == "blackmamba" else [another_first_token]))


# Which layout a model is saved in


ATTENTION = {"pattern": "A+", "rope_theta": 1e4}
EXPERTS = {"pattern": "AE", "rope_theta": 1e6, "norm_topk_prob": True}
MAMBA = {"pattern": "m-", "mamba_inner_layernorms": False}
BLACK = {
    "pattern": "m- -E", "mamba_inner_layernorms": False, "hidden_act": "gelu", "router_bias": True,
    "num_experts_per_tok": 1, "tie_word_embeddings": True, "final_norm": "layer", "residual_in_fp32": True,
    "rms_norm_eps": 1e-5, "routing": "sinkhorn", "num_experts": 8,
}  # fmt: skip
LAYOUTS = {
    "jamba": [
        {},
        {"pattern": "m+ mE A+ mE"},
        {"pattern": "A+ AE"},
        {"pattern": "m+"},
        {"pattern": "m+ mE m+ AE m+ mE m+ AE", "num_hidden_layers": 8},
        {"mamba_proj_bias": True, "mamba_conv_bias": False, "tie_word_embeddings": True},
    ],
    "llama": [
        ATTENTION,
        ATTENTION | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "hidden_act": "gelu"},
        ATTENTION | {"head_width": 48, "rope_theta": 5e5},
        # Features of parts that these layers do not have say nothing.
        ATTENTION | {"norm_topk_prob": True, "mamba_inner_layernorms": False, "router_bias": True},
        {"attn_layer_period": 1, "attn_layer_offset": 0, "num_experts": 1, "rope_theta": 1e4},
    ],
    "mistral": [
        ATTENTION | {"sliding_window": 64},
        ATTENTION | {"model_type": "mistral"},
        ATTENTION | {"sliding_window": 1, "head_width": 20, "hidden_act": "gelu"},
    ],
    "mixtral": [EXPERTS, EXPERTS | {"sliding_window": 5, "num_experts": 3, "num_experts_per_tok": 1}],
    "mamba": [
        MAMBA,
        MAMBA | {"mamba_proj_bias": True, "mamba_conv_bias": False, "tie_word_embeddings": True},
        MAMBA | {"residual_in_fp32": True, "mamba_dt_rank": 3, "rope_theta": 1e4, "hidden_act": "gelu"},
    ],
    "blackmamba": [
        BLACK,
        BLACK | {"routing": "softmax", "pattern": "m- -+ m- -E"},
        BLACK | {"mamba_proj_bias": True, "mlp_bias": True, "head_bias": True},
    ],
    "minijamba": [
        {"rope_theta": 1e4},
        {"sliding_window": 64},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
        {"norm_topk_prob": True},
        {"router_bias": True},
        {"routing": "sinkhorn"},
        {"head_bias": True},
        {"final_norm": "layer"},
        {"residual_in_fp32": True},
        {"head_width": 48},
        {"mamba_inner_layernorms": False},
        {"pattern": "m+ A+ A+ mE"},
        {"pattern": "m+ A-"},
        {"pattern": "mE mE m+ mE"},
        {"model_type": "minijamba"},
        ATTENTION | {"sliding_window": 64, "attention_bias": True},
        ATTENTION | {"pattern": "A+ A-"},
        ATTENTION | {"residual_in_fp32": True},
        EXPERTS | {"norm_topk_prob": False},
        EXPERTS | {"rope_theta": None},
        EXPERTS | {"pattern": "AE A+"},
        MAMBA | {"mamba_inner_layernorms": True},
        MAMBA | {"pattern": "m- A-"},
        MAMBA | {"final_norm": "layer"},
        BLACK | {"tie_word_embeddings": False},
        BLACK | {"mlp_bias": True},
        BLACK | {"num_experts": 10},
        BLACK | {"mamba_dt_rank": 5},
        BLACK | {"rms_norm_eps": 1e-6},
        BLACK | {"num_experts_per_tok": 2},
    ],
}


def tiny(**changes) -> JambaConfig:
    """Four layers; "m+ mE A+ mE" unless changed."""
    base = {
        "vocab_size": 41, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "attn_layer_period": 4, "attn_layer_offset": 2, "num_experts": 4, "mamba_d_state": 4,
        "max_position_embeddings": 256, "dtype": "float32",
    }  # fmt: skip
    return JambaConfig(**base | changes)


CASES = [(name, changes) for name, cases in LAYOUTS.items() for changes in cases]
each_layout = pytest.mark.parametrize(("name", "changes"), CASES, ids=[f"{name} {changes}" for name, changes in CASES])


@each_layout
def test_the_layout_is_the_first_that_can_say_the_model(name, changes):
    config = tiny(**changes)
    assert config.family == FAMILIES[name]
    assert config.to_dict()["model_type"] == name
    others = [other for other in FAMILIES if FAMILIES[other].why_not(config) is None]
    assert name in others and others[-1] == "minijamba"
    assert changes.get("model_type") or others[0] == name


@each_layout
def test_a_layout_keeps_the_model(name, changes, long_memory, tmp_path):
    """Saved in it and loaded: the same tensors and logits bit for bit, and a config that stays as it is."""
    config = tiny(**changes)
    model, tokens = long_memory(mj.Jamba(config)).eval(), torch.randint(0, 41, (2, 9))
    mj.save(model, tmp_path / "model")
    loaded = mj.load(tmp_path / "model", device="cpu")
    assert loaded.config.family.name == name
    assert again(loaded.config) == loaded.config
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2]] * 2)

    @torch.no_grad()
    def check(other):
        assert_matches(dict(other.named_parameters()), dict(model.named_parameters()), 0, "parameters")
        assert_matches(other(tokens, segments=segments), model(tokens, segments=segments), 0, "logits")

    check(loaded)
    assert_rejects(check, long_memory(mj.Jamba(config), seed=1).eval())
    if name == "minijamba":
        assert loaded.config == config


EVERYTHING = {
    "pattern": "mE A- -E A+", "head_width": 10, "attention_bias": True, "rope_theta": 77.0, "sliding_window": 3,
    "mamba_inner_layernorms": False, "mamba_proj_bias": True, "mamba_conv_bias": False, "hidden_act": "gelu",
    "mlp_bias": True, "norm_topk_prob": True, "routing": "sinkhorn", "router_bias": True, "head_bias": True,
    "final_norm": "layer", "residual_in_fp32": True, "tie_word_embeddings": True, "num_experts_per_tok": 3,
    "rms_norm_eps": 0.01, "mamba_dt_rank": 5, "mamba_d_conv": 3, "mamba_expand": 3, "initializer_range": 0.5,
    "router_aux_loss_coef": 0.25, "bos_token_id": None, "eos_token_id": (3, 5), "pad_token_id": 7,
}  # fmt: skip


@torch.no_grad()
def test_what_no_family_has_comes_back_bit_for_bit(long_memory, tmp_path):
    """A model with all features at once; a file that lost any of them would give other logits, or another config."""
    model, tokens = long_memory(mj.Jamba(tiny(**EVERYTHING))).eval(), torch.arange(22).view(2, 11)
    mj.save(model, tmp_path, shard_bytes=5000)
    whole = json.loads((tmp_path / "config.json").read_text())
    assert whole["model_type"] == "minijamba" and len(list(tmp_path.glob("model-*.safetensors"))) > 5

    def check(lost):
        entries = {name: value for name, value in whole.items() if name != lost}
        (tmp_path / "config.json").write_text(json.dumps(entries))
        assert JambaConfig.from_json(tmp_path) == model.config
        loaded = mj.load(tmp_path, device="cpu")
        assert_matches(dict(loaded.named_parameters()), dict(model.named_parameters()), 0, "parameters")
        assert_matches(loaded(tokens), model(tokens), 0, "logits")

    check(None)
    usual = tiny()
    told = [name for name in EVERYTHING if getattr(usual, name) != getattr(model.config, name)]
    assert told == list(EVERYTHING)
    # Without these the others contradict each other, which is refused as it should be.
    assert_rejects(check, *(name for name in told if name not in ("num_experts", "eos_token_id")))


def test_our_own_layout_has_every_field():
    def check(names):
        assert names == {field.name for field in dataclasses.fields(JambaConfig)} - {"model_type", "dtype"}

    family = FAMILIES["minijamba"]
    assert all(ours == theirs for ours, theirs in family.fields.items())
    assert not (family.derived or family.start or family.same or family.only or family.names or family.older)
    check(family.fields.keys())
    assert_rejects(check, family.fields.keys() - {"sliding_window"}, family.fields.keys() | {"dtype"})


# A family's config.json where it is silent, with transformers as the judge


def theirs(family: str, values: dict):
    import transformers

    return getattr(transformers, f"{family.capitalize()}Config")(**values)


def same_meaning(ours: JambaConfig, reference, family: str) -> None:
    for name, their_name in FAMILIES[family].fields.items():
        if name == "rope_theta":
            assert ours.rope_theta == reference.rope_parameters["rope_theta"]
        elif hasattr(reference, their_name):
            assert getattr(ours, name) == getattr(reference, their_name), name
    if family != "mamba":
        heads = reference.num_attention_heads
        assert ours.head_dim == (reference.head_dim or reference.hidden_size // heads)
        assert ours.num_attention_heads == heads


SILENT = {
    "nothing": {},
    "no width of heads": {"head_dim": None},
    "other heads": {"hidden_size": 5120, "num_attention_heads": 40},
    "few heads": {"hidden_size": 512, "num_attention_heads": 8},
    "wide heads": {"head_dim": 160},
    "no window": {"sliding_window": None},
    "no rotation said": {"rope_scaling": None},
    "rotation said": {"rope_parameters": {"rope_type": "default", "rope_theta": 2e5}},
    "rotation without a base": {"rope_parameters": {"rope_type": "default"}},
}


@pytest.mark.parametrize("values", SILENT.values(), ids=SILENT)
@pytest.mark.parametrize("family", ["mixtral", "mistral", "llama"])
def test_silent_transformers_take_the_defaults_of_transformers(family, values):
    same_meaning(JambaConfig.from_dict({"model_type": family, **values}), theirs(family, values), family)


def test_null_key_value_heads_are_as_many_as_query_heads():
    values = {"num_key_value_heads": None, "num_attention_heads": 16}
    same_meaning(JambaConfig.from_dict({"model_type": "llama", **values}), theirs("llama", values), "llama")


@pytest.mark.parametrize("values", [{}, {"hidden_size": 1000}, {"time_step_rank": 7}, {"expand": 3}], ids=str)
def test_silent_mambas_take_the_defaults_of_transformers(values):
    same_meaning(JambaConfig.from_dict({"model_type": "mamba", **values}), theirs("mamba", values), "mamba")


def test_other_defaults_would_be_noticed():
    def check(family, changes):
        same_meaning(JambaConfig.from_dict({"model_type": family, **changes}), theirs(family, {}), family)

    for family in ("mixtral", "mistral", "llama", "mamba"):
        check(family, {})
        changes = [{"vocab_size": 50257}, {"num_hidden_layers": 24}, {"bos_token_id": 5}, {"hidden_size": 1024}]
        if family == "mamba":
            changes += [{"layer_norm_epsilon": 1e-6}, {"residual_in_fp32": False}, {"tie_word_embeddings": False}]
        else:
            changes += [{"rms_norm_eps": 0.1}, {"rope_theta": 3e4}, {"num_key_value_heads": 16}, {"pad_token_id": 0}]
        assert_rejects(lambda changes, family=family: check(family, changes), *changes)


def test_what_a_family_is_does_not_stand_in_its_file():
    """Its layers and its features, from a config.json that says nothing."""
    mixtral, mistral, llama, mamba = (
        JambaConfig.from_dict({"model_type": name}) for name in ("mixtral", "mistral", "llama", "mamba")
    )
    assert {config.schedule for config in (mistral, llama)} == {" ".join(["A+"] * 32)}
    assert mixtral.schedule == " ".join(["AE"] * 32) and mamba.schedule == " ".join(["m-"] * 32)
    assert (mixtral.norm_topk_prob, mixtral.routing, mixtral.router_bias) == (True, "softmax", False)
    assert (mixtral.sliding_window, mistral.sliding_window, llama.sliding_window) == (None, 4096, None)
    assert not mamba.mamba_inner_layernorms and mamba.final_norm == "rms"


# Two spellings of one thing

ROPE = {
    "transformers 4": {"rope_theta": 2e5, "rope_scaling": None},
    "transformers 5": {"rope_parameters": {"rope_type": "default", "rope_theta": 2e5}},
    "with both": {"rope_theta": 2e5, "rope_parameters": {"rope_type": "default", "rope_theta": 2e5}},
    "by its older name": {"rope_theta": 2e5, "rope_scaling": {"type": "default"}},
    "turning all of a head": {"rope_theta": 2e5, "partial_rotary_factor": 1.0},
}


@pytest.mark.parametrize("values", ROPE.values(), ids=ROPE)
@pytest.mark.parametrize("family", ["mixtral", "mistral", "llama"])
def test_spellings_of_rotary_positions(family, values):
    assert JambaConfig.from_dict({"model_type": family, **values}).rope_theta == 2e5


OWN = {
    "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}  # fmt: skip
MAMBAS = {"130m": (768, 24), "370m": (1024, 48), "790m": (1536, 48), "1.4b": (2048, 48), "2.8b": (2560, 64)}


@pytest.mark.parametrize("size", MAMBAS)
def test_state_spaces_own_config(size):
    width, layers = MAMBAS[size]

    def check(changes):
        values = OWN | {"d_model": width, "n_layer": layers} | changes
        assert JambaConfig.from_dict(values) == preset(f"mamba-{size}")

    check({})
    check({"ssm_cfg": {"layer": "Mamba1"}, "d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}})
    check({"tie_embeddings": True})
    assert_rejects(
        check, {"vocab_size": 50288}, {"ssm_cfg": {"d_state": 32}}, {"residual_in_fp32": False}, {"n_layer": 2},
        {"pad_vocab_size_multiple": 16}, {"tie_embeddings": False}, {"ssm_cfg": {"expand": 4}},
    )  # fmt: skip


# As state-spaces/mamba-130m-hf has it: the names of transformers, and those of state-spaces left beside them.
BOTH = {
    "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": 1536, "d_model": 768,
    "eos_token_id": 0, "expand": 2, "fused_add_norm": True, "hidden_act": "silu", "hidden_size": 768,
    "initializer_range": 0.1, "intermediate_size": 1536, "layer_norm_epsilon": 1e-05, "model_type": "mamba",
    "n_layer": 24, "num_hidden_layers": 24, "pad_token_id": 0, "pad_vocab_size_multiple": 8,
    "rescale_prenorm_residual": False, "residual_in_fp32": True, "rms_norm": True, "ssm_cfg": {}, "state_size": 16,
    "time_step_floor": 0.0001, "time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001,
    "time_step_rank": 48, "time_step_scale": 1.0, "torch_dtype": "float32", "use_bias": False, "use_cache": True,
    "use_conv_bias": True, "vocab_size": 50280,
}  # fmt: skip


def test_transformers_mamba_with_the_older_names_beside():
    assert JambaConfig.from_dict(BOTH) == preset("mamba-130m", dtype="float32")


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 50282},
        {"tie_word_embeddings": False},
        {"state_size": 8},
        {"layer_norm_epsilon": 1e-3},
        {"conv_kernel": 3},
        {"use_bias": True},
        {"eos_token_id": 2},
        {"time_step_rank": 5},
    ],
    ids=str,
)
def test_older_names_beside_do_not_hide_what_transformers_names_say(changes):
    """As after adding tokens to that model, or training one of its kind."""
    same_meaning(JambaConfig.from_dict(BOTH | changes), theirs("mamba", BOTH | changes), "mamba")


# Refusals: each names the value and the remedy


def linear(**more):
    return {"type": "linear", "factor": 2.0} | more


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5, "original_max_position_embeddings": 8192}
REFUSED = {
    "llama, scaled rotation, old name": ({"model_type": "llama", "rope_scaling": linear()}, '"linear".*default'),
    "llama, scaled rotation, later old name": (
        {"model_type": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, '"dynamic".*default',
    ),
    "llama, scaled rotation, new name": ({"model_type": "llama", "rope_parameters": LLAMA3}, '"llama3".*default'),
    "mistral, scaled rotation, new name": (
        {"model_type": "mistral", "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, '"yarn".*default',
    ),
    "mixtral, scaled rotation, old name": ({"model_type": "mixtral", "rope_scaling": linear()}, '"linear".*default'),
    "rotation that is not an object": ({"model_type": "llama", "rope_scaling": "linear"}, "linear"),
    "part of a head turned, new name": (
        {"model_type": "llama", "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "0.5",
    ),
    "part of a head turned, old name": ({"model_type": "llama", "partial_rotary_factor": 0.5}, "0.5"),
    "odd heads": (
        {"model_type": "llama", "hidden_size": 30, "num_attention_heads": 6, "num_key_value_heads": 6},
        "5 wide.*even",
    ),
    "odd heads, said": ({"model_type": "mistral", "head_dim": 7}, "7 wide.*even"),
    "llama with a window": ({"model_type": "llama", "sliding_window": 4096}, "sliding_window is 4096.*llama.*null"),
    "mistral with a bias": ({"model_type": "mistral", "attention_bias": True}, "attention_bias is true.*false"),
    "mistral with an MLP bias": ({"model_type": "mistral", "mlp_bias": True}, "mlp_bias is true.*false"),
    "mixtral with a bias": ({"model_type": "mixtral", "attention_bias": True}, "attention_bias is true.*false"),
    "mixtral with jitter": ({"model_type": "mixtral", "router_jitter_noise": 0.1}, "router_jitter_noise is 0.1.*0.0"),
    "mixtral with one expert": (
        {"model_type": "mixtral", "num_local_experts": 1, "num_experts_per_tok": 1}, "mixtral.*no layers A\\+.*change",
    ),
    "mixtral, more than all experts": (
        {"model_type": "mixtral", "num_experts_per_tok": 9}, "num_experts_per_tok 9.*num_experts 8",
    ),
    "llama, other activation": ({"model_type": "llama", "hidden_act": "gelu_new"}, "hidden_act.*gelu_new.*silu, gelu"),
    "mamba, other activation": ({"model_type": "mamba", "hidden_act": "gelu"}, 'hidden_act is "gelu".*"silu"'),
    "mamba, scaled steps": ({"model_type": "mamba", "time_step_scale": 2.0}, "time_step_scale is 2.0.*1.0"),
    "Mamba-2": (OWN | {"d_model": 64, "ssm_cfg": {"layer": "Mamba2"}}, "layer is 'Mamba2'.*'Mamba1'"),
    "Mamba-2 of transformers": ({"model_type": "mamba2"}, "model_type is 'mamba2'.*mamba"),
    "mamba with attention": (OWN | {"d_model": 64, "attn_layer_idx": [1, 3]}, r"attn_layer_idx is \[1, 3\].*\[\]"),
    "mamba with an MLP": (OWN | {"d_model": 64, "d_intermediate": 128}, "d_intermediate is 128.*0"),
    "mamba with LayerNorm": (OWN | {"d_model": 64, "rms_norm": False}, "rms_norm is False.*True"),
    "unknown family": ({"model_type": "falcon"}, "model_type is 'falcon'.*jamba.*llama.*mistral.*mixtral.*mamba.*give"),
    "unknown architecture": ({"architectures": ["FalconForCausalLM"]}, "FalconForCausalLM.*give"),
    "another head": (
        {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
        "LlamaForSequenceClassification.*language-model head.*LlamaForCausalLM.*give",
    ),
    "another family's head": (
        {"model_type": "mixtral", "architectures": ["MistralForCausalLM"]}, "MistralForCausalLM.*MixtralForCausalLM",
    ),
    "no family": ({"hidden_size": 64}, "model_type and architectures are absent.*add"),
    "rope_theta 1": ({"model_type": "llama", "rope_theta": 1}, "rope_theta is 1,.*above 1.*10000"),
    "rope_theta 0": ({"model_type": "mistral", "rope_theta": 0}, "rope_theta is 0,.*above 1"),
    "rope_theta below 1": ({"model_type": "llama", "rope_theta": 0.5}, "rope_theta is 0.5.*above 1"),
    "rope_theta without a bound": ({"model_type": "llama", "rope_theta": float("inf")}, "rope_theta is inf.*above 1"),
    "rope_theta that is no number": ({"model_type": "llama", "rope_theta": "1e4"}, "rope_theta is '1e4'.*above 1"),
    "rope_theta 1, new name": (
        {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 1.0}}, "rope_theta is 1.0",
    ),
    "window 0": ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0.*at least 1"),
    "two dtypes": (
        {"model_type": "mistral", "dtype": "float32", "torch_dtype": "float16"},
        "torch_dtype.*float16.*float32.*remove",
    ),
    "two numbers of experts": (
        {"model_type": "jamba", "num_experts": 8, "num_local_experts": 4}, "num_local_experts is 4.*8.*remove",
    ),
    "two lengths": (
        {"model_type": "jamba", "n_ctx": 8, "max_position_embeddings": 4}, "n_ctx is 8.*4.*remove",
    ),
    "two bases of the rotation": (
        {"model_type": "llama", "rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        "rope_theta.*10000.*1000000|rope_theta.*1000000.*10000",
    ),
    "two widths": (BOTH | {"hidden_size": 1024}, "1024.*768|768.*1024"),
    "two depths": (BOTH | {"num_hidden_layers": 25}, "25.*24|24.*25"),
}  # fmt: skip


@pytest.mark.parametrize("values", [values for values, _ in REFUSED.values()], ids=REFUSED)
def test_refused_files_are_named(values, request, tmp_path):
    message = REFUSED[request.node.callspec.id][1]
    with pytest.raises(ValueError, match=message):
        JambaConfig.from_dict(values)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as error:
        mj.load(tmp_path, device="cpu")
    assert str(error.value).startswith(str(tmp_path / "config.json")) and "\n" not in str(error.value)


CANNOT_HOLD = {
    "jamba, positions": ({"model_type": "jamba", "rope_theta": 1e4}, "'jamba'.*rope_theta null.*10000.*change"),
    "jamba, irregular": ({"model_type": "jamba", "pattern": "m+ A+ A+ mE"}, "'jamba'.*regular distances.*change"),
    "jamba, layers of one part": ({"model_type": "jamba", "pattern": "m- m+"}, "'jamba'.*no layers m-.*change"),
    "llama, Jamba's layers": ({"model_type": "llama"}, "'llama'.*no layers m\\+ mE.*change"),
    "llama, no positions": ({"model_type": "llama", "pattern": "A+"}, "'llama'.*rotary positions.*change"),
    "llama, window": (ATTENTION | {"model_type": "llama", "sliding_window": 3}, "'llama'.*sliding_window null.*3"),
    "mistral, bias": (ATTENTION | {"model_type": "mistral", "attention_bias": True}, "'mistral'.*attention_bias false"),
    "mixtral, not renormalised": (
        EXPERTS | {"model_type": "mixtral", "norm_topk_prob": False}, "'mixtral'.*norm_topk_prob true and not false",
    ),
    "mixtral, no experts": (ATTENTION | {"model_type": "mixtral"}, "'mixtral'.*no layers A\\+"),
    "mamba, inner norms": ({"model_type": "mamba", "pattern": "m-"}, "'mamba'.*inner_layernorms false and not true"),
    "blackmamba, untied": (
        BLACK | {"model_type": "blackmamba", "tie_word_embeddings": False}, "'blackmamba'.*tie_word_embeddings true",
    ),
    "blackmamba, other rank": (BLACK | {"model_type": "blackmamba", "mamba_dt_rank": 5}, "'blackmamba'.*rank.*5"),
    "unknown": ({"model_type": "rwkv"}, "'rwkv'.*jamba, llama, mistral.*null"),
}  # fmt: skip
PATTERNS = {
    "empty": ({"pattern": ""}, "pattern is ''.*'m\\+ mE A\\+ -E'"),
    "no text": ({"pattern": ["m+"]}, r"pattern is \['m\+'\].*must be layers such as"),
    "a letter": ({"pattern": "m+ A"}, "pattern is 'm\\+ A'.*must be layers such as"),
    "three letters": ({"pattern": "m+E"}, "pattern is 'm\\+E'.*must be"),
    "unknown mixer": ({"pattern": "r+"}, "pattern is 'r\\+'.*m Mamba, A attention"),
    "unknown feed-forward": ({"pattern": "mA"}, "pattern is 'mA'.*\\+ MLP, E experts"),
    "the wrong way round": ({"pattern": "+m"}, "pattern is '\\+m'.*must be"),
    "an empty layer": ({"pattern": "m+ --"}, "pattern is 'm\\+ --'.*must be"),
    "too long": ({"pattern": "m+ m+ m+ m+ A+"}, "pattern has 5 layers.*num_hidden_layers is 4.*change"),
    "no mixer": ({"pattern": "-+ -E"}, "pattern '-\\+ -E' has no mixer.*give a layer one"),
    "no experts": ({"pattern": "m+ mE", "num_experts": 1}, "pattern 'm\\+ mE'.*num_experts is 1.*give more, or write"),
}


@pytest.mark.parametrize(
    ("changes", "message"), [*CANNOT_HOLD.values(), *PATTERNS.values()], ids=[*CANNOT_HOLD, *PATTERNS]
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny(**changes)
    assert "\n" not in str(error.value)


def test_good_patterns_are_taken():
    for pattern, schedule in {"m+": "m+ m+ m+ m+", "m- -E A+": "m- -E A+ m-", "-+ A- mE AE": "-+ A- mE AE"}.items():
        assert tiny(pattern=pattern).schedule == schedule


def test_a_refused_change_of_family_can_be_made_without_it():
    """As the message says: without a model_type the model finds its own layout."""
    for changes, _ in CANNOT_HOLD.values():
        assert tiny(**changes | {"model_type": None}).family.name != changes["model_type"]


# One model for all families

TABLES = {"families.py", "config.py", "checkpoint.py"}
# What the parts of a layer are called, where "mamba" is one of the mixers.
PARTS = {"mixer", "feed_forward", "kind", "part", "layer", "component"}
FAMILY_WORDS = {"model_type", "family", "family_of", "architecture", "architectures"}


def names(node: ast.AST) -> set[str]:
    """Every variable, attribute and key that an expression mentions."""
    found = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name):
            found.add(inner.id)
        elif isinstance(inner, ast.Attribute):
            found.add(inner.attr)
        elif isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            found.add(inner.value)
    return found


def compared(node: ast.AST) -> tuple[ast.AST, list[ast.AST]] | None:
    """What is compared or looked up, and with what; None for any other code."""
    if isinstance(node, ast.Compare):
        return node.left, node.comparators
    if isinstance(node, ast.Match):
        return node.subject, [case.pattern for case in node.cases]
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        return node.slice, []
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in ("startswith", "endswith"):
            return node.func.value, node.args
        if node.func.attr == "get" and node.args:
            return node.args[0], []
    return None


def called(node: ast.AST) -> str | None:
    """The name that a variable or an attribute goes by."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None


@cache
def branches_on_family(source: str) -> list[str]:
    """The code that asks which family a model is of."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if (sides := compared(node)) is None:
            continue
        left, others = sides
        mentioned = names(left).union(*map(names, others))
        is_family = mentioned & FAMILY_WORDS
        names_family = mentioned & FAMILIES.keys() if others else set()
        about_parts = any(called(side) in PARTS for side in (left, *others))
        if is_family or (names_family and not about_parts):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@cache
def classes_with_a_head(source: str) -> list[str]:
    """Classes that set `lm_head` on themselves."""
    return [
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef)
        and any(
            isinstance(inner, ast.Attribute | ast.Name)
            and isinstance(inner.ctx, ast.Store)
            and called(inner) == "lm_head"
            for inner in ast.walk(node)
        )
    ]


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    """File -> text, without the student's package of the assignment, which is another program."""
    files = {str(file.relative_to(PACKAGE)): file for file in PACKAGE.rglob("*.py") if "template" not in file.parts}
    return {name: file.read_text(encoding="utf-8") for name, file in files.items()}


def plant(sources: dict[str, str], text: str) -> dict[str, str]:
    return sources | {"planted.py": text}


def refuses_each(check: Callable, sources: dict[str, str], planted: list[str]) -> None:
    for text in planted:
        assert_rejects(check, plant(sources, text))


def test_no_code_asks_for_the_family_but_the_tables(sources):
    def check(sources):
        found = {file: branches_on_family(text) for file, text in sources.items() if file not in TABLES}
        assert not any(found.values()), {file: lines for file, lines in found.items() if lines}

    assert sources.keys() >= TABLES and len(sources) > 40
    check(sources)
    planted = [
        'if config.model_type == "mamba": pass',
        'if config.model_type != "jamba": pass',
        'if config.family.name == "llama": pass',
        'if "mixtral" == name: pass',
        'if name in ("mistral", "llama"): pass',
        'if name not in {"blackmamba"}: pass',
        "if config.model_type is None: pass",
        "if model_type == wanted: pass",
        "if family.architecture == wanted: pass",
        'size = {"mamba": 1, "jamba": 2}[config.model_type]',
        'size = {"mamba": 1}.get(config.family.name)',
        'if config.model_type.startswith("black"): pass',
        'match config.model_type:\n    case "mamba": pass',
        'match name:\n    case "jamba" | "llama": pass',
        'def deep():\n    return [x for x in y if getattr(x, "model_type") == "llama"]',
    ]
    refuses_each(check, sources, planted)
    allowed = [
        'if layer.mixer == "mamba": pass',
        'if mixer == "mamba": pass',
        'match layer.mixer:\n    case "mamba": pass',
        'colour = COLOURS["mamba"]',
        'for kind in ("mamba", "attention"): pass',
        "layout = config.family",
    ]
    for text in allowed:
        check(plant(sources, text))


def test_there_is_one_model_class(sources):
    def check(sources):
        assert {file: found for file, text in sources.items() if (found := classes_with_a_head(text))} == {
            "model.py": ["Jamba"]
        }

    check(sources)
    refuses_each(
        check, sources,
        [
            "class Mamba2(nn.Module):\n    def __init__(self):\n        self.lm_head = nn.Linear(2, 2)",
            "class Llama(Jamba):\n    lm_head = None",
            "class Mixtral(nn.Module):\n    def build(self):\n        self.lm_head: nn.Module = nn.Linear(2, 2)",
        ],
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_built_by_that_class(family):
    config = tiny(**LAYOUTS[family][0])
    assert type(mj.Jamba(config)) is mj.Jamba and config.family.name == family
    assert not re.search("model_type", repr(list(mj.Jamba(config).state_dict())))


# Nothing is taken for another model


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "jamba", "rope_theta": 1e4}, ["rope_theta is 10000.0", "jamba", "null"]),
        ({"model_type": "jamba", "routing": "sinkhorn"}, ['routing is "sinkhorn"', '"softmax"']),
        ({"model_type": "jamba", "norm_topk_prob": True}, ["norm_topk_prob is true", "false"]),
        ({"model_type": "jamba", "residual_in_fp32": True}, ["residual_in_fp32 is true", "false"]),
        ({"model_type": "mixtral", "norm_topk_prob": False}, ["norm_topk_prob is false", "mixtral", "true"]),
        (
            {"model_type": "blackmamba", "mamba_moe_layers": ["r", "8"], "num_experts_per_tok": 2},
            ["num_experts_per_tok is 2", "1"],
        ),
    ],
)
def test_a_feature_that_the_family_does_not_have_is_refused(values, words):
    with pytest.raises(ValueError) as refused:
        JambaConfig.from_dict(values)
    assert re.search(".*".join(map(re.escape, words)), str(refused.value)), refused.value


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "blackmamba"},
        {"model_type": "blackmamba", "num_layers": 0},
        {"model_type": "blackmamba", "num_layers": "4"},
        {"model_type": "blackmamba", "mamba_moe_layers": 5},
        {"model_type": "blackmamba", "mamba_moe_layers": ["r"], "routing_mode": ["top1"]},
        {"model_type": ["llama"]},
        {"model_type": "llama", "head_dim": "64"},
        {"d_model": 64, "n_layer": 2, "vocab_size": "x"},
        {"d_model": 64, "n_layer": 2, "pad_vocab_size_multiple": 0},
        {"d_model": 64, "n_layer": 2, "ssm_cfg": "Mamba1"},
        {"architectures": 5},
    ],
    ids=str,
)
def test_entries_of_the_wrong_kind_are_a_sentence(values):
    with pytest.raises(ValueError, match=r"but must be|but num_layers|are absent") as refused:
        JambaConfig.from_dict(values)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="model_type is"):
        JambaConfig(model_type=["x"])


def test_special_tokens_survive_a_file():
    """The tokenizer of a model that is trained here is another than that of the release."""

    def check(tokens):
        for name in ("blackmamba-1.5b", "mamba-130m", "llama-2-7b"):
            config = preset(name, bos_token_id=1, eos_token_id=2, pad_token_id=5)
            again = JambaConfig.from_dict(config.to_dict())
            assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == tokens

    check((1, 2, 5))
    assert_rejects(check, (0, 0, 0))
