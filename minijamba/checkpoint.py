"""Checkpoints in the layouts of the released files: load, save, convert.

A checkpoint is a folder with config.json and either model.safetensors or model.safetensors.index.json and its shards.
It is checked against its config before memory is taken, and then read tensor by tensor. A pickle is opened only for a
family that was released as one, and refused if it holds anything but tensors; what is written is always safetensors.
"""

import json
import math
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from secrets import token_hex
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .budget import KEPT_FLOAT32, refuse_if_too_large, released, weights
from .config import DTYPES, JambaConfig
from .families import Family, rename
from .model import Jamba
from .rungs import find_device

# Our name for stacked experts -> the names in a Jamba's files, where {e} counts them. All others are equal there; what
# other families call them is in `families`.
STACKED = {
    f"experts.{name}_{ours}": f"experts.{{e}}.{name}_proj.{stored}"
    for name in ("gate", "up", "down")
    for ours, stored in (("proj", "weight"), ("bias", "bias"))
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
WEIGHTS = ("model*.safetensors",)
COMPANIONS = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "chat_template*", "README*", "LICENSE*",
)  # fmt: skip
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
NO_PICKLE = (
    "is a pickle, which can run code when opened, and only safetensors is read: if you trust it, rewrite it once with "
    "transformers' AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
)
LFS_POINTER = b"version https://git-lfs"
NO_LFS_POINTER = "is a Git LFS pointer, not the weights: run `git lfs pull` in its folder"
NO_TENSORS = (
    "holds more than tensors under names, so it was refused before any of it ran: a checkpoint of this family is a "
    "dictionary of tensors, or one under the key `model`; download it again from where you trust it"
)
# The small Jamba that was trained here on Python's own source; it is in the repository, not in an installed package.
SHIPPED = Path(__file__).resolve().parents[1] / "data" / "checkpoints" / "python"
LONGEST_HEADER = 100_000_000  # bytes, a limit of the format
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load(
    path_or_repo_id: str | os.PathLike = SHIPPED,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quantize: None = None,
) -> Jamba:
    """The model of a checkpoint.

        model = mj.load()                              # the small trained one of this repository
        model = mj.load("checkpoints/mine")            # a folder, or a .safetensors file beside its config.json
        model = mj.load("ai21labs/Jamba-tiny-dev")     # an id of the Hugging Face Hub, downloaded once
        model = mj.load("state-spaces/mamba-130m-hf")  # any family that is in `families`, known from its config.json

    Reads shards with their index or a single file, tied heads, and the names of first releases. All is checked before
    memory is taken; then memory holds the model and one tensor at most. A head that is stored although the config ties
    it must equal the embedding. Mamba and BlackMamba were released as pickles: those are opened with weights_only=True,
    and refused if they hold anything but tensors.

    Args:
        device:   "auto" is the GPU where CUDA finds one, otherwise the CPU.
        dtype:    "float32", "bfloat16", "float16", "float64" or torch's own; "auto" is the config's, or the stored one
                  where it says none. A_log and delta's bias are float32 at least.
        quantize: None; weights of fewer bits are not in this version.
    Raises: ValueError with file, tensor and remedy for whatever is wrong with the checkpoint, or if it does not fit in
        memory; ConnectionError if an id cannot be downloaded.
    """
    if quantize is not None:
        raise ValueError(f"quantize is {quantize!r}, but int8 and int4 weights are not in this version: leave it None")
    device = find_device(device)
    config = _config(locate(path_or_repo_id, weights=False))
    _memory(config, dtype, device, path_or_repo_id)
    path = locate(path_or_repo_id, pickled=config.family.pickle)
    stored = _match(config, path)
    config = _with_stored_dtype(config, path, stored)
    dtype, total = _memory(config, dtype, device, path_or_repo_id)
    model = _unfilled(config, dtype, device)
    with _bar(f"loading {path_or_repo_id}", total) as bar:
        for name, tensor in _tensors(model).items():
            tensor.copy_(stored[name].read())
            bar.update(tensor.nbytes)
    return model.eval()


