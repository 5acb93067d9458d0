"""Checkpoints: what is saved comes back bit for bit, and whatever is wrong is refused before anything is touched."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import safetensors
import torch
from refusals import assert_names, refusal
from safetensors.torch import load_file, save_file

import minijamba as mj
from minijamba import checkpoint, writing
from minijamba.stored import INDEX
from minijamba.testing import assert_matches, assert_rejects

# "m+ mE A+ mE", 15 thousand parameters.
CONFIG = mj.preset(
    "tiny", vocab_size=41, hidden_size=16, intermediate_size=12, num_hidden_layers=4, attn_layer_period=4,
    attn_layer_offset=2, mamba_d_state=4, mamba_dt_rank=3,
)  # fmt: skip
ROUND_TRIPS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "one expert": {"num_experts": 1},
    "no convolution bias": {"mamba_conv_bias": False},
    "projection bias": {"mamba_proj_bias": True},
    "bfloat16": {"dtype": "bfloat16"},
    "float16, tied": {"dtype": "float16", "tie_word_embeddings": True},
}
SHARD = 6_000  # bytes: a dozen shards of a tiny model
TOKENS = torch.tensor([[1, 17, 5, 40, 5, 0, 23, 17, 8, 2, 2, 31]])


@pytest.fixture
def make(long_memory) -> Callable[..., mj.Jamba]:
    """make(field=value, ...): a tiny model of every kind of layer, in the dtype of its config."""

    def build(**changes) -> mj.Jamba:
        config = replace(CONFIG, **changes)
        return long_memory(mj.Jamba(config)).to(getattr(torch, config.dtype)).eval()

    return build


@pytest.fixture
def saved(make, tmp_path) -> Path:
    """A tiny checkpoint of a dozen shards."""
    mj.save(make(), tmp_path / "saved", shard_bytes=SHARD)
    return tmp_path / "saved"


@pytest.fixture
def single(make, tmp_path) -> Path:
    """The same in a single file."""
    mj.save(make(), tmp_path / "single")
    return tmp_path / "single"


@torch.no_grad()
def logits(model: mj.Jamba) -> torch.Tensor:
    return model(TOKENS)


def assert_same(actual: mj.Jamba, expected: mj.Jamba) -> None:
    """The same parameters under the same names, and the same logits, bit for bit."""
    ours, theirs = dict(actual.named_parameters()), dict(expected.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert ours[name].dtype == parameter.dtype, name
        assert_matches(ours[name], parameter, 0, name)
    assert_matches(logits(actual), logits(expected), 0, "logits")


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def contents(folder: Path) -> dict[str, str]:
    """By name. Of the bytes themselves pytest would take minutes to show a difference."""
    return {file.name: digest(file.read_bytes()) for file in folder.iterdir()}


def edit(file: Path, change: Callable[[dict], None]) -> None:
    """Rewrite a JSON or safetensors file, changed in place."""
    if file.suffix == ".json":
        values = json.loads(file.read_text())
        change(values)
        file.write_text(json.dumps(values))
    else:
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}  # not mapped to the old file
        change(tensors)
        save_file(tensors, file)


def shard_with(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


# Reading and writing


@pytest.mark.parametrize("shard_bytes", [SHARD, 5_000_000_000], ids=["shards", "one file"])
@pytest.mark.parametrize("changes", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_round_trip_is_bit_equal(make, tmp_path, changes, shard_bytes):
    model = make(**changes)
    mj.save(model, tmp_path / "model", shard_bytes=shard_bytes)
    loaded = mj.load(tmp_path / "model", device="cpu")
    assert_same(loaded, model)
    assert loaded.config == model.config
    assert not loaded.training and all(parameter.requires_grad for parameter in loaded.parameters())
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == model.config.tie_word_embeddings


def test_loading_draws_no_random_numbers(saved):
    def check(load):
        default, state = torch.get_default_dtype(), torch.get_rng_state()
        load(saved, device="cpu", dtype="bfloat16")
        assert torch.get_default_dtype() == default
        assert_matches(torch.get_rng_state(), state, 0, "random state")

    check(mj.load)
    assert_rejects(check, lambda path, device, dtype: mj.Jamba(CONFIG))


@pytest.mark.parametrize("name", ["tiny", "tour"])
def test_presets_round_trip(name, tmp_path):
    model = mj.Jamba(mj.preset(name)).eval()
    mj.save(model, tmp_path)
    assert_same(mj.load(tmp_path, device="cpu"), model)


def test_logits_tell_wrong_loaders(make, tmp_path):
    model = make(dtype="bfloat16")
    mj.save(model, tmp_path / "model", shard_bytes=SHARD)

    def check(load):
        assert_matches(logits(load(tmp_path / "model", device="cpu")), logits(model), 0, "logits")

    def gate_and_up_swapped(path, device):
        loaded = mj.load(path, device)
        for layer in loaded.model.layers:
            part = getattr(layer.feed_forward, "experts", layer.feed_forward)
            part.gate_proj, part.up_proj = part.up_proj, part.gate_proj
        return loaded

    def experts_in_another_order(path, device):
        loaded = mj.load(path, device)
        for layer in loaded.model.layers:
            if hasattr(layer.feed_forward, "experts"):
                part = layer.feed_forward.experts
                part.down_proj = torch.nn.Parameter(part.down_proj.roll(1, 0))
        return loaded

    def recurrence_in_bfloat16(path, device):
        loaded = mj.load(path, device)
        for name, parameter in loaded.named_parameters():
            if name.endswith(("A_log", "dt_proj.bias")):
                parameter.data = parameter.data.bfloat16().float()
        return loaded

    check(mj.load)
    assert_rejects(check, gate_and_up_swapped, experts_in_another_order, recurrence_in_bfloat16)


def test_files_are_in_the_released_layout(make, tmp_path):
    model = make(tie_word_embeddings=True)
    mj.save(model, tmp_path / "shards", shard_bytes=SHARD)
    mj.save(model, tmp_path / "single")

    whole = load_file(tmp_path / "single" / "model.safetensors")
    assert "lm_head.weight" not in whole and "model.embed_tokens.weight" in whole
    experts = model.model.layers[1].feed_forward.experts
    assert_matches(whole["model.layers.1.feed_forward.experts.3.up_proj.weight"], experts.up_proj[3], 0)

    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert index["weight_map"].keys() == whole.keys()
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 5
    for file in files:
        shard = load_file(tmp_path / "shards" / file)
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= SHARD
        with safetensors.safe_open(tmp_path / "shards" / file, "pt") as header:
            assert header.metadata() == {"format": "pt"}


def test_saving_twice_gives_the_same_bytes(make, tmp_path):
    for name in "ab":
        mj.save(make(), tmp_path / name, shard_bytes=SHARD)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    modes = {file.stat().st_mode for file in (tmp_path / "a").iterdir()}
    assert len(modes) == 1, "all files are readable by whom config.json is"


def test_a_file_beside_its_config_loads(single):
    (single / "model.safetensors").rename(single / "last.safetensors")
    assert_same(mj.load(str(single / "last.safetensors"), device="cpu"), mj.load(single / "last.safetensors", "cpu"))


def test_dtype_is_the_configs_or_the_callers(make, tmp_path):
    model = make(dtype="bfloat16")
    mj.save(model, tmp_path / "bfloat16")
    assert mj.load(tmp_path / "bfloat16", "cpu").dtype == torch.bfloat16
    assert mj.load(tmp_path / "bfloat16", dtype="float64").model.layers[0].mamba.A_log.dtype == torch.float64
    for dtype in ("float16", torch.float16):
        loaded = mj.load(tmp_path / "bfloat16", dtype=dtype)
        mamba = loaded.model.layers[0].mamba
        assert loaded.dtype == torch.float16
        assert {mamba.A_log.dtype, mamba.dt_proj.bias.dtype} == {torch.float32}
        assert mamba.dt_proj.weight.dtype == torch.float16


def test_saving_in_another_dtype_keeps_the_recurrence_in_float32(make, tmp_path):
    model = make()
    mj.save(model, tmp_path / "half", dtype=torch.bfloat16)
    assert_same(mj.load(tmp_path / "half", device="cpu"), make(dtype="bfloat16"))
    assert model.dtype == torch.float32
    with pytest.raises(ValueError, match="dtype is 'float64', but must be one of float32, bfloat16, float16"):
        mj.save(model.double(), tmp_path / "double")
    assert not (tmp_path / "double").exists()


def to_first_release(tensors: dict, keep: str = "nothing") -> None:
    """Rename to `moe`, in dense layers a single expert without a router, and capital B and C norms; but names with
    `keep` in them stay."""
    routed = {name.split(".feed_forward.")[0] for name in tensors if ".router." in name}
    for name in [name for name in tensors if keep not in name]:
        dense = name.split(".feed_forward.")[0] not in routed
        older = name.replace("feed_forward", "moe.experts.0" if dense else "moe").replace("pre_ff_", "pre_moe_")
        older = re.sub("([bc])_layernorm", lambda match: match[1].upper() + "_layernorm", older)
        tensors[older] = tensors.pop(name)


@pytest.mark.parametrize("keep", ["nothing", "layernorm"])
def test_first_release_names(make, single, keep):
    def rename(tensors):
        to_first_release(tensors, keep)
        assert "model.layers.0.moe.experts.0.gate_proj.weight" in tensors
        assert "model.layers.1.moe.router.weight" in tensors
        assert ("model.layers.0.mamba.B_layernorm.weight" in tensors) == (keep == "nothing")

    def swap(tensors):
        gate, up = (f"model.layers.0.moe.experts.0.{part}_proj.weight" for part in ("gate", "up"))
        tensors[gate], tensors[up] = tensors[up], tensors[gate]

    def first_config(values):
        values["n_ctx"] = values.pop("max_position_embeddings")
        values |= {"calc_logits_for_entire_prompt": False, "mamba_inner_layernorms": True}

    def check(change):
        edit(single / "model.safetensors", change)
        assert_same(mj.load(single, device="cpu"), make())

    edit(single / "config.json", first_config)
    check(rename)
    assert_rejects(check, swap)


def test_a_tied_head_may_be_stored_if_it_equals_the_embedding(make, tmp_path):
    model = make(tie_word_embeddings=True)
    mj.save(model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    edit(file, lambda tensors: tensors.update({checkpoint.HEAD: tensors[checkpoint.EMBEDDING].clone()}))
    assert_same(mj.load(tmp_path / "model", device="cpu"), model)
    edit(file, lambda tensors: tensors[checkpoint.HEAD].mul_(2))
    with pytest.raises(ValueError, match=r"model\.safetensors: lm_head\.weight differs .* tie_word_embeddings"):
        mj.load(tmp_path / "model")


# Bad input


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


NORM = "model.final_layernorm.weight"
D = "model.layers.0.mamba.D"

# What is done to a sharded checkpoint -> what the message must name.
BAD_SHARDS = {
    "missing shard": (lambda f: shard_with(f, D).unlink(), ["model-00001-of-", "missing", INDEX]),
    "truncated shard": (lambda f: cut(shard_with(f, D), 2000), ["model-00001-of-", "2,000 bytes", "by its header"]),
    "shard cut within its header": (lambda f: cut(shard_with(f, D), 50), ["model-00001-of-", "header", "again"]),
    "empty shard": (lambda f: cut(shard_with(f, D), 0), ["model-00001-of-", "0 bytes", "again"]),
    "index names an absent tensor": (
        lambda f: edit(shard_with(f, D), drop(D)), [INDEX, D, "model-00001-of-", "in no shard"],
    ),
    "index names another shard": (
        lambda f: edit(f / INDEX, lambda v: v["weight_map"].update({D: shard_with(f, NORM).name})),
        [INDEX, D, "in model-00001-of-"],
    ),
    "index leaves a tensor out": (
        lambda f: edit(f / INDEX, lambda v: v["weight_map"].pop(D)),
        ["model-00001-of-", D, INDEX],
    ),
    "index is not JSON": (lambda f: cut(f / INDEX, 100), [INDEX, "weight_map"]),
    "index without a map": (lambda f: (f / INDEX).write_text("[1]"), [INDEX, "weight_map"]),
    "index leaves the folder": (
        lambda f: edit(f / INDEX, lambda v: v["weight_map"].update({D: "../other.safetensors"})),
        [INDEX, "files of its folder"],
    ),
    "index beside a single file": (
        lambda f: shutil.copy(shard_with(f, D), f / "model.safetensors"), ["model.safetensors and", "remove"],
    ),
}  # fmt: skip

# The same for a single file, given as the folder.
BAD_FILES = {
    "missing tensor": (lambda f: edit(f / "model.safetensors", drop(D)), [D, "config.json", "download"]),
    "missing head": (lambda f: edit(f / "model.safetensors", drop("lm_head.weight")), ["lm_head", "tie_word"]),
    "missing experts": (
        lambda f: edit(f / "config.json", lambda v: v.update(num_experts=7)),
        ["layers.1.feed_forward.experts.4.gate_proj.weight", "and 16 more", "num_experts"],
    ),
    "extra tensor": (
        lambda f: edit(f / "model.safetensors", put("model.extra", torch.ones(2))),
        ["model.safetensors: model.extra", "has no place"],
    ),
    "extra layer": (
        lambda f: edit(f / "config.json", lambda v: v.update(num_hidden_layers=3)),
        ["model.safetensors", "model.layers.3.", "num_hidden_layers"],
    ),
    "wrong shape": (
        lambda f: edit(f / "model.safetensors", put(NORM, torch.ones(15))),
        ["model.safetensors", NORM, "(15,)", "(16,)", "another checkpoint"],
    ),
    "transposed": (
        lambda f: edit(f / "model.safetensors", put("lm_head.weight", torch.ones(16, 41))), ["(16, 41)", "(41, 16)"],
    ),
    "int8": (
        lambda f: edit(f / "model.safetensors", put(NORM, torch.ones(16, dtype=torch.int8))), [NORM, "I8", "quantized"],
    ),
    "float8": (
        lambda f: edit(f / "model.safetensors", put(NORM, torch.ones(16).to(torch.float8_e4m3fn))), [NORM, "F8_E4M3"],
    ),
    "bytes after the end": (
        lambda f: (f / "model.safetensors").open("ab").write(b"more"), ["model.safetensors", "by its header", "again"],
    ),
    "Git LFS pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        ["model.safetensors", "git lfs pull"],
    ),
    "web page": (lambda f: (f / "model.safetensors").write_text("<!DOCTYPE html>" * 9), ["not safetensors", "again"]),
    "pickle under the name of safetensors": (
        lambda f: torch.save({"x": torch.ones(2)}, f / "model.safetensors"),
        ["model.safetensors", "is a pickle", "save_pretrained"],
    ),
    "old pickle under the name of safetensors": (
        lambda f: torch.save({"x": torch.ones(2)}, f / "model.safetensors", _use_new_zipfile_serialization=False),
        ["model.safetensors", "is a pickle"],
    ),
    "pickle alone": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        ["pytorch_model.bin is a pickle", "save_pretrained"],
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["neither model.safetensors nor", "download"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json does not exist"]),
    "config is not JSON": (lambda f: cut(f / "config.json", 20), ["config.json", "not JSON"]),
    "another architecture": (
        lambda f: edit(f / "config.json", lambda v: v.update(model_type="zamba", architectures=["Zamba"])),
        ["config.json", "'zamba'", "jamba"],
    ),
    "config against itself": (
        lambda f: edit(f / "config.json", lambda v: v.update(attn_layer_offset=9)),
        ["config.json", "attn_layer_offset 9", "attn_layer_period 4"],
    ),
}  # fmt: skip


def check_refused(source: Path, words: list[str], monkeypatch) -> None:
    """Neither load nor convert takes memory or writes a file, and both say why."""

    def took_memory(*_, **__):
        raise AssertionError("memory was taken")

    before = sorted(source.parent.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "Jamba", took_memory)
        assert_names(refusal(mj.load, source), words)
        assert_names(refusal(checkpoint.convert, source, source.parent / "converted"), words)
    assert sorted(source.parent.iterdir()) == before


@pytest.mark.parametrize("case", BAD_SHARDS)
def test_bad_shards_are_refused(saved, monkeypatch, case):
    damage, words = BAD_SHARDS[case]
    damage(saved)
    check_refused(saved, words, monkeypatch)


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused(single, monkeypatch, case):
    damage, words = BAD_FILES[case]
    damage(single)
    check_refused(single, words, monkeypatch)


def test_good_checkpoints_are_not_refused(saved, single, monkeypatch):
    assert_rejects(lambda source: check_refused(source, [], monkeypatch), saved, single)


def test_paths_that_are_no_checkpoint(saved, tmp_path, monkeypatch):
    for path in (
        tmp_path / "nowhere",
        "nowhere",
        "./no/where",
        "/no/where",
        tmp_path / "a.safetensors",
        "a/b.safetensors",
    ):
        assert_names(refusal(mj.load, path), [str(Path(path)), "does not exist", "owner/name"])
    (tmp_path / "empty").mkdir()
    assert_names(refusal(mj.load, tmp_path / "empty"), ["config.json does not exist"])
    shard = shard_with(saved, D)
    assert_names(refusal(mj.load, shard), [str(shard), "no tensor", "config.json"])
    assert_names(refusal(mj.load, saved / "config.json"), ["config.json", "not safetensors"])


def test_arguments_are_checked(saved, monkeypatch):
    schemes = "None or one of int8, int4, int8-all, int4-all"
    assert_names(refusal(mj.load, saved, "cpu", "auto", "int2"), ["quantize is 'int2'", schemes])
    message = refusal(lambda: checkpoint.convert(saved, saved.parent / "a", quantize="int2"))
    assert_names(message, ["quantize is 'int2'", schemes])
    assert_names(refusal(mj.load, saved, "cpu", "int8"), ["dtype is 'int8'", "float32, bfloat16, float16"])
    assert_names(refusal(mj.load, saved, "gpu"), ["device is 'gpu'", "cuda"])
    assert_names(refusal(mj.load, saved, "cuda:99"), ["device is cuda:99", "GPUs"])
    model = mj.load(saved, "cpu")
    assert_names(refusal(lambda: mj.save(model, saved, shard_bytes=0)), ["shard_bytes is 0", "at least 1"])


def test_what_does_not_fit_in_memory_is_refused(saved, monkeypatch):
    monkeypatch.setattr(import_module("minijamba.budget"), "available_memory", lambda device: 30_000)
    monkeypatch.setattr(checkpoint, "Jamba", None)
    assert_names(refusal(mj.load, saved, "cpu"), [str(saved), "in float32", "needs", "free", "dtype"])
    checkpoint.convert(saved, saved.parent / "converted")


# Memory

MEASURE = """
import os, sys, psutil, torch
from minijamba import checkpoint, stored
from safetensors import safe_open
from safetensors.torch import load_file

