"""Tensors in files: what a checkpoint's files hold by their headers, before any of it is read.

Layout of safetensors: 8 bytes with the header's length, a JSON header, the tensors one after the other. A pickle is
opened only for a family that was released as one, and refused if it holds anything but tensors.
"""

import json
import math
import pickle
import warnings
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .families import Family

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
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
LONGEST_HEADER = 100_000_000  # bytes, a limit of the format
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = FLOATS | {"I8": torch.int8, "I16": torch.int16}
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Stored(NamedTuple):
    """A tensor in a file, or some of its rows, as the file's header describes it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as the header writes it: a key of DTYPES, or nothing that is read here
    begin: int = 0  # its first byte in the file
    mapped: Tensor | None = None  # of a pickle, whose pages are read when they are needed

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize

    def rows(self, first: int, count: int) -> "Stored":
        """`count` rows from `first` on, along its first axis."""
        begin = self.begin + first * math.prod(self.shape[1:]) * self.itemsize
        mapped = None if self.mapped is None else self.mapped[first : first + count]
        return self._replace(shape=(count, *self.shape[1:]), begin=begin, mapped=mapped)

    def read(self) -> Tensor:
        if self.mapped is not None:
            return self.mapped
        numbers = torch.empty(math.prod(self.shape), dtype=DTYPES[self.dtype])
        self.read_into(numbers)
        return numbers.view(self.shape)

    def read_into(self, numbers: Tensor, start: int = 0) -> None:
        """Fills `numbers`, flat and of its dtype, with its numbers from number `start` on.

        The file is opened anew and read, not mapped: what is read once does not stay in memory.
        Raises: ValueError if the file has become shorter.
        """
        if self.mapped is not None:
            numbers.copy_(self.mapped.reshape(-1)[start : start + len(numbers)])
            return
        view = memoryview(numbers.view(torch.uint8).numpy())
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.begin + start * self.itemsize)
            while view:
                count = file.readinto(view)
                if not count:
                    raise ValueError(f"{self.file} ended within {self.name}: something shortened it; copy it again")
                view = view[count:]


def read_headers(path: Path, family: Family) -> dict[str, Stored]:
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
    if pickles := matching(path, PICKLES):
        other = f"is not called {family.pickle}: rename it, or give the file itself" if family.pickle else NO_PICKLE
        raise ValueError(f"{pickles[0]} {other}")
    raise ValueError(f"{path} holds neither {SINGLE} nor {INDEX}: download them, or give another .safetensors file")


def matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Files of a folder whose names fit one of the patterns."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    return [entry for entry in entries if entry.is_file() and any(fnmatch(entry.name, p) for p in patterns)]


def listed(names: list[str]) -> str:
    """The first two names, and how many more there are."""
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def check_shapes(found: dict[str, Stored], shapes: dict[str, tuple[int, ...]]) -> None:
    for name, tensor in found.items():
        if tensor.shape != shapes[name]:
            raise ValueError(
                f"{tensor.file}: {tensor.name} has shape {tensor.shape}, but {CONFIG} asks for {shapes[name]}: one of "
                f"the two files belongs to another checkpoint"
            )


def _read_shards(index: Path) -> dict[str, Stored]:
    weight_map = _weight_map(index)
    files = sorted(set(weight_map.values()))
    if missing := [file for file in files if not (index.parent / file).is_file()]:
        raise ValueError(f"{index.parent}: {listed(missing)} missing, named by {INDEX}: download or copy it again")
    shards = {file: _read_header(index.parent / file) for file in files}
    for name, file in weight_map.items():
        if name not in shards[file]:
            place = next((f"in {other}" for other in files if name in shards[other]), "in no shard")
            raise ValueError(f"{index}: {name} is not in {file} but {place}: download index and shards again")
    for file, shard in shards.items():
        if unknown := [name for name in shard if weight_map.get(name) != file]:
            raise ValueError(
                f"{index.parent / file}: {listed(unknown)}, which {INDEX} does not place there: download index and "
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
        with safe_open(file, framework="pt"):  # refuses what is not valid, or cut off
            pass
    except SafetensorError as error:
        raise ValueError(f"{file} {_whats_wrong(file, error)}") from None
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        entries = json.loads(stream.read(length))
    entries.pop("__metadata__", None)
    return {
        name: Stored(file, name, tuple(entry["shape"]), entry["dtype"], 8 + length + entry["data_offsets"][0])
        for name, entry in entries.items()
    }


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
    codes = {dtype: code for code, dtype in FLOATS.items()}
    found = {}
    for name, tensor in content.items():
        dtype = codes.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
        found[name] = Stored(file, name, tuple(tensor.shape), dtype, mapped=tensor.detach())
    return found


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_meta


def _whats_wrong(file: Path, error: Exception) -> str:
    """Why a file is refused."""
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
