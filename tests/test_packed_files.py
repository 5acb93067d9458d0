"""Packed weights in and out of files: packed as they arrive, written as they are, and every flipped byte found."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from refusals import assert_names, refusal

import minijamba as mj
from minijamba import checkpoint, packed_files, random_weights, stream, writing
from minijamba.budget import weights
from minijamba.quantize import SCHEMES, PackedWeight, pack, packed_bits, unpack
from minijamba.stored import INDEX
from minijamba.testing import assert_matches, assert_rejects

BASE = mj.preset("tiny", vocab_size=41, num_hidden_layers=4, attn_layer_period=4, attn_layer_offset=2, num_experts=3)
# A model of each family that has a feed-forward, and some of what may differ.
CONFIGS = {
    "jamba": BASE,
    "jamba, bfloat16": replace(BASE, dtype="bfloat16"),
    "jamba, tied": replace(BASE, tie_word_embeddings=True),
    "jamba, dense": replace(BASE, num_experts=1),
    "jamba, sizes of no group": replace(BASE, hidden_size=36, intermediate_size=301),
    "minijamba": replace(BASE, mlp_bias=True, router_bias=True, attention_bias=True, head_bias=True),
    "mixtral": replace(
        BASE, model_type="mixtral", pattern=None, attn_layer_period=1, attn_layer_offset=0, expert_layer_period=1,
        expert_layer_offset=0, rope_theta=1e4, norm_topk_prob=True,
    ),
    "llama": replace(
        BASE, model_type="llama", num_experts=1, attn_layer_period=1, attn_layer_offset=0, rope_theta=1e4,
    ),
    "blackmamba": replace(
        BASE, model_type="blackmamba", pattern="m- -E m- -+", mamba_inner_layernorms=False, hidden_act="gelu",
        router_bias=True, num_experts_per_tok=1, tie_word_embeddings=True, final_norm="layer", residual_in_fp32=True,
        rms_norm_eps=1e-5, routing="sinkhorn", mamba_dt_rank=2, initializer_range=0.02,
    ),
}  # fmt: skip
TOKENS = torch.tensor([[1, 17, 5, 40, 5, 0, 23, 17, 8, 2, 2, 31]])
SHARD = 30_000


@pytest.fixture
def make(long_memory):
    def build(config=BASE):
        return long_memory(mj.Jamba(config)).to(getattr(torch, config.dtype)).eval()

    return build


@pytest.fixture
def packed(make, tmp_path):
    """A checkpoint of packed weights, in several files."""
    mj.save(make(), tmp_path / "plain")
    mj.save(mj.load(tmp_path / "plain", "cpu", quantize="int8-all"), tmp_path / "packed", shard_bytes=SHARD)
    return tmp_path / "packed"


def memory(model):
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def assert_same(actual, expected):
    ours, theirs = memory(actual), memory(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert_matches(ours[name], tensor, 0, name)


def by_hand(model, quantize):
    """Name in memory -> the tensor it must be, from a model of full precision and the names of `weights` alone."""
    parameters, found = dict(model.named_parameters()), {}
    parts = {packed_files._stacked(weight.name): weight.part for weight in weights(model.config)}
    for name, tensor in parameters.items():
        weight = name if name.endswith((".weight", ".bias")) or "experts" not in name else f"{name}.weight"
        bits = packed_bits(weight, parts[name], quantize) if tensor.dim() > 1 else None
        if bits:
            made = pack(tensor, bits)
            found |= {f"{name}.values": made.values, f"{name}.scales": made.scales}
        else:
            found[name] = tensor.detach()
    return found


# Packed while loading


@pytest.mark.parametrize("quantize", SCHEMES)
@pytest.mark.parametrize("name", CONFIGS)
def test_loading_packs_what_packing_the_loaded_model_does(make, tmp_path, name, quantize):
    mj.save(make(CONFIGS[name]), tmp_path, shard_bytes=SHARD)
    plain = mj.load(tmp_path, "cpu")
    loaded = mj.load(tmp_path, "cpu", quantize=quantize)
    assert loaded.config == plain.config and loaded.dtype == plain.dtype and not loaded.training
    if plain.config.tie_word_embeddings:
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight

    def check(scheme):
        expected = by_hand(plain, scheme)
        found = memory(loaded)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert_matches(found[key], tensor, 0, key)

    check(quantize)
    assert_rejects(check, "int4" if quantize.startswith("int8") else "int8")
    assert_matches(sum(tensor.nbytes for tensor in memory(loaded).values()), mj.budget(
        plain.config, quantize=quantize
    ).weight_bytes, 0)  # fmt: skip


def test_packing_follows_the_dtype_that_is_asked_for(make, tmp_path):
    """In bfloat16 the weights are rounded first: what is packed is the model that would run without it."""
    mj.save(make(), tmp_path)
    found = memory(mj.load(tmp_path, "cpu", "bfloat16", "int8"))

    def check(dtype):
        expected = by_hand(mj.load(tmp_path, "cpu", dtype), "int8")
        name = "model.layers.1.feed_forward.experts.up_proj.values"
        assert_matches(found[name], expected[name], 0)

    check("bfloat16")
    assert_rejects(check, "float32")


@pytest.mark.parametrize("block", [1, 400, 2**24])
def test_blocks_of_any_size_give_the_same_model(make, tmp_path, monkeypatch, block):
    mj.save(make(), tmp_path, shard_bytes=SHARD)
    expected = mj.load(tmp_path, "cpu", quantize="int4-all")
    monkeypatch.setattr(stream, "BLOCK", block)
    assert_same(mj.load(tmp_path, "cpu", quantize="int4-all"), expected)


class _CudaOnCpu:
    """torch, with a GPU's memory on the CPU and its streams in the order in which they are called."""

    def __init__(self):
        event = SimpleNamespace(synchronize=lambda: None)
        nothing = lambda _: None  # noqa: E731
        queue = SimpleNamespace(record_event=lambda: event, wait_event=nothing, wait_stream=nothing)
        self.cuda = SimpleNamespace(
            Stream=lambda device: queue, current_stream=lambda device: queue, stream=lambda queue: nullcontext(),
            synchronize=nothing,
        )  # fmt: skip

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, size, dtype, device=None, pin_memory=False):
        return torch.zeros(size, dtype=dtype)