def _memory(config: JambaConfig, dtype: str | torch.dtype, device: torch.device, name) -> tuple[torch.dtype, int]:
    """The dtype to load in, and the bytes of the weights; ValueError if they do not fit with one tensor beside them."""
    dtype = _dtype(dtype, config.dtype, (*DTYPES, "float64"))
    sizes = [weight.size * _held(weight.name, dtype).itemsize for weight in weights(config)]
    refuse_if_too_large(sum(sizes) + max(sizes), device, f"{name} in {_name(dtype)}")
    return dtype, sum(sizes)


def save(
    model: Jamba, path: str | os.PathLike, *, shard_bytes: int = 5_000_000_000, dtype: str | torch.dtype = "auto"
) -> None:
    """Write a checkpoint that `load`, and AutoModelForCausalLM of transformers, read.

    Its layout is that of the first family that can say the model (`config.family`). Two are read by `load` alone:
    BlackMamba, which transformers does not have, and "minijamba", for models that no family can say.

    It is written to a hidden folder beside `path` that takes its place at the end: if anything fails, an earlier
    checkpoint stays as it was, or, should the process be killed between the two renames, beside it as `.name.*.old`.
    Its tokenizer files are kept. Beside the model, memory holds one shard at most.

    Args:
        path:        a folder that is absent, empty or a checkpoint; the folders above it are made.
        shard_bytes: most bytes of tensors in a file that holds more than one.
        dtype:       "float32", "bfloat16" or "float16", with A_log and delta's bias in float32; "auto" keeps every
                     tensor as it is.
    Raises: ValueError if the folder holds other things; OSError if it cannot be written or the disk is too small.
    """
    file_dtype = _dtype(dtype, _name(model.dtype), DTYPES)
    tensors = {
        name: Output(name, tensor.dtype if dtype == "auto" else _held(name, file_dtype), tensor.shape, tensor.detach)
        for name, tensor in _planned(model).items()
    }
    _write(path, replace(model.config, dtype=_name(file_dtype)), _joined(model.config, tensors), shard_bytes)


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    dtype: str | torch.dtype = "auto",
    *,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a checkpoint of any layout that `load` reads as `save` does, with its tokenizer files.

    dtype: as for `save`; "auto" keeps every tensor as stored. Memory holds one shard at a time, never the model.
    Raises: as `load` and `save`.
    """
    path = locate(source, weights=False)
    config = _config(path)
    path = locate(source, pickled=config.family.pickle)
    stored = _match(config, path)
    config = _with_stored_dtype(config, path, stored)
    file_dtype = _dtype(dtype, config.dtype, DTYPES)
    tensors = {}
    for name, tensor in stored.items():
        kept = FLOATS[tensor.dtype] if dtype == "auto" else _held(name, file_dtype)
        tensors[name] = Output(name, kept, tensor.shape, tensor.read)
    config = replace(config, dtype=_name(file_dtype))
    _write(target, config, _joined(config, tensors), shard_bytes, _companions(_folder(path)))


def locate(path_or_repo_id: str | os.PathLike, weights: bool = True, pickled: str | None = None) -> Path:
    """Where a checkpoint is on this machine: the given folder or file, or the folder that an id is downloaded to.

    weights=False downloads config and tokenizer alone; `pickled` names a file to take where there is no safetensors.
    A folder here goes before an id of the same name.
    Raises: ValueError if there is neither; ConnectionError if the download fails.
    """
    path = Path(path_or_repo_id).expanduser()
    if path.exists():
        return path
    if path == SHIPPED:
        raise ValueError(
            f"{path} does not exist: the trained model is in the repository, not in the installed package; "
            f"clone it and run pip install -e . inside, or give another checkpoint"
        )
    is_id = isinstance(path_or_repo_id, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path_or_repo_id)
    if not is_id or path.suffix == ".safetensors":
        raise ValueError(f"{path} does not exist: give the folder of a checkpoint, or a Hub id of the form owner/name")
    folder = _download(path_or_repo_id, [CONFIG, INDEX, *COMPANIONS, *(WEIGHTS if weights else ())])
    if weights and pickled and not _matching(folder, WEIGHTS):
        folder = _download(path_or_repo_id, [pickled])
    return folder


def _download(repo_id: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns))
    except GatedRepoError:
        raise ValueError(
            f"{repo_id} is gated: accept its terms on https://huggingface.co/{repo_id} and log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"{repo_id} is neither a folder here nor a repository of the Hub: correct the path or the id, or log in "
            f"with `hf auth login` if it is private"
        ) from None
    except OSError as error:
        reason = str(error).strip().splitlines()[0].split(". ")[0]
        raise ConnectionError(
            f"{repo_id} is no folder here, and the Hub does not give it ({reason}): connect to the network, or copy "
            f"the checkpoint to this machine and give its folder"
        ) from None


def _tensors(model: Jamba) -> dict[str, Tensor]:
    """The model's memory by the names of `weights`: parameters, each expert's share of stacked ones. No tied head."""
    found = {}
    for ours, parameter in model.named_parameters():
        name = rename(ours, STACKED)
        shares = [parameter.detach()] if name == ours else parameter.detach()
        found |= {name.format(e=e): share for e, share in enumerate(shares)}
    return found


class _NoDraws(TorchFunctionMode):
    """Leaves out the drawing of random weights: for billions that are overwritten at once it takes minutes."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def _unfilled(config: JambaConfig, dtype: torch.dtype, device: torch.device) -> Jamba:
    """A model whose memory is not written yet."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # every parameter is made in its dtype at once, never converted
    try:
        with torch.device(device), _NoDraws():
            model = Jamba(config)
    finally:
        torch.set_default_dtype(default)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(_held(name, dtype))
    return model


def _held(name: str, dtype: torch.dtype) -> torch.dtype:
    """What a tensor has in a model of `dtype`."""
    return torch.promote_types(dtype, torch.float32) if name.endswith(KEPT_FLOAT32) else dtype


class Stored(NamedTuple):
    """A tensor in a file, or some of its rows, as the file's header describes it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    rows: slice | None = None
    mapped: Tensor | None = None  # of a pickle, whose pages are read when they are needed

    def read(self) -> Tensor:
        from safetensors import safe_open

        if self.mapped is not None:
            return self.mapped if self.rows is None else self.mapped[self.rows]
        # Opened anew for each tensor: an open file keeps all pages that were read from it in memory.
        with safe_open(self.file, framework="pt") as file:
            return file.get_tensor(self.name) if self.rows is None else file.get_slice(self.name)[self.rows]