folder, process = sys.argv[1], psutil.Process()
read_into = stored.Stored.read_into
peak = 0

def sample():
    global peak
    peak = max(peak, process.memory_info().rss)

def streamed(tensor, numbers, start):
    read_into(tensor, numbers, start)
    sample()

opened = {}

def files_kept_open(tensor, numbers, start):
    if tensor.file not in opened:
        opened[tensor.file] = safe_open(tensor.file, framework="pt")
    numbers.copy_(opened[tensor.file].get_tensor(tensor.name).view(-1)[start : start + len(numbers)])
    sample()

def whole_checkpoint(tensor, numbers, start):
    for file in sorted(os.listdir(folder)) if not opened else ():
        if file.endswith(".safetensors"):
            opened.update({name: tensor.clone() for name, tensor in load_file(os.path.join(folder, file)).items()})
    numbers.copy_(opened[tensor.name].view(-1)[start : start + len(numbers)])
    sample()

torch.set_num_threads(1)
# The first call also imports what loading needs.
for reader in (streamed, streamed, files_kept_open, whole_checkpoint):
    stored.Stored.read_into = reader
    peak, before = 0, process.memory_info().rss
    checkpoint.load(folder, device="cpu", quantize=sys.argv[2] if len(sys.argv) > 2 else None)
    opened.clear()
    print(reader.__name__, peak - before)
