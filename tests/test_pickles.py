"""Pickles: read for families that were released so, as far as they hold tensors; no code in them ever runs."""

import builtins
import io
import json
import os
import pickle
import random
import re
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from refusals import assert_names, refusal
from safetensors.torch import load_file, save_file
from torch import Tensor

import minijamba as mj
from minijamba import checkpoint
from minijamba.testing import assert_matches, assert_rejects

BIN = "pytorch_model.bin"
SIZES = {
    "vocab_size": 43, "hidden_size": 16, "intermediate_size": 12, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
# The content of config.json, without a dtype: families that were released as pickles, and others.
MAMBA = {
    "model_type": "mamba", "vocab_size": 43, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4,
    "conv_kernel": 3, "time_step_rank": 2,
}  # fmt: skip
BLACKMAMBA = {
    "num_layers": 3, "hidden_size": 16, "state_size": 4, "conv_dimension": 3, "vocab_size": 43, "expansion_factor": 2,
    "mamba_moe_layers": ["r", "3", "1"], "ffn_hidden_size": 12, "add_bias_linear": False, "swiglu": True,
    "max_sequence_length": 2048,
}  # fmt: skip
PICKLED = {"mamba": MAMBA, "blackmamba": BLACKMAMBA}
OTHERS = {
    "jamba": SIZES | {"model_type": "jamba", "num_hidden_layers": 2, "num_experts": 2, "mamba_d_state": 4},
    "llama": SIZES | {"model_type": "llama", "num_hidden_layers": 2},
    "mistral": SIZES | {"model_type": "mistral", "num_hidden_layers": 2},
    "mixtral": SIZES | {"model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": 2},
}
NORM = {"mamba": "backbone.norm_f.weight", "blackmamba": "decoder.final_layernorm.weight"}
TOKENS = torch.tensor([[1, 17, 5, 40, 5, 0, 23, 17, 8, 2, 2, 31]])

families = pytest.mark.parametrize("family", PICKLED)


@pytest.fixture
def release(long_memory, tmp_path) -> Callable[..., tuple[Path, dict[str, Tensor]]]:
    """release(family, field=value, ...): a folder of config.json and pickle, and the tensors in the pickle."""

    def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes):
        values = (PICKLED | OTHERS)[family] | changes
        model = long_memory(mj.Jamba(mj.JambaConfig.from_dict(values)).float(), seed)
        folder = tmp_path / f"released {len(list(tmp_path.iterdir()))}"
        mj.save(model, folder)
        state = {name: tensor.clone().to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
        (folder / "model.safetensors").unlink()
        (folder / "config.json").write_text(json.dumps(values))
        torch.save({"model": state} if family == "blackmamba" else state, folder / BIN)
        return folder, state

    return build


@torch.no_grad()
def logits(model: mj.Jamba) -> Tensor:
    return model(TOKENS).double()


def loaded(path: Path) -> Tensor:
    return logits(mj.load(path, device="cpu", dtype="float64"))


def readers(folder: Path) -> list[Callable[[Path], object]]:
    return [mj.load, lambda path: checkpoint.convert(path, folder.with_name("converted"))]


def check_refused(folder: Path, words: list[str]) -> None:
    """Neither load nor convert takes the file, given as folder or file; both say why, and nothing is written."""
    before = sorted(folder.parent.rglob("*"))
    for path in (folder, folder / BIN):
        for read in readers(folder):
            assert_names(refusal(read, path), words)
    assert sorted(folder.parent.rglob("*")) == before


# What is read


@families
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("wrapped", [True, False], ids=["under model", "bare"])
def test_every_way_to_save_tensors_is_read(release, tmp_path, family, zipped, wrapped):
    folder, state = release(family)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    expected = loaded(tmp_path / "model.safetensors")

    def check(state):
        torch.save({"model": state} if wrapped else state, folder / BIN, _use_new_zipfile_serialization=zipped)
        assert_matches(loaded(folder), expected, 0, "logits")
        assert_matches(loaded(folder / BIN), expected, 0, "logits of the file itself")
        assert_matches(loaded(str(folder / BIN)), expected, 0, "logits of the file itself")

    def with_metadata(state):
        ordered = OrderedDict(state)
        ordered._metadata = OrderedDict({"": {"version": 1}})
        return ordered

    check(state)
    check({name: torch.nn.Parameter(tensor) for name, tensor in state.items()})
    check(with_metadata(state))
    # Views: transposed in memory, or the middle of a larger storage.
    check({name: tensor.T.contiguous().T if tensor.dim() == 2 else tensor for name, tensor in state.items()})
    check({name: torch.cat([tensor[:1], tensor, tensor[:1]])[1:-1] for name, tensor in state.items()})
    changed = NORM[family]
    assert_rejects(check, state | {changed: state[changed].flip(0)}, state | {changed: torch.ones_like(state[changed])})


@families
def test_a_file_of_another_name_is_read_where_it_is_named(release, family):
    folder, _ = release(family)
    expected = loaded(folder)
    other, _ = release(family, seed=1)

    def check(content):
        for name in ("last.pt", "model.pth", "step 7.ckpt", "weights.bin"):
            (folder / name).write_bytes(content)
            assert_matches(loaded(folder / name), expected, 0, name)

    check((folder / BIN).read_bytes())
    assert_rejects(check, (other / BIN).read_bytes())
    # A folder is known by the released name alone.
    (folder / BIN).unlink()
    assert_names(refusal(mj.load, folder), [str(folder), "is not called pytorch_model.bin", "rename"])


@families
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_safetensors_go_before_a_pickle(release, tmp_path, family, sharded):
    """The pickle beside them is not even opened."""
    folder, _ = release(family)
    other, _ = release(family, seed=1)
    expected = loaded(other)
    checkpoint.convert(other, tmp_path / "safe", shard_bytes=500 if sharded else 5_000_000_000)

    def check(content):
        (tmp_path / "safe" / BIN).write_bytes(content)
        assert_matches(loaded(tmp_path / "safe"), expected, 0, "logits")

    check((folder / BIN).read_bytes())
    check(b"not a pickle")
    marker = tmp_path / "marker"
    check(pickle.dumps({"model": Trap(*CALLS["touch"](marker))}))
    assert not marker.exists()
    for file in (tmp_path / "safe").glob("*.safetensors*"):
        file.unlink()
    assert_rejects(check, (folder / BIN).read_bytes())


@families
@pytest.mark.parametrize("target", ["other", "the same folder"])
def test_converting_leaves_the_pickle(release, tmp_path, family, target):
    folder, state = release(family)
    before = (folder / BIN).read_bytes()
    if target == "other":
        checkpoint.convert(folder, tmp_path / "converted")
        assert_matches(loaded(tmp_path / "converted"), loaded(folder), 0, "logits")
        other, _ = release(family, seed=1)
        assert_rejects(lambda path: assert_matches(loaded(path), loaded(folder), 0), other)
    else:
        message = refusal(checkpoint.convert, folder, folder)
        assert_names(message, [str(folder), BIN, "another folder"])
        assert_rejects(lambda target: refusal(checkpoint.convert, folder, target), tmp_path / "elsewhere")
    assert (folder / BIN).read_bytes() == before


# Code


class Trap:
    """An object that is unpickled by a call."""

    def __init__(self, function: Callable, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


# What a pickle could call to leave a marker behind.
CALLS = {
    "touch": lambda marker: (Path.touch, Path(marker)),
    "open": lambda marker: (open, str(marker), "w"),
    "posix.system": lambda marker: (os.system, f"touch '{marker}'"),
    "exec": lambda marker: (builtins.exec, f"open({str(marker)!r}, 'w')"),
    "eval": lambda marker: (builtins.eval, f"open({str(marker)!r}, 'w')"),
    "torch.save": lambda marker: (torch.save, {}, str(marker)),
    "a pickle in it": lambda marker: (pickle.loads, pickle.dumps(Trap(open, str(marker), "w"))),
    "numpy": lambda marker: (np.ndarray.tofile, np.zeros(1), str(marker)),
}


def hooked(tensor: Tensor, trap: Trap) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(tensor)
    parameter.note = trap
    return parameter


def annotated(state: dict, trap: Trap) -> OrderedDict:
    ordered = OrderedDict(state)
    ordered._metadata = trap
    return ordered


# Where it hides among the tensors.
PLACES = {
    "alone": lambda state, trap: trap,
    "among the tensors": lambda state, trap: state | {"extra": trap},
    "before the tensors": lambda state, trap: {"extra": trap} | state,
    "under model": lambda state, trap: {"model": state | {"extra": trap}},
    "as model": lambda state, trap: {"model": trap},
    "beside model": lambda state, trap: {"model": state, "optimizer": trap},
    "in place of a tensor": lambda state, trap: dict.fromkeys(state, trap),
    "deep inside": lambda state, trap: {"model": {"a": [{"b": (1, trap)}]}},
    "on a parameter": lambda state, trap: {name: hooked(tensor, trap) for name, tensor in state.items()},
    "on the dictionary": annotated,
}


def dump(content, file: Path) -> None:
    file.write_bytes(pickle.dumps(content))


WAYS = {
    "zip": torch.save,
    "before 1.6": lambda content, file: torch.save(content, file, _use_new_zipfile_serialization=False),
    "plain pickle": dump,
}


def trusting(path: Path) -> None:
    """What must not be done."""
    file = path / BIN if path.is_dir() else path
    try:
        torch.load(file, weights_only=False)
    except Exception:  # a plain pickle has run by now, or runs here
        pickle.loads(file.read_bytes())
    raise ValueError(f"{file} holds more than tensors")


def check_code(folder: Path, marker: Path, read: Callable) -> None:
    """The file is refused by its name, whether it is given by its folder or itself, and no code in it has run."""
    for path in (folder, folder / BIN):
        message = refusal(read, path)
        assert not marker.exists(), "the code has run"
        assert_names(message, [str(folder / BIN), "holds more than tensors"])


@families
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("call", CALLS)
def test_code_is_refused_and_does_not_run(release, tmp_path, family, way, call):
    folder, state = release(family)
    marker = tmp_path / "marker"
    for place in ("alone", "under model"):
        WAYS[way](PLACES[place](state, Trap(*CALLS[call](marker))), folder / BIN)
        for read in readers(folder):
            check_code(folder, marker, read)
        assert_rejects(lambda read: check_code(folder, marker, read), trusting)
        marker.unlink()


@families
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", PLACES)
def test_code_is_found_wherever_it_hides(release, tmp_path, monkeypatch, family, way, place):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    folder, state = release(family)
    marker = tmp_path / "marker"
    WAYS[way](PLACES[place](state, Trap(*CALLS["open"](marker))), folder / BIN)
    for read in readers(folder):
        check_code(folder, marker, read)
    assert not (tmp_path / "converted").exists()
    assert_rejects(lambda read: check_code(folder, marker, read), trusting)


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_are_refused_unopened(release, tmp_path, monkeypatch, family):
    folder, state = release(family)
    marker = tmp_path / "marker"

    def check(files, read):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "load", lambda *_, **__: pytest.fail("the pickle was opened"))
            patch.setattr(pickle, "load", lambda *_, **__: pytest.fail("the pickle was opened"))
            for file in files:
                message = refusal(read, file)
                assert_names(message, [str(folder / BIN), "is a pickle", "only safetensors is read", "save_pretrained"])
        assert not marker.exists()

    for content in (state, {"model": state}, Trap(*CALLS["open"](marker))):
        for way in ("zip", "before 1.6"):
            WAYS[way](content, folder / BIN)
            for read in readers(folder):
                check([folder, folder / BIN], read)
    assert_rejects(lambda read: check([folder], read), lambda path: marker.touch())


# Other contents


def replaced(change: Callable[[Tensor], object]) -> Callable[[dict, str], object]:
    """The state dict with one tensor changed into something else."""
    return lambda state, name: state | {name: change(state[name])}


MORE = ["holds more than tensors"]
CONTENTS = {
    "a number": (lambda state, name: state | {"step": 7}, MORE),
    "a number in place of a tensor": (replaced(lambda tensor: 1.5), MORE),
    "nothing": (lambda state, name: None, MORE),
    "nothing in place of a tensor": (replaced(lambda tensor: None), MORE),
    "a text": (lambda state, name: state | {"note": "hello"}, MORE),
    "an array": (replaced(lambda tensor: tensor.numpy()), MORE),
    "a list of numbers": (replaced(Tensor.tolist), MORE),
    "a bare tensor": (lambda state, name: state[name], MORE),
    "a list": (lambda state, name: list(state.values()), MORE),
    "a module": (lambda state, name: torch.nn.Linear(2, 2), MORE),
    "a nested dictionary": (lambda state, name: {"state_dict": state}, MORE),
    "a dictionary among the tensors": (lambda state, name: state | {"more": {"x": state[name]}}, MORE),
    "model beside another key": (lambda state, name: {"model": state, "step": 7}, MORE),
    "model beside tensors": (lambda state, name: state | {"model": state}, MORE),
    "model in model": (lambda state, name: {"model": {"model": state}}, MORE),
    "model is a list": (lambda state, name: {"model": list(state.values())}, MORE),
    "numbered tensors": (lambda state, name: dict(enumerate(state.values())), MORE),
    "sparse": (replaced(Tensor.to_sparse), MORE),
    "sparse rows": (lambda state, name: state | {"x": torch.eye(3).to_sparse_csr()}, MORE),
    "nested": (replaced(lambda tensor: torch.nested.nested_tensor([tensor, tensor[:2]])), []),
    "without memory": (replaced(lambda tensor: tensor.to("meta")), []),
    "integers": (replaced(Tensor.long), ["int64", "only F64, F32, F16, BF16"]),
    "small integers": (replaced(Tensor.char), ["int8", "quantized"]),
    "truth values": (replaced(Tensor.bool), ["bool"]),
    "complex": (replaced(lambda tensor: tensor.to(torch.complex64)), ["complex64"]),
    "float8": (replaced(lambda tensor: tensor.to(torch.float8_e4m3fn)), []),
    "quantized": (replaced(lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)), ["qint8"]),
    "a tensor more": (lambda state, name: state | {"x": torch.ones(2)}, ["x, for which", "no place"]),
    "a tensor of another shape": (replaced(lambda tensor: tensor[1:]), ["(15,)", "(16,)"]),
}  # fmt: skip
ABSENT = {
    "empty": lambda state, name: {},
    "empty model": lambda state, name: {"model": {}},
    "a tensor less": lambda state, name: {key: tensor for key, tensor in state.items() if key != name},
}