def _match(config: JambaConfig, path: Path) -> dict[str, Stored]:
    """Our name -> where it is stored; ValueError unless the file holds exactly what the config describes."""
    family, layout = config.family, released(config)
    stored = _read_headers(path, family)
    shapes = {name: _joined_shape([weight.shape for weight in parts]) for name, parts in layout.items()}
    found = {name: stored.get(name) or stored.get(rename(name, family.older)) for name in shapes}
    head, embedding = rename(HEAD, family.names), rename(EMBEDDING, family.names)
    _check_floats(stored)
    if missing := [name for name, tensor in found.items() if tensor is None]:
        tie = ", set tie_word_embeddings to true if the head is the embedding" if head in missing else ""
        raise ValueError(
            f"{path}: no tensor {_listed(missing)}, which {CONFIG} asks for: download the checkpoint again{tie}, or "
            f"correct the schedule and num_experts in {CONFIG}"
        )
    extra = stored.keys() - {tensor.name for tensor in found.values()}
    if family.passed_over:
        extra = {name for name in extra if not name.endswith(family.passed_over)}
    if config.tie_word_embeddings and head in extra:
        _check_tied(stored[head], found[embedding])
        extra.remove(head)
    if extra:
        raise ValueError(
            f"{stored[min(extra)].file}: {_listed(sorted(extra))}, for which the model of {CONFIG} has no place: "
            f"correct {CONFIG} (num_hidden_layers, num_experts, the schedule, biases), or take it out of the file"
        )
    _check_shapes(found, shapes)
    return {name: share for stored_name, parts in layout.items() for name, share in _shares(found[stored_name], parts)}