@pytest.mark.parametrize("quantize", [None, "int4-all"])
@pytest.mark.parametrize("block", [1, 400])
def test_a_gpu_gets_blocks_that_are_joined(make, tmp_path, monkeypatch, quantize, block):
    mj.save(make(), tmp_path, shard_bytes=SHARD)
    expected = mj.load(tmp_path, "cpu", quantize=quantize)
    stored, gpu = checkpoint._match(expected.config, tmp_path), torch.device("cuda")
    monkeypatch.setattr(stream, "BLOCK", block)
    monkeypatch.setattr(stream, "torch", _CudaOnCpu())
    move, moved = stream._Moves.move, []

    def check(begins):
        def moves(own, numbers, buffer, begin):
            moved.append(begin)
            return move(own, numbers, buffer, begins(begin))

        model, places = checkpoint.unfilled(expected.config, torch.float32, torch.device("cpu"), quantize)
        for tensor in memory(model).values():
            tensor.zero_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stream._Moves, "move", moves)
            stream.fill(places, stored, gpu, stream.LoadReport())
        assert_same(model.eval(), expected)

    check(lambda begin: begin)
    assert sum(begin > 0 for begin in moved) > len(moved) / 2
    assert_rejects(check, lambda begin: 0)


def test_the_logits_are_those_of_the_unpacked_weights(make, tmp_path):
    mj.save(make(replace(BASE, num_experts=1)), tmp_path)
    loaded, plain = mj.load(tmp_path, "cpu", quantize="int4-all"), mj.load(tmp_path, "cpu")

    def check(unpacked):
        for name, parameter in plain.named_parameters():
            if isinstance(owner := dict(loaded.named_modules()).get(name), PackedWeight):
                parameter.data = unpacked(owner.packed())
        with torch.no_grad():
            assert_matches(loaded(TOKENS), plain(TOKENS), 1e-5)

    check(unpack)
    assert_rejects(check, lambda made: unpack(made) * 1.01)


