"""Every speed that is claimed is measured here, side by side with other programs in one run, and recorded.

    minijamba bench scan --device cpu     ->  data/measurements/scan_cpu.json

`record` writes a measurement with all that is needed to judge it; later benchmarks use it, too.
"""

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .scan import selective_scan

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("minijamba", "torch", "transformers", "mambapy", "triton", "mamba-ssm", "numpy")
OURS = "minijamba parallel"
PATIENCE = 10.0  # seconds; a side that has taken so long for one figure is not called again for it


def add_arguments(parser) -> None:
    """The components that can be measured, as verbs of the parser, and their options."""
    components = parser.add_subparsers(title="components", metavar="component", required=True)
    scan = components.add_parser("scan", help="the selective scan, beside transformers, mambapy and mamba-ssm")
    scan.set_defaults(measure=_measure_scan)
    scan.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (auto)")
    scan.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192], metavar="T", help="forward pass")
    scan.add_argument("--backward", type=int, nargs="*", default=[2048], metavar="T", help="forward and backward pass")
    scan.add_argument("--memory", type=int, nargs="*", default=[8192], metavar="T", help="peak memory of the forward")
    scan.add_argument("--batch", type=int, default=1, metavar="N", help="sequences (1)")
    scan.add_argument("--channels", type=int, default=256, metavar="N", help="inner channels (256)")
    scan.add_argument("--states", type=int, default=16, metavar="N", help="states a channel (16)")
    scan.add_argument("--repeats", type=int, default=7, metavar="N", help="the median of so many calls (7)")
    scan.add_argument("--no-compile", action="store_true", help="leave out what compiles for a minute a length")
    scan.add_argument("--output", type=Path, metavar="FILE", help="data/measurements/scan_DEVICE.json")


def run(options) -> int:
    """Measure what the parsed options ask for. Returns the exit status."""
    options.measure(options)
    return 0


def _measure_scan(options) -> None:
    bench_scan(
        options.device, options.lengths, options.backward, options.memory,
        batch=options.batch, channels=options.channels, states=options.states,
        repeats=options.repeats, compiled=not options.no_compile, output=options.output,
    )  # fmt: skip


def bench_scan(
    device: str = "auto",
    lengths=(512, 2048, 8192),
    backward=(2048,),
    memory=(8192,),
    *,
    batch: int = 1,
    channels: int = 256,
    states: int = 16,
    repeats: int = 7,
    compiled: bool = True,
    output: Path | None = None,
) -> Path:
    """Time and peak memory of the selective scan, ours and others', float32, z, D, bias and softplus included.

    All sides get the same numbers, each in its own layout, and must give the same y, to 1e-4. They take turns, in
    changing order; each figure is the median of the repeats after a first call, of fewer where they take too long.
    Memory is measured in a new process a side, without the arguments.

    Args:
        lengths, backward, memory: lengths at which to measure the forward pass without gradients, forward and backward
            with the gradients of all arguments, and the peak memory of a forward pass.
        compiled: measure transformers' associative scan as well, which runs only under torch.compile.
        output: file to record in; data/measurements/scan_<device>.json when None.
    Returns: the file. Prints the table.
    """
    from tqdm import tqdm

    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    sizes = {"batch": batch, "channels": channels, "states": states}
    _warn_of_company()
    sides = _available_sides(device, compiled)
    rows = []
    with tqdm(total=len(sides) * ((repeats + 1) * len([*lengths, *backward]) + len(memory)), leave=False) as progress:

        def note(measure, steps, figures):
            rows.extend({"measure": measure, "steps": steps, "side": side, **row} for side, row in figures.items())

        for steps in lengths:
            arguments = _arguments(device, steps, **sizes)
            note("forward", steps, _times(sides, arguments, repeats, _forward, progress))
        for steps in backward:
            arguments = _arguments(device, steps, **sizes)
            note("forward + backward", steps, _times(sides, arguments, repeats, _forward_backward, progress))
        for steps in memory:
            note("peak memory", steps, _peaks(sides, device, steps, sizes, progress))
    path = record(f"scan_{device.type}", rows, output=output, device=device, repeats=repeats, dtype="float32", **sizes)
    print(table(json.loads(path.read_text(encoding="utf-8"))))
    print(f"recorded in {path}")
    return path


# What is compared.


@dataclass(frozen=True)
class Side:
    """A program that computes the scan. Its arguments: x, delta, A, B, C, D, z, delta_bias, as `selective_scan`."""

    name: str
    scan: Callable[..., Tensor]
    time_last: bool = False  # x, delta, B, C, z and y have their time axis last
    compiled: bool = False