def _shares(stored: Stored, parts: list) -> Iterator[tuple[str, Stored]]:
    """Each of our tensors that a stored one holds, row after row."""
    first = 0
    for part in parts:
        rows = None if len(parts) == 1 else slice(first, first + part.shape[0])
        yield part.name, stored._replace(shape=part.shape, rows=rows)
        first += part.shape[0]


def _joined_shape(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _with_stored_dtype(config: JambaConfig, path: Path, stored: dict[str, Stored]) -> JambaConfig:
    """The config with the dtype of the stored embedding, float32 at most, where config.json says none."""
    said = json.loads((_folder(path) / CONFIG).read_text(encoding="utf-8"))
    if said.get("dtype") or said.get("torch_dtype"):
        return config
    name = _name(FLOATS[stored[EMBEDDING].dtype])
    return replace(config, dtype=name if name in DTYPES else "float32")


def _check_floats(stored: dict[str, Stored]) -> None:
    for tensor in stored.values():
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{tensor.file}: {tensor.name} is {tensor.dtype}, but only {', '.join(FLOATS)} are read: give the "
                f"checkpoint that was not quantized"
            )


def _check_shapes(found: dict[str, Stored], shapes: dict[str, tuple[int, ...]]) -> None:
    for name, tensor in found.items():
        if tensor.shape != shapes[name]:
            raise ValueError(
                f"{tensor.file}: {tensor.name} has shape {tensor.shape}, but {CONFIG} asks for {shapes[name]}: one of "
                f"the two files belongs to another checkpoint"
            )