def test_weights_that_are_not_finite_are_named(make, tmp_path):
    model = make()
    with torch.no_grad():
        model.model.layers[1].feed_forward.experts.up_proj[2, 3, 4] = torch.nan
    mj.save(model, tmp_path / "a")
    words = ["model.safetensors", "layers.1.feed_forward.experts.2.up_proj.weight", "not finite", "without quantize"]
    assert_names(refusal(mj.load, tmp_path / "a", "cpu", "auto", "int4"), words)
    words = ["layers.1.feed_forward.experts.2.up_proj.weight", "not finite"]
    assert_names(refusal(lambda: checkpoint.convert(tmp_path / "a", tmp_path / "b", quantize="int8")), words)
    assert not (tmp_path / "b").exists()
    mj.load(tmp_path / "a", "cpu")


# Written packed


@pytest.mark.parametrize("quantize", SCHEMES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_model_comes_back_bit_for_bit(make, tmp_path, name, quantize):
    mj.save(make(CONFIGS[name]), tmp_path / "plain")
    model = mj.load(tmp_path / "plain", "cpu", quantize=quantize)
    mj.save(model, tmp_path / "packed", shard_bytes=SHARD)
    checkpoint.convert(tmp_path / "plain", tmp_path / "converted", quantize=quantize, shard_bytes=SHARD)
    for folder in ("packed", "converted"):
        assert_same(mj.load(tmp_path / folder, "cpu"), model)
        assert_same(mj.load(tmp_path / folder, "cpu", quantize=quantize), model)
        assert mj.load(tmp_path / folder, "cpu").config == model.config
    said = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert said == {"quant_method": "minijamba", "scheme": quantize}


def test_converting_is_saving_what_is_loaded(make, tmp_path):
    mj.save(make(replace(BASE, dtype="bfloat16")), tmp_path / "plain", dtype="bfloat16", shard_bytes=SHARD)
    (tmp_path / "plain" / "tokenizer.json").write_text("{}")
    mj.save(mj.load(tmp_path / "plain", "cpu", quantize="int4"), tmp_path / "saved", dtype="bfloat16")
    checkpoint.convert(tmp_path / "plain", tmp_path / "converted", "bfloat16", quantize="int4")
    files = {file.name: file.read_bytes() for file in (tmp_path / "converted").iterdir()}
    assert files.pop("tokenizer.json") == b"{}"
    saved = {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()}

    def check(files):
        assert files == saved

    check(files)
    assert_rejects(check, files | {"model.safetensors": files["model.safetensors"][:-1] + b"\0"})


def test_converting_never_builds_the_model(make, tmp_path, monkeypatch):
    mj.save(make(), tmp_path / "plain")
    monkeypatch.setattr(checkpoint, "Jamba", None)
    checkpoint.convert(tmp_path / "plain", tmp_path / "packed", quantize="int8")


def test_values_and_scales_are_made_once(make, tmp_path, monkeypatch):
    mj.save(make(), tmp_path / "plain")
    calls = []
    monkeypatch.setattr(packed_files, "pack", lambda weight, bits: calls.append(weight.shape) or pack(weight, bits))
    checkpoint.convert(tmp_path / "plain", tmp_path / "packed", quantize="int8", shard_bytes=2000)
    assert len(calls) == 2 * 3 * (3 + 1), "two layers of three experts and two dense ones, three matrices each"
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 8


def test_another_dtype_changes_what_is_not_packed(packed):
    loaded = mj.load(packed, "cpu", "bfloat16")
    experts = loaded.model.layers[1].feed_forward.experts
    assert loaded.dtype == torch.bfloat16 and experts.up_proj.packed().dtype == torch.bfloat16
    assert experts.up_proj.scales.dtype == torch.float32


# What is wrong with it


def flip(file: Path, at: int):
    content = bytearray(file.read_bytes())
    content[at] ^= 0x10
    file.write_bytes(content)


def test_every_flipped_byte_is_found(packed, monkeypatch):
    """Among them bytes of values, of scales and of what is not packed; the tensor is named."""
    file = sorted(packed.glob("*.safetensors"))[1]
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + length])
    header.pop("__metadata__")
    assert len(header) > 4

    def check(checksum):
        for name, entry in header.items():
            for at in (entry["data_offsets"][0], entry["data_offsets"][1] - 1):
                flip(file, 8 + length + at)
                with monkeypatch.context() as patch:
                    patch.setattr(stream, "checksum", checksum)
                    assert_names(refusal(mj.load, packed, "cpu"), [str(file), name, "checksum", "copy"])
                flip(file, 8 + length + at)

    mj.load(packed, "cpu")
    check(stream.checksum)
    sums = json.loads((packed / writing.CHECKSUMS).read_text())
    known = {value for values in sums["crc32"].values() for value in values}
    assert_rejects(check, lambda content: type("Any", (str,), {"__ne__": lambda *_: False})(min(known)))


