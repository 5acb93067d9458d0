"""Loading a checkpoint: seconds from files to the first token, beside the time that the files alone take to be read."""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from threading import local

import torch

from ..checkpoint import convert, load_timed
from ..config import JambaConfig
from ..generate import generate
from ..quantize import scheme
from ..rungs import find_device
from ..stored import matching
from ..stream import BLOCK, read_threads
from ..writing import WEIGHTS
from .apart import Broke, Memory, apart, host_memory, say
from .measure import warn_of_company
from .programs import OURS, random_tokens
from .records import record, table
from .serving import numbered, rates

PROMPT = 16  # tokens before the first new one
SAVED = "int8-all"
SCHEMES = {"cuda": ["int8", "int8-all", "int4-all"], "cpu": ["int8-all", None]}


def bench_load(
    model: Path,
    device: str = "auto",
    *,
    schemes: list[str | None] | None = None,
    memory: float | None = None,
    cached: bool = False,
    saved: bool = False,
    commit: str | None = None,
    output: Path | None = None,
) -> Path:
    """Measure loading in each scheme, each in a process of its own and with files that are not in the page cache.

    memory: GiB of a GPU that the process may take in all.
    cached: also with files that are in it, as if they lay on the fastest disk: there must be so much memory.
    saved:  also write the checkpoint as int8-all beside it for a while, and load that.
    Returns: the file. Prints the table. Raises: ValueError for a folder without weights, or what does not exist.
    """
    device, model = numbered(find_device(device)), Path(model)
    schemes = SCHEMES[device.type] if schemes is None else schemes
    for name in schemes:
        scheme(name)
    files_of(model)
    warn_of_company()
    (card,) = apart(rates, device)
    where = {"output": output, "commit": commit, "device": card.get("name", device)}
    dtype = JambaConfig.from_json(model).dtype
    facts = {"card": card, "memory": memory, "file_system": file_system(model), "dtype": dtype}
    rows = []
    for row in _rows(model, schemes, device, memory, cached, saved):
        rows.append({"dtype": dtype, **row})
        path = record(f"load_{device.type}", rows, **where, **facts)
    print(table(json.loads(path.read_text(encoding="utf-8"))))
    print(f"recorded in {path}")
    return path


def _rows(
    model: Path, schemes: list, device: torch.device, memory: float | None, cached: bool, saved: bool
) -> Iterator[dict]:  # fmt: skip
    reading = read_files(model)
    for name in schemes:
        yield _measured(model, name, device, memory, reading)
    if cached:
        read_files(model)  # into the cache, where they are now read again
        reading = read_files(model, fresh=False)
        for name in schemes:
            yield _measured(model, name, device, memory, reading, fresh=False) | {"measure": "load, cached files"}
    if saved:
        with tempfile.TemporaryDirectory(dir=model.resolve().parent, prefix=".") as folder:
            target = Path(folder) / SAVED
            say(f"writing {SAVED} beside {model.name}")
            list(apart(_convert, model, target, device))
            row = _measured(target, SAVED, device, memory, read_files(target))
        yield row | {"measure": "load, packed files", "model": model.name}


def _convert(model: Path, target: Path, device: torch.device) -> Iterator[dict]:
    convert(model, target, quantize=SAVED, device=device)
    yield {}


def _measured(
    model: Path, quantize: str | None, device: torch.device, memory: float | None, reading: dict, fresh: bool = True
) -> dict:  # fmt: skip
    """The row of one scheme; files_* is the reading of the files alone; fresh: they are not in the page cache.

    process_seconds counts everything to the first token and the end: Python, torch, CUDA, loading, compiling.
    """
    row = {"measure": "load", "model": model.name, "quantize": quantize, "side": OURS}
    say(f"{model.name} in {quantize or 'the dtype of its files'}")
    if fresh:
        forget(model)
    start = time.perf_counter()
    try:
        for part in apart(loaded, model, quantize, device, memory):
            row |= part
        row["process_seconds"] = time.perf_counter() - start
        row |= {f"files_{name}": value for name, value in reading.items()}
        row["times_reading"] = row["load_seconds"] / reading["seconds"]
        say(f"  {row['load_seconds']:.2f} s, {row['times_reading']:.2f} times the reading")
    except Broke as error:
        say(f"  failed: {error}")
        row["failed"] = str(error)
    return row


def loaded(model: Path, quantize: str | None, device: torch.device, gib: float | None) -> Iterator[dict]:
    """Stages of loading in seconds, the peaks of both memories while loading, then seconds and peak to the first token.

    Stages are those of `LoadReport`, with load_seconds for their total. host_bytes is the highest resident memory of
    the process, the pages of its libraries included; host_memory says how much of it was files' and shared (which
    pinned memory may be) when loading had ended.
    """
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        memory = Memory(device, gib)
        memory.start()
        before = host_memory()["highest"]
        made, report = load_timed(model, device, quantize=quantize)
        stages = {f"{name}_seconds": value for name, value in asdict(report).items() if name not in COUNTS}
        stages["load_seconds"] = stages.pop("total_seconds")
        host = host_memory()
        yield {
            **stages,
            **{name: getattr(report, name) for name in COUNTS},
            "peak_bytes": memory.peak,
            "host_bytes": host["highest"],
            "host_bytes_before": before,
            "host_memory": host,
        }
        start = time.perf_counter()
        generate(made, random_tokens(made.config, 1, PROMPT), max_new_tokens=1, stop=())
        token = time.perf_counter() - start
        yield {"first_token_seconds": stages["load_seconds"] + token, "first_token_peak_bytes": memory.peak}


COUNTS = ("bytes", "threads")  # of a LoadReport; everything else is seconds


# Files


def files_of(model: Path) -> list[Path]:
    """Raises: ValueError where there are none."""
    if files := matching(model, WEIGHTS):
        return files
    raise ValueError(f"{model} holds no {WEIGHTS[0]}: give the folder of a checkpoint")


def forget(model: Path) -> None:
    """Drop the files' pages from the system's cache. Without effect where the files live in memory, as on tmpfs."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in files_of(model):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # a page that was never written cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_files(model: Path, fresh: bool = True) -> dict:
    """Seconds to read the files and do nothing with them: as many threads as `load` has, 16 MiB a call.

    fresh: after they were dropped from the page cache.
    """
    if fresh:
        forget(model)
    blocks = [(file, start) for file in files_of(model) for start in range(0, file.stat().st_size, BLOCK)]
    own, threads = local(), read_threads()

    def read(block: tuple[Path, int]) -> int:
        if not hasattr(own, "buffer"):
            own.buffer = bytearray(BLOCK)
        file, start = block
        with open(file, "rb", buffering=0) as stream:
            stream.seek(start)
            view, filled = memoryview(own.buffer), 0
            while count := stream.readinto(view[filled:]):
                filled += count
        return filled

    say(f"{model.name}: reading {len(blocks):,} blocks with {threads} threads")
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(read, blocks))
    took = time.perf_counter() - start
    say(f"  {total / 2**30:.2f} GiB in {took:.2f} s")
    return {"seconds": took, "bytes": total, "threads": threads, "bytes_per_second": total / took}


def file_system(path: Path) -> str:
    """The kind of the file system that a path is on, as "ext4" or "tmpfs"."""
    import psutil

    path = path.resolve()
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    return next((mounts[folder] for folder in (path, *path.parents) if folder in mounts), "unknown")