def _check_tied(head: Stored, embedding: Stored) -> None:
    if head.dtype != embedding.dtype or not torch.equal(head.read(), embedding.read()):
        raise ValueError(
            f"{head.file}: {head.name} differs from {embedding.name}, but the model ties them: set "
            f"tie_word_embeddings to false where {CONFIG} has it, or take {head.name} out of the file"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _config(path: Path) -> JambaConfig:
    return JambaConfig.from_json(_folder(path) / CONFIG)


def _read_headers(path: Path, family: Family) -> dict[str, Stored]:
    """Every tensor of a checkpoint by its stored name; the tensors themselves stay on disk."""
    if path.is_file():
        pickled = family.pickle and any(fnmatch(path.name, pattern) for pattern in PICKLES)
        return _read_pickle(path) if pickled else _read_header(path)
    single, index = path / SINGLE, path / INDEX
    if single.exists() and index.exists():
        raise ValueError(f"{path} holds both {SINGLE} and {INDEX}, which may differ: remove the outdated one")
    if index.exists():
        return _read_shards(index)
    if single.exists():
        return _read_header(single)
    if family.pickle and (path / family.pickle).is_file():
        return _read_pickle(path / family.pickle)
    if pickles := _matching(path, PICKLES):
        other = f"is not called {family.pickle}: rename it, or give the file itself" if family.pickle else NO_PICKLE
        raise ValueError(f"{pickles[0]} {other}")
    raise ValueError(f"{path} holds neither {SINGLE} nor {INDEX}: download them, or give another .safetensors file")


def _read_shards(index: Path) -> dict[str, Stored]:
    weight_map = _weight_map(index)
    files = sorted(set(weight_map.values()))
    if missing := [file for file in files if not (index.parent / file).is_file()]:
        raise ValueError(f"{index.parent}: {_listed(missing)} missing, named by {INDEX}: download or copy it again")
    shards = {file: _read_header(index.parent / file) for file in files}
    for name, file in weight_map.items():
        if name not in shards[file]:
            place = next((f"in {other}" for other in files if name in shards[other]), "in no shard")
            raise ValueError(f"{index}: {name} is not in {file} but {place}: download index and shards again")
    for file, shard in shards.items():
        if unknown := [name for name in shard if weight_map.get(name) != file]:
            raise ValueError(
                f"{index.parent / file}: {_listed(unknown)}, which {INDEX} does not place there: download index and "
                f"shards again"
            )
    return {name: shards[file][name] for name, file in weight_map.items()}


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name. A file outside the folder is refused."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        valid = weight_map and all(Path(file).name == file for file in weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise ValueError(f"{index} holds no weight_map from tensors to files of its folder: download it again")
    return weight_map


def _read_header(file: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (not a dictionary)
            return {name: Stored(file, name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{file} {_whats_wrong(file, error)}") from None


def _read_pickle(file: Path) -> dict[str, Stored]:
    """The tensors of a pickle by name. It may build tensors, and nothing else."""
    with file.open("rb") as stream:
        head = stream.read(len(LFS_POINTER))
    if head == LFS_POINTER:
        raise ValueError(f"{file} {NO_LFS_POINTER}")
    if not head.startswith((b"PK", b"\x80")):
        raise ValueError(f"{file} is no file of torch.save, by its first bytes {head[:8]!r}: download or copy it again")
    try:
        with warnings.catch_warnings(action="ignore"):  # of old pickles, which are read all the same
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError:
        raise ValueError(f"{file} {NO_TENSORS}") from None
    except Exception as error:  # whatever torch says of a damaged file: there are many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file} is cut off or damaged ({reason}): download or copy it again") from None
    if isinstance(content, dict) and content.keys() == {"model"}:
        content = content["model"]
    plain = isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) and _is_plain(tensor) for name, tensor in content.items()
    )
    if not plain:
        raise ValueError(f"{file} {NO_TENSORS}")
    dtypes = {dtype: name for name, dtype in FLOATS.items()}
    found = {}
    for name, tensor in content.items():
        dtype = dtypes.get(tensor.dtype, _name(tensor.dtype))
        found[name] = Stored(file, name, tuple(tensor.shape), dtype, mapped=tensor.detach())
    return found


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_meta


def _whats_wrong(file: Path, error: Exception) -> str:
    """Why a file is refused. Layout of safetensors: 8 bytes with the header's length, a JSON header, the tensors."""
    again = "download or copy it again"
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = int.from_bytes(head, "little")
        header = stream.read(length) if length < min(size, LONGEST_HEADER) else b""
    if head == LFS_POINTER[:8]:
        return NO_LFS_POINTER
    if length > LONGEST_HEADER and head.startswith((b"PK", b"\x80")):
        return NO_PICKLE
    if size < 8:
        return f"has {size} bytes, not even a header: {again}"
    try:
        entries = json.loads(header)
        whole = 8 + length + max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return f"is not safetensors, or cut off within its header ({error}): {again}"
    if size != whole:
        return f"has {size:,} bytes, but {whole:,} by its header: {again}"
    return f"is not valid safetensors ({error}): {again}"


class Output(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def tensor(self) -> Tensor:
        return self.read().to("cpu", self.dtype).contiguous()


def _joined(config: JambaConfig, tensors: dict[str, Output]) -> list[Output]:
    """What is written under the names of the config's family, which may hold several of our tensors in one."""

    def join(name: str, parts: list[Output]) -> Output:
        dtype, shape = parts[0].dtype, _joined_shape([part.shape for part in parts])
        return Output(name, dtype, shape, lambda: torch.cat([part.tensor() for part in parts]))

    layout = {name: [tensors[weight.name] for weight in parts] for name, parts in released(config).items()}
    return [parts[0]._replace(name=name) if len(parts) == 1 else join(name, parts) for name, parts in layout.items()]


def _planned(model: Jamba) -> dict[str, Tensor]:
    """`_tensors` in the order of `weights`; ValueError unless they are what the config describes."""
    tensors, shapes = _tensors(model), {weight.name: weight.shape for weight in weights(model.config)}
    own = {(name, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if different := sorted({name for name, _ in own ^ shapes.items()}):
        raise ValueError(
            f"the model is not the one of its config in {_listed(different)}, so nothing could load the file: undo the "
            f"change to the model, or describe it in model.config"
        )
    return {name: tensors[name] for name in shapes}


def _write(
    path: str | os.PathLike,
    config: JambaConfig,
    outputs: list[Output],
    shard_bytes: int,
    companions: Iterable[Path] = (),
) -> None:
    from safetensors.torch import save_file

    path = Path(path).expanduser().resolve()
    _check_target(path)
    shards, total = _shards(outputs, shard_bytes), sum(output.nbytes for output in outputs)
    weight_map = {}
    with _replacing(path) as folder, _bar(f"saving {path.name}", total) as bar:
        _check_space(folder, total)
        (folder / CONFIG).write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
        for file in [*_companions(path), *companions]:
            shutil.copy(file, folder)
        for i, shard in enumerate(shards, start=1):
            file = folder / (SINGLE if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors")
            save_file({output.name: output.tensor() for output in shard}, file, metadata={"format": "pt"})
            shutil.copymode(folder / CONFIG, file)  # safetensors lets nobody but the owner read it
            weight_map |= {output.name: file.name for output in shard}
            bar.update(sum(output.nbytes for output in shard))
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(outputs: list[Output], shard_bytes: int) -> list[list[Output]]:
    """The outputs in their order, cut before a file would hold more than shard_bytes."""
    if type(shard_bytes) is not int or shard_bytes < 1:
        raise ValueError(f"shard_bytes is {shard_bytes!r}, but must be a whole number of at least 1")
    shards, filled = [[]], 0
    for output in outputs:
        if shards[-1] and filled + output.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(output)
        filled += output.nbytes
    return shards


def _check_target(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: give a folder that is absent, empty or a checkpoint")
    if path.is_dir():
        known = _matching(path, (CONFIG, INDEX, *WEIGHTS, *COMPANIONS))
        if others := sorted(entry.name for entry in set(path.iterdir()) - set(known)):
            raise ValueError(f"{path} holds {_listed(others)}, which saving would delete: give another folder")


def _check_space(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if need > free:
        raise OSError(f"{need:,} bytes are needed and {free:,} are free")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, which takes its place when all is written, and vanishes when anything fails."""
    from safetensors import SafetensorError

    new, old = (path.with_name(f".{path.name}.{token_hex(4)}.{age}") for age in ("new", "old"))
    try:
        new.mkdir(parents=True)
        yield new
        if path.exists():
            path.rename(old)
        new.rename(path)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{path} could not be written ({error}): make room there or give another folder; nothing was overwritten"
        ) from error
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _companions(folder: Path) -> list[Path]:
    return _matching(folder, COMPANIONS)


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Files of a folder whose names fit one of the patterns."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    return [entry for entry in entries if entry.is_file() and any(fnmatch(entry.name, p) for p in patterns)]


def _dtype(dtype: str | torch.dtype, auto: str, allowed: tuple[str, ...]) -> torch.dtype:
    name = auto if dtype == "auto" else _name(dtype)
    if name not in allowed:
        raise ValueError(f"dtype is {name!r}, but must be one of {', '.join(allowed)}")
    return getattr(torch, name)


def _name(dtype: str | torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bar(text: str, total: int):
    """A progress bar on stderr, for a terminal and for what takes longer than a second."""
    from tqdm import tqdm

    return tqdm(desc=text, total=total, unit="B", unit_scale=True, disable=None, leave=False, delay=1)