DAMAGES = {
    "no checksums": (lambda f: (f / "checksums.json").unlink(), ["checksums.json is absent, damaged", "again"]),
    "checksums cut off": (lambda f: (f / "checksums.json").write_text("{"), ["checksums.json is absent, damaged"]),
    "a tensor without checksums": (
        lambda f: edit(f / "checksums.json", lambda v: v["crc32"].pop("lm_head.weight.scales")), ["checksums.json is"],
    ),
    "nothing in place of checksums": (
        lambda f: edit(f / "checksums.json", lambda v: [sums.__setitem__(0, None) for sums in v["crc32"].values()]),
        ["checksums.json is absent, damaged"],
    ),
    "a block of another length": (
        lambda f: edit(f / "checksums.json", lambda v: v.update(block_bytes=64)), ["checksums.json is absent, damaged"],
    ),
    "another scheme in config.json": (
        lambda f: edit(f / "config.json", lambda v: v["quantization_config"].update(scheme="int4")),
        ["no tensor", "int4"],
    ),
    "a scheme of nobody's": (
        lambda f: edit(f / "config.json", lambda v: v["quantization_config"].update(scheme="int2")),
        ["config.json: quantization_config", "int2", "only quant_method 'minijamba'", "not quantized"],
    ),
    "another's method": (
        lambda f: edit(f / "config.json", lambda v: v.update(quantization_config={"quant_method": "gptq", "bits": 4})),
        ["config.json: quantization_config", "gptq", "only quant_method 'minijamba'", "not quantized"],
    ),
    "no longer said": (lambda f: edit(f / "config.json", lambda v: v.pop("quantization_config")), ["I8", "quantized"]),
    "one expert more": (lambda f: edit(f / "config.json", lambda v: v.update(num_experts=4)), ["shape (3,", "(4,"]),
    "one layer less": (
        lambda f: edit(f / "config.json", lambda v: v.update(num_hidden_layers=3)), ["model.layers.3.", "no place"],
    ),
    "a missing shard": (lambda f: sorted(f.glob("*.safetensors"))[2].unlink(), ["model-00003-of-", "missing"]),
}  # fmt: skip


def edit(file, change):
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


@pytest.mark.parametrize("case", DAMAGES)
def test_what_is_wrong_is_refused(packed, case):
    damage, words = DAMAGES[case]
    damage(packed)
    assert_names(refusal(mj.load, packed, "cpu"), words)


