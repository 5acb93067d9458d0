"""The configuration: schedule, presets, config.json in and out, and what it refuses."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minijamba.config import PRESETS, JambaConfig, Layer, preset
from minijamba.families import FAMILIES
from minijamba.testing import assert_rejects

DATA = Path(__file__).parents[1] / "data"
RELEASED = sorted(file.stem for file in (DATA / "configs").glob("*.json"))


def layers_v01():
    """Jamba-v0.1 layer by layer: attention at 4, 12, 20, 28, experts at odd layers, as in the paper's figure 1."""
    return [
        ("attention" if i in (4, 12, 20, 28) else "mamba", "moe" if i in range(1, 32, 2) else "mlp") for i in range(32)
    ]


def test_schedule_of_the_released_model():
    config = preset("jamba-v0.1")

    def check(schedule):
        assert schedule(config) == " ".join(["m+ mE m+ mE A+ mE m+ mE"] * 4)

    def counted_from_one(config):
        return dataclasses.replace(config, attn_layer_offset=3, expert_layer_offset=0).schedule

    def experts_with_attention(config):
        return config.schedule.replace("A+", "AE")

    check(lambda config: config.schedule)
    assert_rejects(check, counted_from_one, experts_with_attention)
    assert list(config.layers) == layers_v01()
    assert config.layers[4] == Layer("attention", "mlp")


@pytest.mark.parametrize(
    ("name", "attention", "experts"),
    [
        ("jamba-1.5-large", range(4, 72, 8), range(1, 72, 2)),
        ("jamba-reasoning-3b", [7, 21], []),
        ("jamba-tiny-dev", [4, 12], range(1, 16, 2)),
        ("jamba-tiny-random", [2, 6], range(1, 8, 2)),
        ("tiny", [4], range(1, 8, 2)),
        ("tour", [4], range(1, 8, 2)),
    ],
)
def test_schedule_of_each_preset(name, attention, experts):
    layers = preset(name).layers
    assert [i for i, layer in enumerate(layers) if layer.mixer == "attention"] == list(attention)
    assert [i for i, layer in enumerate(layers) if layer.feed_forward == "moe"] == list(experts)


def test_schedules_without_one_of_the_parts():
    """The examples of the docstring, read from it."""
    examples = re.findall(r"^ +((?:\w+=\d+(?:, )?)+) +\"([mA+E ]+)\"", JambaConfig.__doc__, re.MULTILINE)
    assert len(examples) == 4
    for fields, schedule in examples:
        changes = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", fields)}
        base = {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2}
        assert JambaConfig(**base).schedule == "m+ mE A+ mE"
        assert JambaConfig(**{**base, **changes}).schedule == schedule


def test_derived_sizes():
    config = preset("jamba-1.5-large")
    assert (config.head_dim, config.d_inner, config.mamba_dt_rank) == (128, 16384, 512)
    assert JambaConfig(hidden_size=40, num_attention_heads=8).mamba_dt_rank == 3, "ceil(40 / 16)"


def test_stop_tokens():
    assert JambaConfig().stop_tokens == (2,)
    assert JambaConfig(eos_token_id=[2, 518]).stop_tokens == (2, 518)
    assert JambaConfig(eos_token_id=None).stop_tokens == ()


def test_a_config_is_a_value():
    assert len({preset("jamba-1.5-mini"), JambaConfig(eos_token_id=[2, 518])}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("tiny").hidden_size = 64


def test_preset_changes_resolve_the_rank_of_delta_again():
    assert preset("tiny", hidden_size=64).mamba_dt_rank == 4
    assert dataclasses.replace(preset("tiny"), hidden_size=64).mamba_dt_rank == 2


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="'jamba-2'.*jamba-v0.1.*tour"):
        preset("jamba-2")


@pytest.mark.parametrize("name", RELEASED)
def test_released_file_gives_the_preset(name):
    assert JambaConfig.from_json(DATA / "configs" / f"{name}.json") == preset(name)