@families
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("case", CONTENTS)
@pytest.mark.filterwarnings("ignore")
def test_anything_but_tensors_is_refused(release, family, case, zipped):
    folder, state = release(family)
    change, words = CONTENTS[case]

    def check(content):
        torch.save(content, folder / BIN, _use_new_zipfile_serialization=zipped)
        check_refused(folder, [str(folder / BIN), *words])

    check(change(state, NORM[family]))
    assert_rejects(check, state, {"model": state})


@families
@pytest.mark.parametrize("case", ABSENT)
def test_missing_tensors_are_named(release, family, case):
    folder, state = release(family)

    def check(content):
        torch.save(content, folder / BIN)
        for path in (folder, folder / BIN):
            assert_names(refusal(mj.load, path), [str(path), "no tensor", "config.json", "download"])

    check(ABSENT[case](state, NORM[family]))
    assert_rejects(check, state)


# Damaged files


def whole(content: dict, zipped: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def another_zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("word/document.xml", "<text/>")
    return stream.getvalue()


def torch_script() -> bytes:
    """As torch.jit.save names its files."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in ("model/data.pkl", "model/constants.pkl", "model/version", "model/code/__torch__.py"):
            archive.writestr(name, "3\n")
    return stream.getvalue()


def tar() -> bytes:
    """As the oldest releases of torch saved."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name))
    return stream.getvalue()


AGAIN = ["download or copy it again"]
FILES = {
    "empty": (b"", AGAIN),
    "a byte": (b"\x80", AGAIN),
    "zeros": (bytes(5000), []),
    "a text": (b"These are the weights, honestly.\n" * 9, []),
    "a web page": (b"<!DOCTYPE html>" * 9, []),
    "JSON": (b'{"error": "not found"}', []),
    "another zip": (another_zip(), AGAIN),
    "a zip without an end": (another_zip()[:-10], AGAIN),
    "TorchScript": (torch_script(), []),
    "tar": (tar(), []),
}  # fmt: skip


@families
@pytest.mark.parametrize("case", FILES)
@pytest.mark.filterwarnings("ignore")
def test_files_of_another_kind_are_refused(release, family, case):
    folder, _ = release(family)
    content, words = FILES[case]
    right = (folder / BIN).read_bytes()

    def check(content):
        (folder / BIN).write_bytes(content)
        check_refused(folder, [str(folder / BIN), *words])

    check(content)
    assert_rejects(check, right)


@families
def test_a_git_lfs_pointer_is_told_from_a_damaged_file(release, family):
    folder, _ = release(family)
    whole = (folder / BIN).read_bytes()

    def check(content):
        (folder / BIN).write_bytes(content)
        check_refused(folder, [str(folder / BIN), "Git LFS pointer", "git lfs pull"])

    check(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    assert_rejects(check, b"version 2 of my weights", b"", whole)


def test_text_is_not_taken_for_forbidden_content(release):
    """Nothing is known of what a file holds that cannot be read, so the message must not say that it holds code."""
    folder, _ = release("mamba")

    def check(content):
        (folder / BIN).write_bytes(content)
        message = refusal(mj.load, folder)
        assert_names(message, [str(folder / BIN)])
        assert "more than tensors" not in message
        assert not re.search(r"\(\d+\)", message), f"no reason: {message}"

    check(b"<!DOCTYPE html>" * 9)
    check(b"These are the weights, honestly.\n" * 9)
    assert_rejects(check, whole({"x": 1}, True))


@pytest.mark.parametrize("family", PICKLED)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_cut_off_files_are_refused(release, family, zipped):
    """Wherever the download broke off, the message names the file."""
    folder, state = release(family)
    content = whole({"model": state} if family == "blackmamba" else state, zipped)
    size, draw = len(content), random.Random(0)
    cuts = {0, 1, 2, 4, 8, 30, 64, 200, 1000, size // 3, size // 2, size - 1000, size - 22, size - 1}
    cuts |= {draw.randrange(size) for _ in range(30)}

    def check(cut):
        (folder / BIN).write_bytes(content[:cut])
        assert_names(refusal(mj.load, folder), [str(folder / BIN)])

    wrong = {}
    for cut in sorted(cuts):
        try:
            check(cut)
        except Exception as error:
            wrong[cut] = f"{type(error).__name__}: {error}"
    assert not wrong, wrong
    assert_rejects(check, size)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_a_changed_byte_never_raises_anything_else(release, zipped):
    """It shows, or it changed a number. The first bytes are changed: there the pickle is."""
    folder, state = release("mamba")
    content, draw = whole(state, zipped), random.Random(1)

    def check(read):
        wrong = {}
        for _ in range(300):
            changed = bytearray(content)
            place, value = draw.randrange(2000), draw.randrange(256)
            changed[place] = value
            (folder / BIN).write_bytes(changed)
            try:
                with warnings.catch_warnings(action="ignore"):
                    read(folder)
            except ValueError as error:
                if str(folder) not in str(error):
                    wrong[place, value] = str(error)
            except Exception as error:
                wrong[place, value] = f"{type(error).__name__}: {error}"
        assert not wrong, wrong

    assert_rejects(check, lambda folder: torch.load(folder / BIN, weights_only=True))
    check(mj.load)


# The dtype


DTYPES = ("float32", "float16", "bfloat16")


@families
@pytest.mark.parametrize("stored", DTYPES)
def test_auto_is_the_dtype_that_is_said_or_else_the_stored_one(release, family, stored):
    def check(expected, **said):
        folder, _ = release(family, dtype=getattr(torch, stored))
        values = json.loads((folder / "config.json").read_text()) | said
        (folder / "config.json").write_text(json.dumps(values))
        model = mj.load(folder, device="cpu")
        assert str(model.dtype) == f"torch.{expected}" and model.config.dtype == expected
        assert mj.load(folder, device="cpu", dtype="float16").dtype == torch.float16
        checkpoint.convert(folder, folder.with_name("safe"))
        assert json.loads((folder.with_name("safe") / "config.json").read_text())["torch_dtype"] == expected

    check(stored)
    check(stored, torch_dtype=None)
    check(stored, dtype=None, torch_dtype=None)
    others = [name for name in DTYPES if name != stored]
    assert_rejects(check, *others)
    for said in others:
        check(said, torch_dtype=said)
        check(said, dtype=said)
        assert_rejects(lambda expected, said=said: check(expected, torch_dtype=said), stored)


@families
def test_float64_does_not_become_bfloat16(release, family):
    """A dtype that config.json cannot say, and does not: whatever is taken, no more is lost than must be."""
    folder, state = release(family, dtype=torch.float64)

    def check(dtype):
        model = mj.load(folder, device="cpu", dtype=dtype)
        assert model.dtype in (torch.float32, torch.float64)
        # float32 through three layers.
        assert_matches(logits(model), loaded(folder), 1e-5, "logits")

    assert_rejects(check, "bfloat16")
    check("float32")
    check("auto")


@families
def test_memory_is_counted_in_the_stored_dtype(release, monkeypatch, family):
    """Room for the model in bfloat16 only: its float32 file is refused before memory is taken."""
    narrow, state = release(family, dtype=torch.bfloat16)
    numbers = sum(tensor.numel() for tensor in state.values()) + max(tensor.numel() for tensor in state.values())
    wide, _ = release(family)
    monkeypatch.setattr(import_module("minijamba.budget"), "available_memory", lambda device: 3 * numbers)

    def check(folder):
        assert_names(refusal(mj.load, folder, "cpu"), [str(folder), "in float32", "needs", "free"])

    assert_rejects(check, narrow)
    check(wide)


# The Hub


@pytest.mark.parametrize("family", PICKLED | OTHERS)
def test_a_pickle_is_downloaded_only_where_there_is_nothing_else(release, monkeypatch, tmp_path, family):
    folder, _ = release(family)
    downloads = []

    def snapshot_download(repo_id, allow_patterns):
        downloads.append(BIN in allow_patterns)
        target = tmp_path / f"snapshot{len(downloads)}"
        target.mkdir()
        for name in ("config.json", BIN, "model.safetensors"):
            file = folder / name
            if file.exists() and any(file.match(pattern) for pattern in allow_patterns):
                (target / name).write_bytes(file.read_bytes())
        # As the Hub's own client: all files of a repository lie in one folder.
        for earlier in tmp_path.glob("snapshot*/*"):
            if not (target / earlier.name).exists():
                (target / earlier.name).write_bytes(earlier.read_bytes())
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

    def check(expected):
        downloads.clear()
        for earlier in tmp_path.glob("snapshot*/*"):
            earlier.unlink()
        for empty in tmp_path.glob("snapshot*"):
            empty.rmdir()
        if family in PICKLED or not expected:
            mj.load("owner/name", "cpu")
        else:
            refusal(mj.load, "owner/name", "cpu")
        assert any(downloads) == expected

    if family in PICKLED:
        check(True)
        assert_rejects(check, False)
        checkpoint.convert(folder, tmp_path / "safe")
    else:
        assert_names(refusal(mj.load, "owner/name", "cpu"), ["neither model.safetensors nor"])
        assert not any(downloads)
        mj.save(mj.Jamba(mj.JambaConfig.from_dict(OTHERS[family])), tmp_path / "safe")
    (folder / "model.safetensors").write_bytes((tmp_path / "safe" / "model.safetensors").read_bytes())
    check(False)
    assert_rejects(check, True)