def test_no_remedy_that_would_be_refused(packed, monkeypatch):
    monkeypatch.setattr(import_module("minijamba.budget"), "available_memory", lambda device: 1000)
    said = refusal(mj.load, packed, "cpu")
    assert_names(said, ["more memory"])
    assert "quantize=" not in said and "convert" not in said, "4 bits would take more: groups are filled up"

    def large(scheme, packed):
        return refusal(
            checkpoint._memory, mj.preset("jamba-v0.1"), "bfloat16", scheme, torch.device("cpu"), "it", packed
        )

    assert_names(large("int8-all", True), ["more memory, or convert the checkpoint that it was made from"])
    assert "convert" not in large("int4-all", True)
    assert large("int4-all", False).endswith("free: use a device with more memory")


def test_what_is_packed_together_does_not_wait(make, tmp_path, monkeypatch):
    """Of a matrix whose scales come first in the file, the values would have to be kept."""
    mj.save(make(), tmp_path / "a")
    waiting, most, take = {}, [], packed_files._Both.take

    def watched(both, half):
        def read():
            tensor = take(both, half)()
            waiting[both] = sum(part.nbytes for part in both.waiting.values())
            most.append(sum(waiting.values()))
            return tensor

        return read

    monkeypatch.setattr(packed_files._Both, "take", watched)

    def check(ordered):
        most.clear()
        waiting.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writing, "_aligned", ordered)
            checkpoint.convert(tmp_path / "a", tmp_path / "b", quantize="int8", device="cpu")
        assert max(most) < 2000, max(most)

    check(writing._aligned)
    assert_rejects(check, lambda outputs: sorted(outputs, key=lambda output: -output.dtype.itemsize))


def test_every_tensor_starts_at_a_multiple_of_its_itemsize(tmp_path, monkeypatch):
    narrow = writing.Output("narrow", torch.bfloat16, (3,), lambda: torch.ones(3))
    wide = writing.Output("wide", torch.float32, (2,), lambda: torch.ones(2))

    def check(ordered):
        monkeypatch.setattr(writing, "_aligned", ordered)
        writing.write_file(tmp_path / "file", [narrow, wide], lambda *_: None)
        content = (tmp_path / "file").read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        assert all(header[output.name]["data_offsets"][0] % output.dtype.itemsize == 0 for output in (narrow, wide))

    check(writing._aligned)
    assert_rejects(check, lambda outputs: outputs)


def test_what_a_gpu_sets_aside_grows_with_the_blocks(monkeypatch):
    """Beside the weights: 128 blocks, which are smaller for a small model, at least the largest tensor."""
    for module in (checkpoint, import_module("minijamba.budget")):
        monkeypatch.setattr(module, "available_memory", lambda device: 2**40)
    monkeypatch.setattr(stream, "read_threads", lambda: 16)

    def beside(name, packed=False):
        need = checkpoint._memory(mj.preset(name), "bfloat16", None, torch.device("cuda"), name, packed)
        return need.bytes - mj.budget(mj.preset(name), dtype="bfloat16").weight_bytes

    def check(expected):
        assert (beside("tiny"), beside("jamba-v0.1"), beside("tiny", packed=True)) == expected

    check((128 * stream.LEAST, 2**31, 2**31))
    assert 2**27 < beside("mamba-130m") < 2**30
    assert_rejects(check, (0, 2**31, 2**31), (2**31, 2**31, 2**31), (128 * stream.LEAST, 0, 2**31))