def _sides(device: torch.device, compiled: bool) -> Iterator[tuple[str, Callable[[], Side]]]:
    """Name of each side that makes sense here, and a function that imports and returns it."""
    yield OURS, lambda: Side(OURS, partial(_ours, "parallel"))
    yield "minijamba naive", lambda: Side("minijamba naive", partial(_ours, "naive"))
    yield "mambapy", _mambapy
    yield "transformers", partial(_transformers, "transformers")
    yield "transformers, mambapy", partial(_transformers, "transformers, mambapy", use_mambapy=True)
    if compiled:
        name = "transformers, associative scan, compiled"
        yield name, partial(_transformers, name, compiled=True, use_associative_scan=True)
    if device.type == "cuda":
        yield "mamba-ssm", _mamba_ssm


def _available_sides(device: torch.device, compiled: bool) -> list[Side]:
    sides = []
    for name, load in _sides(device, compiled):
        try:
            sides.append(load())
        except ImportError as error:
            print(f"{name} is left out: {error}")
    return sides


def _ours(rung, x, delta, A, B, C, D, z, delta_bias) -> Tensor:
    return selective_scan(x, delta, A, B, C, D, z, delta_bias=delta_bias, delta_softplus=True, rung=rung)


def _mambapy() -> Side:
    from mambapy.mamba import MambaBlock

    def scan(x, delta, A, B, C, D, z, delta_bias):
        return MambaBlock.selective_scan(None, x, F.softplus(delta + delta_bias), A, B, C, D) * F.silu(z)

    return Side("mambapy", scan)


def _transformers(name: str, compiled: bool = False, **path) -> Side:
    """The scan of its Jamba: a loop, or mambapy's pscan, or (only inside torch.compile) torch's associative scan."""
    import transformers
    from transformers.models.jamba.modeling_jamba import mamba_selective_scan

    if path.get("use_mambapy"):
        import mambapy  # noqa: F401  (without it transformers runs its loop)

    transformers.logging.set_verbosity_error()

    def scan(x, delta, A, B, C, D, z, delta_bias):
        return mamba_selective_scan(x, delta, A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=True, **path)

    return Side(name, torch.compile(scan, dynamic=False) if compiled else scan, time_last=True, compiled=compiled)


def _mamba_ssm() -> Side:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def scan(x, delta, A, B, C, D, z, delta_bias):
        return selective_scan_fn(x, delta, A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=True)

    return Side("mamba-ssm", scan, time_last=True)


def _arguments(device: torch.device, steps: int, batch: int, channels: int, states: int) -> list[Tensor]:
    """Random activations and a memory of a hundred steps."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    tokens = (batch, steps)
    arguments = [
        normal(*tokens, channels),
        normal(*tokens, channels),
        -torch.arange(1.0, states + 1).repeat(channels, 1),
        normal(*tokens, states),
        normal(*tokens, states),
        torch.ones(channels),
        normal(*tokens, channels),
        normal(channels) - 4.6,
    ]
    return [argument.to(device) for argument in arguments]


def _layout(side: Side, arguments: list[Tensor]) -> list[Tensor]:
    return [a.mT.contiguous() if side.time_last and a.dim() == 3 else a for a in arguments]


# How it is measured.


def _times(sides, arguments, repeats, measured, progress) -> dict[str, dict]:
    """Milliseconds of each side; the sides take turns, in changing order."""
    calls = _warm_calls(sides, arguments, measured, progress)
    seconds = {name: [] for name in calls}
    for repeat in range(repeats):
        for name in list(calls)[:: -1 if repeat % 2 else 1]:
            progress.set_description(name)
            if sum(seconds[name]) < PATIENCE:
                seconds[name].append(_seconds(calls[name], arguments[0].device))
            progress.update()
    return {name: _summary([1e3 * time for time in times]) for name, times in seconds.items()}


def _summary(milliseconds: list[float]) -> dict:
    return {
        "milliseconds": statistics.median(milliseconds),
        "fastest": min(milliseconds),
        "slowest": max(milliseconds),
        "calls": len(milliseconds),
    }


def _warm_calls(sides, arguments, measured, progress) -> dict[str, Callable[[], Tensor]]:
    """A call of each side that has been made once and agrees with the first side's."""
    calls, expected = {}, None
    for side in sides:
        progress.set_description(f"{side.name}, first call")
        own = [argument.clone().requires_grad_(measured is _forward_backward) for argument in _layout(side, arguments)]
        calls[side.name] = partial(measured, side.scan, own)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # compiling warns a lot
            y = calls[side.name]()
        y = y.mT if side.time_last else y
        expected = y if expected is None else expected
        error = ((y - expected).abs().max() / expected.abs().max()).item()
        if not error < 1e-4:
            raise RuntimeError(f"{side.name} differs from {sides[0].name} by {error:.1e}: the times would mean nothing")
        progress.update()
    return calls