"""


def test_loading_holds_the_model_and_one_tensor(tmp_path):
    config = mj.preset(
        "tiny", vocab_size=4096, hidden_size=512, intermediate_size=2048, num_hidden_layers=4, attn_layer_period=4,
        attn_layer_offset=2, num_experts=6,
    )  # fmt: skip
    model = checkpoint._unfilled(config, torch.float32, torch.device("cpu"))
    size, largest = sum(parameter.nbytes for parameter in model.parameters()), model.lm_head.weight.nbytes
    mj.save(model, tmp_path, shard_bytes=int(size / 2.5))
    assert size > 200e6 and len(list(tmp_path.glob("*.safetensors"))) == 3
    # A threshold below the tensors' sizes: what is freed goes back to the system, and each reader starts alike.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURE, tmp_path]
    output = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    peaks = {name: int(peak) for name, peak in map(str.split, output.splitlines())}

    def check(reader):
        # The largest tensor, and as much again for what Python and PyTorch keep beside it.
        assert peaks[reader] < size + 2 * largest, peaks

    check("streamed")
    assert_rejects(check, "files_kept_open", "whole_checkpoint")


# Writing over what is there


class Killed(BaseException):
    """Like an interrupt: no `except Exception` stops it."""


def fail_at(call: int, error: BaseException) -> Callable:
    """A write_file that writes half of the file and raises at the given call."""
    calls, write_file = [], writing.write_file

    def write_some(file, outputs, written):
        calls.append(file)
        if len(calls) == call:
            file.write_bytes(b"half")
            raise error
        write_file(file, outputs, written)

    return write_some


FAILURES = {
    "full disk": (OSError(28, "No space left on device"), OSError),
    "interrupt": (Killed("No space left"), Killed),
}


@pytest.mark.parametrize("call", [1, 7], ids=["first file", "seventh file"])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failing_save_leaves_the_earlier_checkpoint(make, saved, monkeypatch, failure, call):
    raised, expected = FAILURES[failure]
    model, before = make(mamba_d_state=5), contents(saved)

    def check(save):
        with monkeypatch.context() as patch:
            patch.setattr(writing, "write_file", fail_at(call, raised))
            message = refusal(lambda: save(model, saved, shard_bytes=SHARD), error=expected)
        assert contents(saved) == before
        assert list(saved.parent.iterdir()) == [saved]
        return message

    message = check(mj.save)
    if expected is OSError:
        assert_names(message, [str(saved), "could not be written", "No space left", "nothing was overwritten"])

    def in_place(model, path, shard_bytes):
        with monkeypatch.context() as patch:
            patch.setattr(writing, "_replacing", nullcontext)
            mj.save(model, path, shard_bytes=shard_bytes)

    assert_rejects(check, in_place)


def test_a_failing_swap_puts_the_earlier_checkpoint_back(make, saved, monkeypatch):
    before, rename = contents(saved), Path.rename

    def busy(self, target):
        if self.name.endswith(".new"):
            raise OSError(16, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    assert_names(refusal(mj.save, make(), saved, error=OSError), [str(saved), "busy", "nothing was overwritten"])
    assert contents(saved) == before
    assert list(saved.parent.iterdir()) == [saved]


def test_the_earlier_checkpoint_is_whole_until_the_last_file_is_written(make, saved, monkeypatch):
    before, writes = contents(saved), []

    write_file = writing.write_file

    def watch(file, outputs, written):
        write_file(file, outputs, written)
        writes.append(contents(saved) == before)

    monkeypatch.setattr(writing, "write_file", watch)
    mj.save(make(num_experts=1), saved, shard_bytes=SHARD)
    assert all(writes) and len(writes) > 3
    assert contents(saved) != before


def test_a_checkpoint_replaces_an_earlier_one_and_keeps_its_tokenizer(make, saved):
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md")
    for name in names:
        (saved / name).write_text(f"{{}} of {name}")
    kept = {name: contents(saved)[name] for name in names}
    model = make(tie_word_embeddings=True)
    mj.save(model, saved)
    assert contents(saved).keys() == {"config.json", "model.safetensors", *kept}
    assert contents(saved).items() >= kept.items()
    assert_same(mj.load(saved, device="cpu"), model)


@pytest.mark.parametrize("other", ["notes.txt", "pytorch_model.bin", "optimizer.safetensors", ".git"])
def test_a_folder_of_other_things_is_not_overwritten(make, saved, other):
    (saved / other).mkdir() if other == ".git" else (saved / other).write_text("mine")
    before = sorted(saved.rglob("*"))
    assert_names(refusal(mj.save, make(), saved), [str(saved), other, "delete", "another folder"])
    assert_names(refusal(checkpoint.convert, saved, saved), [str(saved), other, "delete", "another folder"])
    assert sorted(saved.rglob("*")) == before


def test_places_that_cannot_be_written(make, saved, tmp_path, monkeypatch):
    file = saved / "config.json"
    assert_names(refusal(mj.save, make(), file), ["config.json is a file", "give a folder"])
    assert_names(refusal(mj.save, make(), file / "inside", error=OSError), ["config.json/inside could not be written"])
    before = contents(saved)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(100, 90, 10))
    message = refusal(mj.save, make(), saved, error=OSError)
    assert_names(message, [str(saved), "bytes are needed and 10 are free", "make room"])
    assert contents(saved) == before
    assert list(tmp_path.iterdir()) == [saved]


def test_folders_above_are_made_and_an_empty_one_is_filled(make, tmp_path):
    mj.save(make(), tmp_path / "a" / "b")
    (tmp_path / "c").mkdir()
    mj.save(make(), str(tmp_path / "c"))
    assert contents(tmp_path / "a" / "b") == contents(tmp_path / "c")


def test_a_model_that_its_config_does_not_describe_is_not_saved(make, tmp_path):
    model = make()
    model.lm_head = torch.nn.Linear(16, 43, bias=False)
    assert_names(refusal(mj.save, model, tmp_path / "model"), ["lm_head.weight", "config"])
    model.lm_head.weight = model.model.embed_tokens.weight
    assert_names(refusal(mj.save, model, tmp_path / "model"), ["lm_head.weight", "config"])
    assert not (tmp_path / "model").exists()


# Converting


def test_convert_gives_what_save_gives_without_building_the_model(make, saved, single, tmp_path, monkeypatch):
    mj.save(make(), tmp_path / "half", dtype="bfloat16")
    for name in ("tokenizer.json", "generation_config.json"):
        (single / name).write_text("{}")
    edit(single / "model.safetensors", to_first_release)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "Jamba", None)
        checkpoint.convert(single, tmp_path / "shards", shard_bytes=SHARD)
        checkpoint.convert(single, tmp_path / "bfloat16", dtype="bfloat16")
        checkpoint.convert(tmp_path / "shards", tmp_path / "shards", shard_bytes=2 * SHARD)
    beside = dict.fromkeys(("tokenizer.json", "generation_config.json"), digest(b"{}"))
    assert contents(tmp_path / "bfloat16") == contents(tmp_path / "half") | beside
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) < len(list(saved.glob("*.safetensors")))
    assert_same(mj.load(tmp_path / "shards", device="cpu"), make())

    def check(source):
        checkpoint.convert(source, tmp_path / "again", shard_bytes=SHARD)
        assert contents(tmp_path / "again") == contents(saved) | beside

    check(tmp_path / "shards")
    assert_rejects(check, tmp_path / "half")


# The Hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """hub(folder): what an id downloads from now on; returns the list of downloads, each the names of its files."""
    downloads = []

    def serve(folder: Path) -> list[set[str]]:
        def snapshot_download(repo_id, allow_patterns):
            names = {file.name for file in folder.iterdir() if any(fnmatch(file.name, p) for p in allow_patterns)}
            target = tmp_path / f"snapshot{len(downloads)}"
            target.mkdir()
            for name in names:
                shutil.copy(folder / name, target)
            downloads.append(names)
            return str(target)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return downloads

    return serve


def test_an_id_downloads_config_then_weights_and_no_code(make, saved, hub):
    for name in ("pytorch_model.bin", "modeling_jamba.py", "consolidated.safetensors", "tokenizer.json"):
        (saved / name).write_text("{}")
    downloads = hub(saved)
    assert_same(mj.load("owner/name.v1", device="cpu"), make())
    small = {"config.json", INDEX, "tokenizer.json"}
    assert downloads == [small, small | {file.name for file in saved.glob("model-*")}]


def test_weights_are_not_downloaded_for_a_model_that_cannot_be_loaded(saved, hub, monkeypatch):
    downloads = hub(saved)
    with monkeypatch.context() as patch:
        patch.setattr(import_module("minijamba.budget"), "available_memory", lambda device: 1000)
        assert_names(refusal(mj.load, "owner/name"), ["owner/name in float32", "free"])
    edit(saved / "config.json", lambda values: values.update(model_type="zamba"))
    assert_names(refusal(mj.load, "owner/name"), ["config.json", "'zamba'"])
    assert downloads == [{"config.json", INDEX}] * 2


def test_a_folder_goes_before_an_id(saved, hub, monkeypatch):
    monkeypatch.chdir(saved.parent.parent)
    downloads = hub(saved)
    assert mj.load(f"{saved.parent.name}/{saved.name}", device="cpu").config == CONFIG
    assert downloads == []


def test_refusals_of_the_hub(monkeypatch):
    response = SimpleNamespace(headers={}, request=None)
    for error, words in {
        huggingface_hub.errors.GatedRepoError: ["owner/name is gated", "huggingface.co/owner/name", "hf auth login"],
        huggingface_hub.errors.RepositoryNotFoundError: ["owner/name is neither a folder here nor", "correct"],
    }.items():

        def refuse(*_, error=error, **__):
            raise error("several\nlines", response=response)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
        assert_names(refusal(mj.load, "owner/name"), words)


def test_an_id_without_network(tmp_path):
    # Nothing listens on port 9 of this machine, and the cache is empty.
    unreachable = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    code = "import minijamba as mj; mj.load('owner/name')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=unreachable)
    assert run.returncode == 1
    assert_names(run.stderr.splitlines()[-1], ["ConnectionError: owner/name is no folder here", "connect to the"])