def test_schemes_do_not_mix(packed, make, tmp_path):
    words = ["quantize is 'int4'", "packed as 'int8-all'", "leave quantize None", "not quantized"]
    assert_names(refusal(mj.load, packed, "cpu", "auto", "int4"), words)
    message = refusal(lambda: checkpoint.convert(packed, tmp_path / "again", quantize="int8-all"))
    assert_names(message, [str(packed), "packed as int8-all", "made from"])
    model = mj.load(packed, "cpu")
    model.lm_head = torch.nn.Linear(32, 41, bias=False)
    assert_names(refusal(mj.save, model, tmp_path / "a"), ["packed weights", "are not those of int8, int4"])
    model = mj.load(packed, "cpu")
    model.model.layers[0].extra = torch.nn.Parameter(torch.zeros(2))
    assert_names(refusal(mj.save, model, tmp_path / "a"), ["model.layers.0.extra", "config"])


# Memory


def test_a_model_that_fits_only_packed_is_refused_with_the_schemes_that_fit(make, tmp_path, monkeypatch):
    config = replace(BASE, hidden_size=256, intermediate_size=512)
    mj.save(make(config), tmp_path)
    full, small = (mj.budget(config, quantize=q).weight_bytes for q in (None, "int8"))
    monkeypatch.setattr(import_module("minijamba.budget"), "available_memory", lambda device: (full + small) // 2)

    def check(quantize):
        mj.load(tmp_path, "cpu", quantize=quantize)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "Jamba", None)
        words = ["in float32 needs", "but cpu has", "use quantize='int8' (", "'int4' (", "a dtype of fewer bits"]
        assert_names(refusal(check, None), words)
    check("int8")


@pytest.mark.parametrize("said", ["CUDA out of memory. Tried to allocate 1 GiB", "[enforce] can't allocate memory"])
@pytest.mark.parametrize("place", ["_unfilled", "fill"])
def test_running_out_of_memory_on_the_way_is_a_sentence(make, tmp_path, monkeypatch, place, said):
    mj.save(make(replace(BASE, hidden_size=256, num_experts=1)), tmp_path)
    kind = torch.OutOfMemoryError if "CUDA" in said else RuntimeError

    def run_out(*_, **__):
        raise kind(said)

    monkeypatch.setattr(checkpoint, place, run_out)
    message = refusal(mj.load, tmp_path, "cpu", "auto", "int8")
    words = [
        str(tmp_path),
        "in float32 and int8 needs",
        "cpu ran out of memory",
        "free before",
        "or use quantize='int8-all' (",
    ]
    assert_names(message, words)
    monkeypatch.setattr(checkpoint, place, lambda *_, **__: 1 / 0 if place == "fill" else [].pop())
    with pytest.raises(ZeroDivisionError if place == "fill" else IndexError):
        mj.load(tmp_path, "cpu", quantize="int8")


def test_no_copy_in_full_precision_is_held(tmp_path):
    """Peak memory of loading packed: the packed model, one tensor, and what Python and PyTorch keep beside it."""
    config = mj.preset("tiny", hidden_size=512, intermediate_size=2048, num_experts=8, num_hidden_layers=4)
    checkpoint.write_random(config, tmp_path, device="cpu")
    code = (
        "import sys, psutil, minijamba as mj, torch; torch.set_num_threads(1)\n"
        "from minijamba import stored\n"
        "process, read, peak = psutil.Process(), stored.Stored.read_into, 0\n"
        "def sampled(*arguments):\n"
        "    global peak\n"
        "    read(*arguments)\n"
        "    peak = max(peak, process.memory_info().rss)\n"
        "stored.Stored.read_into = sampled\n"
        "for _ in range(2):\n"
        "    peak, before = 0, process.memory_info().rss\n"
        "    mj.load(sys.argv[1], 'cpu', quantize=sys.argv[2] or None)\n"
        "print(peak - before)"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}

    def check(quantize):
        command = [sys.executable, "-c", code, tmp_path, quantize]
        peak = int(subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout)
        largest = 2048 * 512 * 4
        assert peak < mj.budget(config, quantize="int8").weight_bytes + 5 * largest, f"{peak:,}"

    assert mj.budget(config).file_bytes > 200e6
    check("int8")
    assert_rejects(check, "")