@torch.no_grad()
def _forward(scan, arguments) -> Tensor:
    return scan(*arguments)


def _forward_backward(scan, arguments) -> Tensor:
    y = scan(*arguments)
    torch.autograd.grad(y, arguments, torch.ones_like(y))
    return y.detach()


def _seconds(call: Callable, device: torch.device) -> float:
    _synchronise(device)
    start = time.perf_counter()
    call()
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peaks(sides, device, steps, sizes, progress) -> dict[str, dict]:
    """Bytes at the peak of a forward pass, above what was in use before; each side in a process of its own."""
    peaks = {}
    for side in sides:
        progress.set_description(f"{side.name}, memory")
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            peaks[side.name] = {"bytes": process.submit(_peak_bytes, side.name, str(device), steps, sizes).result()}
        progress.update()
    return peaks


def _peak_bytes(name: str, device: str, steps: int, sizes: dict[str, int]) -> int:
    device = torch.device(device)
    side = dict(_sides(device, compiled=True))[name]()
    # The first call loads libraries. What compiles, compiles for one length; others show it with a short sequence.
    short = _layout(side, _arguments(device, steps if side.compiled else 32, **sizes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _forward(side.scan, short)
    arguments = _layout(side, _arguments(device, steps, **sizes))
    del short
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _forward(side.scan, arguments)
        return torch.cuda.max_memory_allocated(device) - before
    with _PeakOfProcess() as peak:
        _forward(side.scan, arguments)
    return peak.bytes


class _PeakOfProcess:
    """Watches the process's resident memory from a thread, a thousand times a second."""

    def __enter__(self):
        import psutil

        self._process = psutil.Process()
        self._before = self._highest = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self._highest = max(self._highest, self._process.memory_info().rss)

    def __exit__(self, *exception) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = max(self._highest, self._process.memory_info().rss) - self._before


# How it is recorded and shown.


def record(name: str, rows: list[dict], *, device: torch.device, output: Path | None = None, **facts) -> Path:
    """Write a measurement as JSON: the rows, and what is needed to judge and to repeat them.

    Args:
        name:   of the measurement and of its file, data/measurements/<name>.json.
        rows:   one dict a figure.
        device: that was measured.
        output: another file.
        facts:  what else holds for all rows: sizes, dtype, repeats.
    Returns: the file.
    """
    measurement = {
        "name": name,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {package: version for package in PACKAGES if (version := _version(package))},
        "command": shlex.join(["minijamba", *sys.argv[1:]]),
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **facts,
        "rows": rows,
    }
    home = REPOSITORY if (REPOSITORY / "data").is_dir() else Path()
    path = output or home / "data" / "measurements" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(measurement, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)
    return path


def device_name(device: torch.device) -> str:
    """What the maker calls it: "NVIDIA H200", "AMD EPYC 7763 64-Core Processor"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the repository that this file is in, with "+" for changes since."""

    def git(*words):
        done = subprocess.run(["git", "-C", REPOSITORY, *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if git("status", "--porcelain") else "") if commit else None
    except FileNotFoundError:
        return None


def table(measurement: dict) -> str:
    """A recorded scan measurement as text: a line a side, a column a measure, and how many times ours in brackets."""
    figures = {}
    for row in measurement["rows"]:
        column = figures.setdefault(f"{row['measure']} {row['steps']}", {})
        column[row["side"]] = row["bytes"] / 2**20 if "bytes" in row else row["milliseconds"]
    sides = list(dict.fromkeys(row["side"] for row in measurement["rows"]))
    width = max(map(len, sides))
    lines = [
        f"selective scan on {measurement['device']}, {measurement['threads']} threads, {measurement['dtype']}, "
        f"batch {measurement['batch']}, {measurement['channels']} channels, {measurement['states']} states",
        "milliseconds, peak memory in MiB; in brackets: times ours",
        " " * width + "".join(f"  {column:>24}" for column in figures),
    ]
    for side in sides:
        cells = [f"{column[side]:.1f} ({column[side] / column[OURS]:.1f}x)" for column in figures.values()]
        lines.append(f"{side:<{width}}" + "".join(f"  {cell:>24}" for cell in cells))
    return "\n".join(lines)


def _warn_of_company() -> None:
    """Threads wait for each other: a busy machine slows whatever is measured many times over."""
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > 0.5:
        print(f"other programs keep {load:.1f} cores busy: the figures will be off, best run this alone")