def test_every_released_preset_has_a_file():
    assert [name for name in sorted(PRESETS) if name not in ("tiny", "tour", "small")] == RELEASED


def test_sizes_and_checksums_in_the_data_readme():
    def check(read):
        rows = re.findall(r"^\| (configs/\S+) \|.*\| (\d+) \| (\w{64}) \|$", (DATA / "README.md").read_text(), re.M)
        assert {Path(name).stem for name, _, _ in rows} == set(RELEASED)
        for name, size, checksum in rows:
            content = read(DATA / name)
            assert (len(content), hashlib.sha256(content).hexdigest()) == (int(size), checksum), name

    def one_more_newline(file):
        return file.read_bytes() + b"\n"

    check(Path.read_bytes)
    assert_rejects(check, one_more_newline)


# transformers as the judge


def reference(folder):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def write(folder, values):
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def same_meaning(ours, theirs):
    fields = FAMILIES["jamba"].fields.keys() - {"eos_token_id"}
    for name in fields:
        assert getattr(theirs, name) == getattr(ours, name), name
    eos = theirs.eos_token_id
    assert (tuple(eos) if isinstance(eos, list) else eos) == ours.eos_token_id
    assert str(theirs.dtype) == f"torch.{ours.dtype}"
    assert theirs.layers_block_type == [layer.mixer for layer in ours.layers]
    assert [experts > 1 for experts in theirs.layers_num_experts] == [
        layer.feed_forward == "moe" for layer in ours.layers
    ]


@pytest.mark.parametrize("name", [name for name in PRESETS if preset(name).family.name == "jamba"])
def test_round_trip_through_transformers(name, tmp_path):
    config = preset(name)
    theirs = reference(write(tmp_path, config.to_dict()))
    same_meaning(config, theirs)
    theirs.save_pretrained(tmp_path)
    assert JambaConfig.from_json(tmp_path) == config


def test_the_round_trip_would_notice_a_change(tmp_path):
    def check(spoil):
        same_meaning(preset("tiny"), reference(write(tmp_path, spoil(preset("tiny").to_dict()))))

    def no_padding_token(values):
        return values | {"pad_token_id": None}

    def experts_left_out(values):
        return {name: value for name, value in values.items() if name != "num_experts"}

    def later_attention(values):
        return values | {"attn_layer_offset": 5}

    def other_dtype(values):
        return values | {"torch_dtype": "float16"}

    check(dict)
    assert_rejects(check, no_padding_token, experts_left_out, later_attention, other_dtype)


def test_absent_fields_take_the_defaults_of_transformers():
    from transformers import JambaConfig as Reference

    same_meaning(JambaConfig.from_dict({"model_type": "jamba"}), Reference(dtype="bfloat16"))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_schedule_means_the_same_to_transformers(data):
    from transformers import JambaConfig as Reference

    fields = {"num_hidden_layers": data.draw(st.integers(1, 20)), "num_experts": data.draw(st.sampled_from([1, 2, 16]))}
    for kind in ("attn", "expert"):
        period = fields[f"{kind}_layer_period"] = data.draw(st.integers(1, 24))
        fields[f"{kind}_layer_offset"] = data.draw(st.integers(0, period - 1))
    config = JambaConfig(**fields)
    same_meaning(config, Reference.from_dict(config.to_dict()))
    assert JambaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# Files of other writers


def test_unknown_fields_are_ignored():
    values = preset("tiny").to_dict() | {"use_mamba_kernels": True, "num_logits_to_keep": 1, "auto_map": {"a": "b"}}
    assert JambaConfig.from_dict(values) == preset("tiny")


def test_names_of_the_first_release():
    values = {"architectures": ["JambaForCausalLM"], "n_ctx": 4096, "mamba_inner_layernorms": True}
    assert JambaConfig.from_dict(values | {"calc_logits_for_entire_prompt": False}).max_position_embeddings == 4096