# Interrupted

SAVE = """
import sys, time, minijamba as mj
from minijamba import writing
model, write_file = mj.load(sys.argv[1], "cpu", quantize="int8"), writing.write_file
writing.THREADS = 1

def slowly(file, outputs, written):
    write_file(file, outputs, written)
    print(file.name, flush=True)
    time.sleep(0.05)

writing.write_file = slowly
mj.save(model, sys.argv[2], shard_bytes=3000)
"""


def test_a_killed_save_is_never_taken_for_a_checkpoint(make, tmp_path):
    """kill -9 after the third file: an absent target stays absent, an earlier checkpoint stays whole."""
    mj.save(make(), tmp_path / "plain")
    mj.save(make(replace(BASE, num_experts=1)), tmp_path / "earlier")
    earlier = {file.name: file.read_bytes() for file in (tmp_path / "earlier").iterdir()}

    def killed(target, files):
        command = [sys.executable, "-c", SAVE, tmp_path / "plain", target]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for _ in range(files):
            assert process.stdout.readline().startswith("model-")
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        return [file for file in tmp_path.rglob("*.safetensors") if file.parent.name.startswith(".")]

    assert len(killed(tmp_path / "absent", 3)) >= 3, "it was half way"
    assert_names(refusal(mj.load, tmp_path / "absent"), ["absent does not exist"])
    killed(tmp_path / "earlier", 3)
    assert {file.name: file.read_bytes() for file in (tmp_path / "earlier").iterdir()} == earlier
    mj.load(tmp_path / "earlier", "cpu")
    # What was left behind is no checkpoint either, and a new save takes no notice of it.
    for left in tmp_path.glob(".absent.*"):
        refusal(mj.load, left, "cpu")
    mj.save(make(), tmp_path / "absent")
    mj.load(tmp_path / "absent", "cpu")


# Random checkpoints


def test_the_plan_of_a_random_jamba_is_the_released_layout():
    config = mj.preset("jamba-v0.1")
    plan = writing.planned_files(checkpoint.random_outputs(config, 0, torch.device("cpu")), 5_000_000_000)

    def check(plan):
        outputs = [output for file in plan.values() for output in file]
        assert list(plan) == [f"model-{i:05}-of-00021.safetensors" for i in range(1, 22)]
        assert len(outputs) == 1251 and sum(output.nbytes for output in outputs) == 103_140_646_656
        shapes = {output.name: (output.shape, output.dtype) for output in outputs}
        assert shapes["model.layers.31.feed_forward.experts.15.down_proj.weight"] == ((4096, 14336), torch.bfloat16)
        assert shapes["model.layers.0.mamba.conv1d.weight"] == ((8192, 1, 4), torch.bfloat16)
        assert max(sum(output.nbytes for output in file) for file in plan.values()) <= 5_000_000_000

    check(plan)
    large = checkpoint.random_outputs(replace(config, tie_word_embeddings=True), 0, torch.device("cpu"))
    outputs = [output for file in plan.values() for output in file]
    assert_rejects(check, writing.planned_files(large, 5_000_000_000), writing.planned_files(outputs, 4_900_000_000))


@pytest.mark.parametrize("name", ["jamba", "mixtral", "llama", "blackmamba", "minijamba"])
def test_a_random_checkpoint_loads(tmp_path, name):
    config = CONFIGS[name]
    checkpoint.write_random(config, tmp_path / "a", seed=3, dtype="bfloat16", device="cpu", shard_bytes=SHARD)
    checkpoint.write_random(config, tmp_path / "b", seed=3, dtype="bfloat16", device="cpu")
    checkpoint.write_random(config, tmp_path / "c", seed=4, dtype="bfloat16", device="cpu")
    model = mj.load(tmp_path / "a", "cpu")
    assert model.dtype == torch.bfloat16 and model.config.schedule == config.schedule
    index = json.loads((tmp_path / "a" / INDEX).read_text())
    assert index["metadata"]["total_size"] == 2 * mj.budget(config).total_params
    assert len(index["weight_map"]) == mj.budget(config).tensors

    def check(folder):
        assert_same(mj.load(tmp_path / folder, "cpu"), model)

    check("b")
    assert_rejects(check, "c")


