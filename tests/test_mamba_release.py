"""Mamba as its authors released it: a pickle, their own names in config.json, a padded vocabulary and a tied head."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from refusals import assert_names, refusal
from safetensors.torch import load_file, save_file
from torch import Tensor

import minijamba as mj
from minijamba import checkpoint
from minijamba.testing import assert_matches, assert_rejects

# 45 tokens, padded to a multiple of 8: 48 rows.
CONFIG = {
    "d_model": 20, "n_layer": 3, "vocab_size": 45, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
    "fused_add_norm": True, "pad_vocab_size_multiple": 8,
}  # fmt: skip
SIZES = {"d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": 2}  # where ssm_cfg is silent
TOKENS = torch.tensor([[7, 41, 0, 0, 19, 3, 7, 7, 26, 44, 11, 3, 30], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]])
ROWS = 48
# float32 through three layers, in another order of sums.
FLOAT32 = 1e-5


def random_state(config: dict = CONFIG, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A released state dict with a memory of a hundred tokens, and nothing at its usual start."""
    d, ssm = config["d_model"], SIZES | config["ssm_cfg"]
    c, n, r = ssm["expand"] * d, ssm["d_state"], ssm["dt_rank"]
    mixer = {
        "in_proj.weight": (2 * c, d), "conv1d.weight": (c, 1, ssm["d_conv"]), "conv1d.bias": (c,),
        "x_proj.weight": (r + 2 * n, c), "dt_proj.weight": (c, r), "dt_proj.bias": (c,), "A_log": (c, n), "D": (c,),
        "out_proj.weight": (d, c),
    }  # fmt: skip
    shapes = {"backbone.embedding.weight": (ROWS, d)}
    for i in range(config["n_layer"]):
        shapes[f"backbone.layers.{i}.norm.weight"] = (d,)
        shapes |= {f"backbone.layers.{i}.mixer.{name}": shape for name, shape in mixer.items()}
    shapes["backbone.norm_f.weight"] = (d,)
    generator = torch.Generator().manual_seed(0)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        if name.endswith("A_log"):
            return torch.arange(1.0, n + 1).log() + 0.1 * noise
        if "norm" in name or name.endswith(".D"):
            return 1 + 0.2 * noise
        if name.endswith("dt_proj.bias"):
            return -4.6 + 0.3 * noise
        return noise if "embedding" in name else 0.3 * noise if name.endswith("bias") else noise * shape[-1] ** -0.5

    state = {name: draw(name, shape).to(dtype) for name, shape in shapes.items()}
    return state | {"lm_head.weight": state["backbone.embedding.weight"]}