def test_names_of_later_writers():
    values = {"model_type": "jamba", "dtype": "float16", "num_local_experts": 4, "num_key_value_heads": None}
    config = JambaConfig.from_dict(values)
    assert (config.dtype, config.num_experts, config.num_key_value_heads) == ("float16", 4, 32)


def test_file_or_folder(tmp_path):
    write(tmp_path, preset("tour").to_dict())
    assert JambaConfig.from_json(tmp_path) == JambaConfig.from_json(str(tmp_path / "config.json")) == preset("tour")


# Refusals: each names both values and the remedy


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attn_layer_offset": 8}, "attn_layer_offset 8 is not below attn_layer_period 8.*0 to 7"),
        ({"expert_layer_offset": 2}, "expert_layer_offset 2 is not below expert_layer_period 2.*0 to 1"),
        ({"num_attention_heads": 24}, "hidden_size 4096.*num_attention_heads 24: change"),
        ({"num_key_value_heads": 5}, "num_attention_heads 32.*num_key_value_heads 5: change"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok 5 is above num_experts 4"),
        ({"hidden_act": "relu"}, "hidden_act.*relu.*silu, gelu"),
        ({"dtype": "float8"}, "dtype.*float8.*float32, bfloat16, float16"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0.*at least 1"),
        ({"attn_layer_offset": -1}, "attn_layer_offset is -1.*at least 0"),
        ({"hidden_size": 4096.0}, "hidden_size is 4096.0.*whole number"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'.*whole number"),
        ({"vocab_size": True}, "vocab_size is True.*whole number"),
        ({"mamba_conv_bias": 1}, "mamba_conv_bias is 1.*true or false"),
        ({"mamba_dt_rank": 0}, 'mamba_dt_rank is 0.*"auto"'),
        ({"mamba_dt_rank": "full"}, "mamba_dt_rank is 'full'.*\"auto\""),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0.*such as 1e-06"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"vocab_size": 100, "eos_token_id": [2, 518]}, "eos_token_id is 518.*vocab_size 100.*0 to 99"),
        ({"pad_token_id": -1}, "pad_token_id is -1.*vocab_size 65536"),
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        JambaConfig(**fields)


def test_top_k_means_nothing_without_experts():
    assert JambaConfig(num_experts=1, num_experts_per_tok=2).schedule.count("E") == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "zamba"}, "model_type is 'zamba'.*jamba"),
        ({"architectures": ["ZambaForCausalLM"]}, "architectures is .*ZambaForCausalLM.*JambaForCausalLM"),
        ({"model_type": "jamba", "hidden_act": "gelu"}, 'hidden_act is "gelu".*"silu"'),
        ({"architectures": ["JambaForSequenceClassification"]}, "language-model head"),
        ({"hidden_size": 64}, "model_type and architectures are absent"),
        ({"model_type": "jamba", "sliding_window": 4096}, "sliding_window is 4096.*null"),
        ({"model_type": "jamba", "mamba_inner_layernorms": False}, "mamba_inner_layernorms is false.*true"),
        ({"model_type": "jamba", "head_dim": 64}, "head_dim is 64.*hidden_size 4096.*num_attention_heads 32.*128"),
        ({"model_type": "jamba", "dtype": "float32", "torch_dtype": "float16"}, "torch_dtype.*float16.*dtype.*float32"),
    ],
)
def test_other_models_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        JambaConfig.from_dict(values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ('{"model_type": "jamba",', "is not JSON"),
        ("\ud800".encode("utf-8", "surrogatepass"), "is not JSON"),
        ('["jamba"]', "holds a JSON list"),
        ("{}", "model_type and architectures are absent"),
        ('{"model_type": "jamba", "hidden_size": 10}', "hidden_size 10.*num_attention_heads 32"),
    ],
)
def test_bad_files_are_named(content, message, tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=message) as error:
        JambaConfig.from_json(tmp_path)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="config.json does not exist: give"):
        JambaConfig.from_json(tmp_path)
    with pytest.raises(ValueError, match="nowhere does not exist: give"):
        JambaConfig.from_json(tmp_path / "nowhere")