def test_a_tensor_of_a_random_checkpoint_is_its_own():
    """Whatever else is drawn: the same seed and name give the same numbers, another of either give others."""
    named = {weight.name: weight for weight in weights(BASE)}
    up, gate = (named[f"model.layers.1.feed_forward.experts.1.{part}_proj.weight"] for part in ("up", "gate"))

    def check(weight, seed):
        torch.manual_seed(seed + 5)
        assert_matches(random_weights.random_weight(weight, BASE, seed), first, 0)

    first = random_weights.random_weight(up, BASE, 0)
    check(up, 0)
    assert_rejects(lambda seed: check(up, seed), 1)
    assert_rejects(lambda weight: check(weight, 0), gate)


@torch.no_grad()
def test_random_weights_behave(tmp_path):
    """32 layers: the stream neither vanishes nor explodes, and routing is no coin toss."""
    config = mj.preset(
        "jamba-v0.1", vocab_size=512, hidden_size=128, intermediate_size=128, num_attention_heads=4,
        num_key_value_heads=2, dtype="float32",
    )  # fmt: skip
    checkpoint.write_random(config, tmp_path, device="cpu")
    tokens = torch.randint(512, (1, 128), generator=torch.Generator().manual_seed(0))

    def check(model):
        trace = mj.model.Trace()
        logits = model(tokens, trace=trace)
        sizes = [hidden.pow(2).mean().sqrt().item() for hidden in trace.hidden]
        assert 0.8 < sizes[0] < 1.2 and 1.1 < sizes[-1] < 3 and max(sizes) < 3
        assert all(1 < router.std() < 2 for router in trace.router) and len(trace.router) == 16
        assert 0.5 < logits.std() < 2
        load = torch.stack([experts.flatten().bincount(minlength=16) for experts in trace.experts])
        assert load.max() < 128 and (load == 0).float().mean() < 0.2
        delta = torch.nn.functional.softplus(model.model.layers[0].mamba.dt_proj.bias)
        assert 0.9e-3 < delta.min() < 2e-3 and 0.05 < delta.max() < 0.11

    def changed(part, factor):
        model = mj.load(tmp_path, "cpu")
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.mul_(factor)
        return model

    check(mj.load(tmp_path, "cpu"))
    assert_rejects(check, changed("router", 0.01), changed("down_proj", 20), changed("down_proj", 0))
    assert_rejects(check, changed("dt_proj.bias", 0), changed("lm_head", 30))


def test_a_random_checkpoint_needs_its_place(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert_names(refusal(checkpoint.write_random, BASE, tmp_path / "mine"), ["mine holds notes.txt", "another folder"])
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(100, 90, 10))
    monkeypatch.setattr(random_weights, "_seed_of", lambda *_: pytest.fail("numbers were drawn"))
    message = refusal(checkpoint.write_random, BASE, tmp_path / "a", error=OSError)
    assert_names(message, ["bytes are needed and 10 are free", "make room"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]


# The report


def test_the_report_adds_up(packed):
    start = time.perf_counter()
    _, report = checkpoint.load_timed(packed, "cpu")
    seconds = time.perf_counter() - start
    stored = sum(tensor.nbytes for tensor in memory(mj.load(packed, "cpu")).values())

    def check(report):
        parts = report.headers + report.waiting + report.placing
        assert 0.3 * seconds < parts <= report.total <= seconds and min(report.headers, report.reading) > 0
        assert report.bytes == stored and report.threads >= 2

    check(report)
    assert_rejects(check, replace(report, total=2 * seconds), replace(report, bytes=stored + 1))
