"""How a measurement is recorded and shown."""

import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = (
    "minijamba", "torch", "transformers", "mambapy", "triton", "mamba-ssm", "causal-conv1d", "vllm", "accelerate",
    "numpy",
)  # fmt: skip
TITLES = {
    "scan": "selective scan", "conv": "causal convolution", "mixer": "Mamba mixer", "train": "training",
    "decode": "decoding", "prefill": "reading a prompt", "throughput": "prompt and answer", "load": "loading",
    "agreement": "agreement",
}  # fmt: skip
SIZES = ("hidden", "channels", "states", "rank", "width")


def record(
    name: str,
    rows: list[dict],
    *,
    device: torch.device | str,
    output: Path | None = None,
    commit: str | None = None,
    **facts,
) -> Path:
    """Write a measurement as JSON: the rows, and what is needed to judge and to repeat them.

    Args:
        name:   of the measurement and of its file, data/measurements/<name>.json.
        rows:   one dict a figure.
        device: that was measured, or its name.
        output: another file.
        commit: of the files that ran; asked of git when None.
        facts:  what else holds for all rows: sizes, dtype, repeats.
    Returns: the file.
    """
    measurement = {
        "name": name,
        "device": device if isinstance(device, str) else device_name(device),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {package: version for package in PACKAGES if (version := _version(package))},
        "command": _command(sys.argv[1:]),
        "commit": commit or _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **facts,
        "rows": rows,
    }
    path = output or place(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(measurement, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)
    return path


def place(name: str) -> Path:
    """The file of the measurement of that name."""
    home = REPOSITORY if (REPOSITORY / "data").is_dir() else Path()
    return home / "data" / "measurements" / f"{name}.json"


def _command(arguments: list[str]) -> str:
    """As it would be given in the repository: where a file lies or was written says nothing about the figures in it."""
    where = ("--output", "--record", "--commit", "--keep")
    arguments = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--") else [word])]
    kept = [
        Path(word).name if before == "--model" else word
        for before, word in zip(["", *arguments], arguments, strict=False)
        if before not in where and word not in where
    ]
    return shlex.join(["minijamba", *kept])


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
    """The commit of the repository that this file is in, with "+" for changes since, other measurements aside."""

    def git(*words):
        done = subprocess.run(["git", "-C", REPOSITORY, *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changes = git("status", "--porcelain", "--", ".", ":!data/measurements")
        return commit + ("+" if changes else "") if commit else None
    except FileNotFoundError:
        return None


def table(measurement: dict) -> str:
    """A recorded measurement as text: a line a case, a column a side, and in brackets how many times the first side.

    Whole models have a column for each side and each way to hold their weights.
    """
    rows, lines = measurement["rows"], {}
    for row in rows:
        for figure, text, unit in _figures(row):
            case = _case(row, unit, measurement.get("batch"))
            lines.setdefault(case, {})[_column(row)] = figure, text
    sides = list(dict.fromkeys(map(_column, rows)))
    first, widths = max(map(len, lines), default=0), [max(16, len(side)) for side in sides]
    sizes = "".join(f", {size} {measurement[size]}" for size in SIZES if size in measurement)
    title = TITLES[measurement["name"].split("_")[0]]
    shown = [
        f"{title} on {measurement['device']}, {measurement['threads']} threads, {measurement['dtype']}{sizes}",
        f"batch x length; in brackets: times {', '.join(sides[:1])}",
        " " * first + "".join(f"  {side:>{width}}" for side, width in zip(sides, widths, strict=True)),
    ]
    for case, figures in lines.items():
        ours = figures.get(sides[0])
        cells = [_cell(figures.get(side), None if side == sides[0] else ours) for side in sides]
        padded = "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        shown.append(f"{case:<{first}}{padded}")
    shown += [f"failed: {_column(row)}, {_case(row, '', 1)}: {row['failed']}" for row in rows if "failed" in row]
    shown += [f"left out: {side}: {reason}" for side, reason in measurement.get("left_out", {}).items()]
    return "\n".join(shown)


def _column(row: dict) -> str:
    keys = f", keys {row['kv']}" if "kv" in row else ""
    return f"{row['side']} {row['quantize'] or row['dtype']}{keys}" if "model" in row else row["side"]


def _case(row: dict, unit: str, batch: int | None) -> str:
    what = f"{row['model']}, {row['measure']}" if "model" in row else row["measure"]
    steps = row.get("steps", row.get("context"))
    if row["measure"] == "longest context" or steps is None:
        return f"{what}{unit}"
    return f"{what}{unit}, {row.get('batch', batch)} x {steps}"


def _figures(row: dict) -> Iterator[tuple[float, str, str]]:
    """A row's figures, each with its text and its unit."""
    if "model" in row:
        yield from _figures_of_model(row)
        return
    if "milliseconds" in row:
        yield row["milliseconds"], f"{row['milliseconds']:.{3 if row['milliseconds'] < 10 else 1}f}", " in ms"
    if "tokens_per_second" in row:
        yield row["tokens_per_second"], f"{row['tokens_per_second']:,.0f}", " in tokens/s"
    if "bytes" in row:
        yield row["bytes"], f"{row['bytes'] / 2**20:.1f}", " in MiB"
    if "error" in row:
        yield row["error"], f"{row['error']:.1e}", ""


# What the rows of whole models have: name -> what a figure is divided by, how it is written, its unit.
OF_MODELS = {
    "tokens_per_second": (1, ",.1f", " in tokens/s"),
    "roofline": (0.01, ".0f", " in % of the bandwidth"),
    "matrix_share": (0.01, ".0f", " in % of the matrix rate"),
    "load_seconds": (1, ".2f", " in s"),
    "times_reading": (1, ".2f", " in times the reading of the files"),
    "first_token_seconds": (1, ".2f", ": to the first token in s"),
    "peak_bytes": (2**30, ".2f", ": most memory in GiB"),
    "host_bytes": (2**30, ".2f", ": most memory of the host in GiB"),
    "error": (1, ".1e", ": error of the logits"),
    "median_error": (1, ".1e", ": error at the middle position"),
    "worst_error": (1, ".1e", ": error at the worst position"),
    "divergence": (1, ".1e", ": divergence in nats"),
    "same_choice": (0.01, ".2f", ": same next token in %"),
    "in_top_5": (0.01, ".2f", ": next token among the first 5 in %"),
    "same_experts": (0.01, ".2f", ": same experts in %"),
    "same_new": (1, ".1f", ": tokens written alike"),
    "loading_seconds": (1, ".1f", ": loading in s"),
}


def _figures_of_model(row: dict) -> Iterator[tuple[float, str, str]]:
    if "failed" in row:
        text = row["failed"] if row["failed"] == "out of memory" else "failed"
        units = {"load": " in s", "agreement": ": error of the logits"}
        yield 0, text, next((unit for name, unit in units.items() if row["measure"].startswith(name)), " in tokens/s")
    if row["measure"] == "longest context" and "failed" not in row:
        yield row["context"], f"{row['context']:,}", " in tokens"
    for name, (unit, form, text) in OF_MODELS.items():
        if name in row:
            yield row[name], f"{row[name] / unit:{form}}", text


def _cell(figure: tuple[float, str] | None, ours: tuple[float, str] | None) -> str:
    if figure is None:
        return "-"
    return f"{figure[1]} ({figure[0] / ours[0]:.1f}x)" if ours and ours[0] and figure[0] else figure[1]
