"""Whole models at work, side by side in one run: what `decode`, `prefill` and `throughput` have in common.

Every side runs in a process of its own on the same tokens; what fails there becomes a row that says why.
"""

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from ..config import preset
from ..quantize import scheme
from ..rungs import find_device
from .apart import Broke, Memory, apart, say
from .measure import alone, in_a_row, matrix_rate, warn_of_company
from .programs import OURS, PROGRAMS, SCHEMES, TRANSFORMERS, VLLM, Job, Program, random_tokens
from .records import place, record, table

ENOUGH = 30.0  # seconds of calls for one figure, after which no more are made
ALL = [OURS, TRANSFORMERS, VLLM]
LONGEST = "longest context"  # a measure whose context is its figure


@dataclass(frozen=True)
class ServingPlan:
    """What is measured on a kind of device unless the user asks for something else. memory in GiB, new in tokens."""

    models: list[str]
    schemes: list[str | None]
    cases: list[tuple[int, int]]
    sides: list[str]
    memory: float | None
    repeats: int
    new: int = 1
    kv: str | None = None
    loop: bool = False


def jobs(plan: ServingPlan, measure: str, figures: Callable, device: torch.device, longest: int) -> list[Job]:
    """One for every model, side and scheme. Raises: ValueError for what does not exist."""
    for side in plan.sides:
        if side not in PROGRAMS:
            raise ValueError(f"there is no side {side!r} here: choose of {', '.join(map(repr, PROGRAMS))}")
    for name in plan.models:
        preset(name)
    for name in plan.schemes:
        scheme(name)
    return [
        Job(
            measure, figures, model, side, quantize, tuple(plan.cases), device, plan.memory, plan.repeats, plan.new,
            longest, plan.kv, plan.loop,
        )
        for model in plan.models
        for side in plan.sides
        for quantize in (plan.schemes if side == OURS else SCHEMES[side])
    ]  # fmt: skip


def serve(job: Job) -> Iterator[dict]:
    """In a process of its own: first what was made ready, then the row of every case."""
    with torch.cuda.device(job.device) if job.device.type == "cuda" and job.side != VLLM else nullcontext():
        memory = Memory(job.device, None if job.side == VLLM else job.limit)  # vLLM begins with a GPU untouched
        start = time.perf_counter()
        program = PROGRAMS[job.side](job, memory)
        yield {"ready": time.perf_counter() - start}
        for batch, context in job.cases:
            tokens = random_tokens(job.config, batch, context)
            memory.start()
            figures = job.figures(program, job, tokens)
            yield case_of(job, batch, context) | figures | {"peak_bytes": memory.peak, **program.facts}


def case_of(job: Job, batch: int, context: int) -> dict:
    """What a row begins with."""
    who = {name: getattr(job, name) for name in ("measure", "model", "quantize", "side")}
    if job.side == OURS and job.kv:
        who["kv"] = job.kv
    return {**who, "dtype": job.config.dtype, "memory": job.limit, "batch": batch, "context": context}


def rows_of(job: Job, left_out: dict[str, str]) -> Iterator[dict]:
    """The row of every case, with `failed` where there is none; a failure ends the process, and a new one goes on.

    A program that cannot be made ready fails in all cases; vLLM, which gets ready for the longest context, in those.
    """
    waiting = list(job.cases)
    while waiting:
        say(f"{job.model}, {job.side}, {job.quantize or job.config.dtype}: {len(waiting)} cases")
        ready = False
        try:
            for row in apart(serve, replace(job, cases=tuple(waiting))):
                if "ready" in row:
                    ready = True
                    say(f"  ready after {row['ready']:.1f} s")
                    continue
                waiting.pop(0)
                say(f"  {row['batch']} x {row['context']:,}: {spoken(row)}")
                yield row
            return
        except ImportError as error:
            left_out[f"{job.side}, {job.model}"] = str(error)
            say(f"  left out: {error}")
            return
        except Broke as error:
            if not waiting:
                return
            longest = max(context for _, context in waiting)
            too_long = [case for case in waiting if case[1] == longest]
            failed = waiting[:1] if ready else too_long if job.side == VLLM else waiting
            waiting = [case for case in waiting if case not in failed]
            say(f"  {', '.join(f'{batch} x {context:,}' for batch, context in failed)} failed: {error}")
            yield from (case_of(job, *case) | {"failed": str(error)} for case in failed)


def spoken(row: dict) -> str:
    speed = f"{row['tokens_per_second']:,.1f} tokens/s, " if "tokens_per_second" in row else ""
    return f"{speed}{row['peak_bytes'] / 2**30:.2f} GiB"


def numbered(device: torch.device) -> torch.device:
    """With the number of the GPU; asking for the current one would leave a CUDA context in this process."""
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def one_device(device: str, plans: dict[str, ServingPlan], options: dict) -> tuple[torch.device, ServingPlan, dict]:
    """The device, its plan with the options that are fields of it and not None, and the other options."""
    device = numbered(find_device(device))
    if device.type not in plans:
        raise ValueError(f"there is no device {device.type!r} here: choose of {', '.join(map(repr, plans))}")
    own = {entry.name for entry in fields(ServingPlan)}
    changes = {name: value for name, value in options.items() if name in own and value is not None}
    return device, replace(plans[device.type], **changes), {k: v for k, v in options.items() if k not in own}