def write(folder: Path, config: dict = CONFIG, state: dict[str, Tensor] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(state or random_state(config), folder / "pytorch_model.bin")
    return folder


def write_for_transformers(folder: Path, config: dict = CONFIG, state: dict[str, Tensor] | None = None) -> Path:
    """The same model as transformers would hold it."""
    state, ssm = state or random_state(config), SIZES | config["ssm_cfg"]
    folder.mkdir(exist_ok=True)
    values = {
        "architectures": ["MambaForCausalLM"], "model_type": "mamba", "hidden_size": config["d_model"],
        "num_hidden_layers": config["n_layer"], "vocab_size": ROWS, "state_size": ssm["d_state"],
        "conv_kernel": ssm["d_conv"], "expand": ssm["expand"], "intermediate_size": ssm["expand"] * config["d_model"],
        "time_step_rank": ssm["dt_rank"], "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
        "residual_in_fp32": True, "torch_dtype": "float32", "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    named = {name.replace("embedding.", "embeddings."): tensor.clone() for name, tensor in state.items()}
    named.pop("lm_head.weight")
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
def logits(model) -> Tensor:
    result = model(TOKENS)
    return result if isinstance(result, Tensor) else result.logits


SSM = {
    "defaults": {},
    "named": {"layer": "Mamba1"},
    "other sizes": {"d_state": 5, "d_conv": 3, "expand": 3, "dt_rank": 4},
}


@pytest.mark.parametrize("case", SSM)
def test_a_release_is_the_same_weights_in_transformers_layout(tmp_path, case):
    config = CONFIG | {"ssm_cfg": SSM[case]}
    released = mj.load(write(tmp_path / "released", config), device="cpu")
    same = write_for_transformers(tmp_path / "same", config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(same).eval()
    assert released.config == mj.load(same, device="cpu").config
    assert released.config.vocab_size == ROWS and released.config.schedule == "m- m- m-"
    assert released.config.mamba_dt_rank == (SIZES | SSM[case])["dt_rank"]

    def check(folder):
        assert_matches(logits(released), logits(mj.load(folder, device="cpu")), 0, "logits")
        assert_matches(logits(released), logits(theirs), FLOAT32, "transformers")

    check(same)
    for ending in ("layers.1.mixer.conv1d.bias", "layers.2.mixer.D", "layers.0.norm.weight", "norm_f.weight"):
        state = random_state(config)
        state[f"backbone.{ending}"] = torch.zeros_like(state[f"backbone.{ending}"])
        assert_rejects(check, write_for_transformers(tmp_path / "wrong", config, state))


def test_decoding_and_padding_are_those_of_the_whole_text(tmp_path):
    model = mj.load(write(tmp_path / "released"), device="cpu", dtype="float64")
    expected = logits(model)

    def check(new_cache, mask):
        cache, parts = model.new_cache(2), []
        with torch.no_grad():
            for part in TOKENS.split([5, 1, 1, 6], dim=1):
                parts.append(model(part, cache=new_cache() if new_cache else cache))
            tokens = torch.cat([torch.full((2, 3), 9), TOKENS], dim=1)
            padded = model(tokens, mask=mask)[:, 3:]
        # float64, the same sums in another order.
        assert_matches(torch.cat(parts, dim=1), expected, 1e-12, "cached")
        assert_matches(padded, expected, 1e-12, "padded")

    mask = (torch.arange(16) >= 3).expand(2, -1)
    check(None, mask)
    assert_rejects(lambda arguments: check(*arguments), (lambda: model.new_cache(2), mask), (None, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_converted_release_is_read_by_transformers(tmp_path, dtype):
    released = write(tmp_path / "released", state=random_state(dtype=dtype))
    checkpoint.convert(released, tmp_path / "converted")
    mj.save(mj.load(released, device="cpu"), tmp_path / "saved")
    expected = logits(mj.load(released, device="cpu", dtype="float32"))

    def check(state, folder):
        stored = load_file(folder / "model.safetensors")
        names = {name.replace("embedding.", "embeddings.") for name in state} - {"lm_head.weight"}
        assert stored.keys() == names
        for name, tensor in state.items():
            if name != "lm_head.weight":
                assert_matches(stored[name.replace("embedding.", "embeddings.")], tensor, 0, name)
        theirs = transformers.MambaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert_matches(logits(theirs), expected, FLOAT32, "transformers")
        assert_matches(logits(mj.load(folder, device="cpu", dtype="float32")), expected, 0, "loaded again")

    state = random_state(dtype=dtype)
    for name in ("converted", "saved"):
        folder = tmp_path / name
        check(state, folder)
        values = json.loads((folder / "config.json").read_text())
        assert values["model_type"] == "mamba" and values["vocab_size"] == ROWS
        assert values["torch_dtype"] == str(dtype).removeprefix("torch.")
    wrong = state | {"backbone.layers.1.mixer.D": torch.ones(40, dtype=dtype)}
    assert_rejects(lambda state: check(state, tmp_path / "converted"), wrong)


def test_the_head_is_the_embedding_unless_config_json_unties_it(tmp_path):
    state = random_state()
    other = state | {"lm_head.weight": state["lm_head.weight"].flip(0)}
    absent = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    expected = logits(mj.load(write(tmp_path / "right", state=state), "cpu"))
    assert_matches(logits(mj.load(write(tmp_path / "absent", state=absent), "cpu")), expected, 0, "no head stored")

    def check(state, **changes):
        folder = write(tmp_path / "wrong", CONFIG | changes, state)
        for action in (mj.load, lambda folder: checkpoint.convert(folder, tmp_path / "converted")):
            message = refusal(action, folder)
            assert_names(message, ["pytorch_model.bin", "lm_head.weight differs from backbone.embedding", "tie_"])
        assert not (tmp_path / "converted").exists()

    check(other)
    assert_rejects(check, state, absent)
    untied = mj.load(write(tmp_path / "untied", CONFIG | {"tie_embeddings": False}, other), "cpu")
    assert not untied.config.tie_word_embeddings
    assert_matches(logits(untied), expected.flip(-1), 1e-6, "the head's own rows")
    assert_names(
        refusal(mj.load, write(tmp_path / "none", CONFIG | {"tie_embeddings": False}, absent)),
        ["no tensor lm_head.weight", "tie_word_embeddings"],
    )


def test_the_vocabulary_is_padded(tmp_path):
    """50277 tokens of the released models have 50280 rows."""
    for vocabulary, multiple, rows in ((45, 8, 48), (48, 8, 48), (41, 8, 48), (33, 16, 48), (47, 1, 47), (48, 1, 48)):
        config = mj.JambaConfig.from_dict(CONFIG | {"vocab_size": vocabulary, "pad_vocab_size_multiple": multiple})

        def check(rounded, config=config, multiple=multiple, vocabulary=vocabulary):
            assert config.vocab_size == multiple * rounded(vocabulary / multiple)

        assert config.vocab_size == rows
        check(math.ceil)
        if vocabulary % multiple:
            assert_rejects(check, math.floor)
    assert mj.JambaConfig.from_dict({"d_model": 768, "n_layer": 24, "vocab_size": 50277}).vocab_size == 50280

    def loads(**changes):
        try:
            mj.load(write(tmp_path / "released", CONFIG | changes, random_state()), "cpu")
        except ValueError as error:
            assert_names(str(error), ["backbone.embedding.weight has shape (48, 20)"])
            raise AssertionError(error) from None

    loads()
    loads(vocab_size=48)
    assert_rejects(lambda changes: loads(**changes), {"pad_vocab_size_multiple": 1}, {"vocab_size": 49})


REFUSED = {
    "Mamba-2": ({"ssm_cfg": {"layer": "Mamba2"}}, ["config.json", "ssm_cfg.layer is 'Mamba2'", "another model"]),
    "with an MLP": ({"d_intermediate": 40}, ["config.json", "d_intermediate is 40"]),
    "with attention": ({"attn_layer_idx": [1]}, ["config.json", "attn_layer_idx is [1]"]),
    "LayerNorm": ({"rms_norm": False}, ["config.json", "rms_norm is False"]),
    "another width": ({"d_model": 24}, ["pytorch_model.bin", "shape", "20"]),
    "a layer less": ({"n_layer": 2}, ["pytorch_model.bin", "backbone.layers.2.", "no place"]),
    "a layer more": ({"n_layer": 4}, ["no tensor backbone.layers.3.", "config.json"]),
    "no convolution bias": ({"ssm_cfg": {"conv_bias": False}}, ["conv1d.bias", "no place"]),
    "projection bias": ({"ssm_cfg": {"bias": True}}, ["no tensor backbone.layers.0.mixer.in_proj.bias"]),
}  # fmt: skip


def check_refused(tmp_path: Path, changes: dict, words: list[str]) -> None:
    source = write(tmp_path / "released", CONFIG | changes, random_state())
    assert_names(refusal(mj.load, source), words)
    assert_names(refusal(checkpoint.convert, source, tmp_path / "converted"), words)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("case", REFUSED)
def test_other_models_are_refused(tmp_path, case):
    check_refused(tmp_path, *REFUSED[case])
    harmless = {"d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}, "fused_add_norm": False, "ssm_cfg": {}}
    assert_rejects(lambda changes: check_refused(tmp_path, changes, []), harmless)
