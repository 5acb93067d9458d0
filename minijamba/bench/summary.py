"""The README's table of the 52-billion model: what was recorded of it, a line a figure, a column a program."""

import json
from collections.abc import Callable

from .programs import OURS, TRANSFORMERS, VLLM
from .records import place
from .serving import LONGEST

MODEL = "jamba-v0.1"
COLUMNS = {
    "int8": (OURS, "int8"),
    "int8-all": (OURS, "int8-all"),
    "int4-all": (OURS, "int4-all"),
    "bfloat16": (OURS, None),
    "vLLM, experts in int8": (VLLM, "experts_int8"),
    "transformers, bfloat16": (TRANSFORMERS, None),
}
CONTEXTS = (1024, 8192, 32768, 131072, 262144)


def number(figure: str, unit: float = 1, digits: int = 0) -> Callable[[dict], str]:
    return lambda row: f"{row[figure] / unit:,.{digits}f}" if figure in row else ""


def speed(row: dict) -> str:
    return number("tokens_per_second", digits=0 if row["tokens_per_second"] >= 100 else 1)(row)


def plain_speed(row: dict) -> str:
    return speed({"tokens_per_second": row["batch"] / row["loop"]["seconds"]}) if "loop" in row else ""


LARGEST, ROOF = number("peak_bytes", 2**30, 1), number("roofline", 0.01)
AGREEMENT = "agreement with transformers float32"
# Record, what its rows must say, what the line is called, how a row is written.
LINES = [
    *(
        ("decode", {"batch": batch, "context": 1024}, f"written a second, batch {batch}, after 1,024 tokens", speed)
        for batch in (1, 4, 16, 64)
    ),
    *(
        ("decode", {"batch": batch, "context": 1024}, f"in a plain loop, batch {batch}", plain_speed)
        for batch in (1, 16)
    ),
    ("decode", {"batch": 1, "context": 1024}, "batch 1: % of the speed at which memory can be read", ROOF),
    ("decode", {"batch": 16, "context": 1024}, "batch 16: % of that speed", ROOF),
    ("decode", {"batch": 1, "context": 262144}, "written a second after 262,144 tokens", speed),
    ("decode", {"batch": 1, "context": 262144, "kv": "int8"}, "the same with keys and values in int8", speed),
    *(
        ("prefill", {"measure": "prefill", "batch": 1, "context": t}, f"read a second, prompt of {t:,}", speed)
        for t in CONTEXTS
    ),
    ("decode", {"batch": 1, "context": 1024}, "GiB in use, batch 1, 1,024 tokens", LARGEST),
    ("decode", {"batch": 1, "context": 262144}, "GiB in use, batch 1, 262,144 tokens", LARGEST),
    ("prefill", {"measure": LONGEST}, "longest context that ran, tokens", number("context")),
    ("load", {"measure": "load"}, "loading the files ({file_system}), seconds", number("load_seconds", digits=1)),
    ("load", {"measure": "load"}, "times the reading of the files alone", number("times_reading", digits=2)),
    ("load", {"measure": "load, cached files"}, "loading cached files, seconds", number("load_seconds", digits=1)),
    ("load", {"measure": "load, packed files"}, "loading packed files, seconds", number("load_seconds", digits=1)),
    ("agreement", {"measure": AGREEMENT}, "error of the logits, %", number("error", 0.01, 1)),
    ("agreement", {"measure": AGREEMENT}, "the same next token, %", number("same_choice", 0.01, 1)),
]


def jamba_table() -> str:
    """In Markdown, from the records in data/measurements: lines and columns without a figure are left out."""
    records = {name: record for name in dict.fromkeys(name for name, *_ in LINES) if (record := _record(name))}
    devices = dict.fromkeys(record["device"] for record in records.values())
    titles = [f"minijamba, {name}" if side == OURS else name for name, (side, _) in COLUMNS.items()]
    lines = [[", ".join([MODEL, "random weights", *devices]), *titles]]
    for name, wanted, label, write in LINES:
        cells = _cells(records[name]["rows"], wanted, write) if name in records else []
        if any(cells):
            lines.append([label.format(**records[name]), *cells])
    kept = [i for i, (_, *cells) in enumerate(zip(*lines, strict=True)) if any(cells)]
    first, *others = ("| " + " | ".join(line[i] for i in kept) + " |" for line in lines)
    return "\n".join([first, "|---|" + "---:|" * (len(kept) - 1), *others])


def _record(name: str) -> dict:
    path = place(f"{name}_cuda")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _cells(rows: list[dict], wanted: dict, write: Callable[[dict], str]) -> list[str]:
    """A figure for each of the COLUMNS, empty where nothing was recorded."""
    wanted = {"kv": None} | wanted
    cells = []
    for side, quantize in COLUMNS.values():
        own = [row for row in rows if (row["side"], row["quantize"]) == (side, quantize) and _is(row, wanted)]
        cells.append("" if not own else own[0].get("failed") or write(own[0]))
    return cells


def _is(row: dict, wanted: dict) -> bool:
    of_files = "batch" not in row or row["measure"].startswith("agreement")  # of which there is one checkpoint
    return (of_files or row["model"] == MODEL) and all(row.get(name) == value for name, value in wanted.items())
