"""Writing a checkpoint: shards of safetensors, a tensor at a time, into a folder that appears when it is complete."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from secrets import token_hex
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from .stored import CODES, CONFIG, INDEX, SINGLE, listed, matching
from .stream import BLOCK, checksum

CHECKSUMS = "checksums.json"
WEIGHTS = ("model*.safetensors",)
COMPANIONS = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "chat_template*", "README*", "LICENSE*",
)  # fmt: skip
THREADS = 4  # files that are written at once, each with a tensor in memory


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
        return self.read().to(self.dtype).to("cpu").contiguous()


def write_checkpoint(
    path: str | os.PathLike,
    config: dict,
    outputs: list[Output],
    shard_bytes: int,
    companions: Iterable[Path] = (),
    checksums: bool = False,
) -> None:
    """The outputs as safetensors, with the content of config.json; the folder appears, or changes, when all is written.

    Memory holds a tensor for each of four files at most. With `checksums`, checksums.json has those of every tensor.
    """
    path = Path(path).expanduser().resolve()
    _check_target(path)
    plan, total = planned_files(outputs, shard_bytes), sum(output.nbytes for output in outputs)
    with _replacing(path) as folder, bar(f"saving {path.name}", total) as progress:
        _check_space(folder, total)
        _write_json(folder / CONFIG, config)
        for file in [*companions_of(path), *companions]:
            shutil.copy(file, folder)
        sums = _write_files(folder, plan, checksums, progress)
        if len(plan) > 1:
            weight_map = {output.name: file for output, file in _placed(plan)}
            weight_map = {output.name: weight_map[output.name] for output in outputs}
            _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        if checksums:
            _write_json(folder / CHECKSUMS, {"block_bytes": BLOCK, "crc32": sums})


def planned_files(outputs: list[Output], shard_bytes: int) -> dict[str, list[Output]]:
    """File name -> the outputs that it holds: in their order, cut before a file would hold more than shard_bytes."""
    if type(shard_bytes) is not int or shard_bytes < 1:
        raise ValueError(f"shard_bytes is {shard_bytes!r}, but must be a whole number of at least 1")
    shards, filled = [[]], 0
    for output in outputs:
        if shards[-1] and filled + output.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(output)
        filled += output.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def _placed(plan: dict[str, list[Output]]) -> Iterator[tuple[Output, str]]:
    return ((output, file) for file, outputs in plan.items() for output in outputs)


def _write_files(folder: Path, plan: dict[str, list[Output]], checksums: bool, progress) -> dict[str, list[str]]:
    """Several files at once: making tensors, copying and hashing them keeps a core busy for each."""
    lock, sums = Lock(), {}

    def written(output: Output, content: memoryview) -> None:
        found = [checksum(content[i : i + BLOCK]) for i in range(0, len(content), BLOCK)] if checksums else []
        with lock:
            sums[output.name] = found
            progress.update(len(content))

    pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1))
    try:
        files = [pool.submit(write_file, folder / file, outputs, written) for file, outputs in plan.items()]
        for file in files:
            file.result()
    finally:
        pool.shutdown(cancel_futures=True)
    return {output.name: sums[output.name] for output, _ in _placed(plan)}


def write_file(file: Path, outputs: list[Output], written: Callable[[Output, memoryview], None]) -> None:
    """A safetensors file, in which each tensor starts at a multiple of its itemsize."""
    outputs, end = _aligned(outputs), 0
    header: dict = {"__metadata__": {"format": "pt"}}
    for output in outputs:
        offsets = [end, end := end + output.nbytes]
        header[output.name] = {"dtype": CODES[output.dtype], "shape": list(output.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for output in outputs:
            content = memoryview(output.tensor().view(-1).view(torch.uint8).numpy())
            stream.write(content)
            written(output, content)


def _aligned(outputs: list[Output]) -> list[Output]:
    """As they come, so that what is made together need not wait; or, if one would lie askew, the widest first."""
    starts = accumulate((output.nbytes for output in outputs), initial=0)
    if all(start % output.dtype.itemsize == 0 for start, output in zip(starts, outputs, strict=False)):
        return outputs
    return sorted(outputs, key=lambda output: -output.dtype.itemsize)


def _write_json(file: Path, values: dict) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _check_target(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: give a folder that is absent, empty or a checkpoint")
    if path.is_dir():
        known = matching(path, (CONFIG, INDEX, CHECKSUMS, *WEIGHTS, *COMPANIONS))
        if others := sorted(entry.name for entry in set(path.iterdir()) - set(known)):
            raise ValueError(f"{path} holds {listed(others)}, which saving would delete: give another folder")


def _check_space(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if need > free:
        raise OSError(f"{need:,} bytes are needed and {free:,} are free")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, which takes its place when all is written, and vanishes when anything fails."""
    new, old = (path.with_name(f".{path.name}.{token_hex(4)}.{age}") for age in ("new", "old"))
    try:
        new.mkdir(parents=True)
        yield new
        if path.exists():
            path.rename(old)
        new.rename(path)
    except OSError as error:
        raise OSError(
            f"{path} could not be written ({error}): make room there or give another folder; nothing was overwritten"
        ) from error
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def companions_of(folder: Path) -> list[Path]:
    """Tokenizer, card and licence beside the weights."""
    return matching(folder, COMPANIONS)


def bar(text: str, total: int):
    """A progress bar on stderr, for a terminal and for what takes longer than a second."""
    from tqdm import tqdm

    return tqdm(desc=text, total=total, unit="B", unit_scale=True, disable=None, leave=False, delay=1)