# Clocks


def seconds(program: Program, tokens: Tensor, new: int) -> float:
    """Of one call that writes `new` tokens after each prompt, with all memory of earlier calls given back."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    start = time.perf_counter()
    program.write(tokens, new)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def repeated(call: Callable[[], float], repeats: int) -> list[float]:
    """What `repeats` calls return, fewer where they take long."""
    start, found = time.perf_counter(), []
    while len(found) < repeats and (not found or time.perf_counter() - start < ENOUGH):
        found.append(call())
    return found


def summary(found: list[float]) -> dict:
    return {
        "seconds": statistics.median(found), "fastest": min(found), "slowest": max(found), "calls": len(found),
    }  # fmt: skip


# The machine


def rates(device: torch.device) -> Iterator[dict]:
    """In a process of its own, so that the others find the card empty: its name, its memory and its speeds."""
    facts = {}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        facts = {"name": torch.cuda.get_device_name(device), "memory_bytes": total, "free_bytes": free}
        facts["context_bytes"] = Memory(device).context
    on_gpu = 2**30, torch.bfloat16, in_a_row  # 2 GiB, far more than any cache
    numbers, dtype, clock = on_gpu if device.type == "cuda" else (2**24, torch.float32, alone)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        x = torch.randn(numbers, device=device, dtype=dtype)
        read = statistics.median(clock([x.sum], device) for _ in range(20))
        facts["read_bytes_per_second"] = x.nbytes / read
        yield facts | {"matrix_flops_per_second": matrix_rate(device, dtype)}


# The run


def bench_serving(
    measure: str,
    figures: Callable[[Program, Job, Tensor], dict],
    plan: ServingPlan,
    device: torch.device,
    longest: int,
    *,
    more: Callable[[list[Job]], Iterator[dict]] = lambda jobs: iter(()),
    add: bool = False,
    commit: str | None = None,
    output: Path | None = None,
) -> Path:
    """Measure and record; the file is written anew after every row, so that a run that is cut off leaves what it has.

    figures: as `Job` has it;  more: further rows.
    longest: most tokens that are asked for after a prompt.
    add:     keep the rows of the file that this run does not measure; they must be of the same device.
    Returns: the file. Prints the table.
    """
    name = f"{measure}_{device.type}"
    todo = jobs(plan, measure, figures, device, longest)
    warn_of_company()
    say(f"{name}: the device's own rates")
    (card,) = apart(rates, device)
    # To ask for the GPU's name here would leave a CUDA context beside the others.
    where = {"output": output or place(name), "commit": commit, "device": card.get("name", device)}
    earlier = earlier_in(where["output"], card) if add and where["output"].exists() else None
    left_out, rows = {}, []
    facts = {"card": card, "weights": "random", "repeats": plan.repeats, "new": plan.new, "left_out": left_out}
    facts["dtype"] = ", ".join(dict.fromkeys(preset(model).dtype for model in plan.models))
    todo = [replace(job, card=card) for job in todo]

    def write() -> Path:
        return record(name, rows, **where, **facts) if earlier is None else added_to(name, rows, earlier, where, facts)

    for row in chain(*(rows_of(job, left_out) for job in todo), more(todo)):
        rows.append(row)
        write()
    path = write()
    print(table(json.loads(path.read_text(encoding="utf-8"))))
    print(f"recorded in {path}")
    return path


def earlier_in(file: Path, card: dict) -> dict:
    """The measurement in a file. Raises: ValueError if it is of another device."""
    measured = json.loads(file.read_text(encoding="utf-8"))
    if measured["device"] != card.get("name", measured["device"]):
        raise ValueError(f"{file} was measured on {measured['device']}, not on {card['name']}: give another file")
    return measured


def added_to(name: str, rows: list[dict], earlier: dict, where: dict, facts: dict) -> Path:
    """Record the rows after those of an earlier measurement that they do not replace, each of which says its run."""
    new = {_key(row) for row in rows}
    runs = earlier.get("earlier", [])
    kept = [{"run": len(runs)} | row for row in earlier["rows"] if _key(row) not in new]
    runs = [*runs, {fact: earlier[fact] for fact in ("command", "commit", "date", "versions", "card")}]
    measured = {f"{row['side']}, {row['model']}" for row in rows}
    left_out = {side: why for side, why in earlier["left_out"].items() if side not in measured} | facts["left_out"]
    return record(name, [*kept, *rows], **where, **facts | {"left_out": left_out, "earlier": runs})


def _key(row: dict) -> tuple:
    names = ("measure", "model", "quantize", "side", "dtype", "batch")
    return *(row[name] for name in names), row.get("kv"), None if row["measure"] == LONGEST else row["context"]
