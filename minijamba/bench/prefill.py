"""Reading a prompt: tokens a second of whole models, and the longest prompt that a memory holds."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..budget import Budget, budget, flops_per_token, mean_context
from ..config import JambaConfig
from ..generate import CHUNK
from .apart import Broke, Memory, apart, say
from .programs import OURS, PROGRAMS, TRANSFORMERS, Job, Program, random_tokens
from .serving import (
    ALL,
    LONGEST,
    ServingPlan,
    bench_serving,
    case_of,
    one_device,
    repeated,
    seconds,
    spoken,
    summary,
)

AFTER = 8  # tokens that are written after the longest prompt
# Of what the budget says: further where it runs, shorter where it does not.
FURTHER, SHORTER = (17 / 16, 18 / 16, 20 / 16), (15 / 16, 14 / 16, 12 / 16, 8 / 16)
PLANS = {
    "cuda": ServingPlan(
        ["jamba-v0.1", "mixtral-8x7b"], ["int8-all", "int8", "int4-all", None],
        [(1, 1024), (1, 8192), (1, 32768), (1, 131072), (1, 262144)], ALL, memory=79, repeats=3,
    ),
    "cpu": ServingPlan(
        ["tiny"], ["int8-all", None], [(1, 16), (1, 64)], [OURS, TRANSFORMERS], memory=None, repeats=3
    ),
}  # fmt: skip


def bench_prefill(device: str = "auto", *, longest: bool = False, tries: int = 2, **options) -> Path:
    """Measure t(1 new token) after prompts; options as for `bench_decode`, without `new`.

    longest: also the longest context of ours with packed weights, looked for from the budget's on, `tries` times.
    Returns: the file. Raises: ValueError for what does not exist.
    """
    device, plan, rest = one_device(device, PLANS, options)
    if longest:
        rest["more"] = partial(longest_rows, tries=tries)
    return bench_serving("prefill", figures, plan, device, 1, **rest)


def figures(program: Program, job: Job, tokens: Tensor) -> dict:
    seconds(program, tokens, 1)
    found = summary(repeated(lambda: seconds(program, tokens, 1), job.repeats))
    work = prompt_flops(job.config, *tokens.shape)
    share = work / job.card["matrix_flops_per_second"] / found["seconds"]
    return {**found, "tokens_per_second": tokens.numel() / found["seconds"], "flops": work, "matrix_share": share}


def prompt_flops(config: JambaConfig, batch: int, context: int) -> float:
    """FLOPs of prompts, as `budget.flops_per_token` counts them, with logits of the last token only."""
    head = 2 * config.vocab_size * config.hidden_size
    return batch * (context * (flops_per_token(config, mean_context(config, context)) - head) + head)


# The longest context


def longest_rows(jobs: list[Job], tries: int) -> Iterator[dict]:
    """A row for each of our jobs with packed weights: the longest context that ran, what the budget said, all tries."""
    for job in jobs:
        if job.side == OURS and job.limit is not None:
            yield _longest(replace(job, measure=LONGEST), tries)


def _longest(job: Job, tries: int) -> dict:
    found = [_try(job, 1.0)]
    for share in (SHORTER if "failed" in found[0] else FURTHER)[: tries - 1]:
        found.append(_try(job, share))
        if ("failed" in found[-1]) != ("failed" in found[0]):
            break
    ran = [row for row in found if "failed" not in row]
    best = max(ran, key=lambda row: row["context"]) if ran else found[-1]
    tried = [{key: row[key] for key in ("context", "seconds", "failed") if key in row} for row in found]
    return best | {"tried": tried}


def _try(job: Job, share: float) -> dict:
    """One context, a share of what the budget says, in a process of its own."""
    row = {}
    try:
        for part in apart(attempt, job, share):
            row |= part
            if "seconds" not in row:
                say(f"{job.model}, {job.quantize}: a context of {row['context']:,}; the budget says {row['said']:,}")
    except Broke as error:
        row |= {"failed": str(error)}
    say(f"  {row.get('failed') or spoken(row)}")
    return case_of(job, 1, row.get("context", 0)) | row


def attempt(job: Job, share: float) -> Iterator[dict]:
    """The context that is tried, then what it took. The context counts the prompt and the tokens written."""
    with torch.cuda.device(job.device) if job.device.type == "cuda" else nullcontext():
        memory = Memory(job.device, job.limit)
        said = limit_of(_plan(job), memory.room)
        context = int(said * share)
        yield {"context": context, "said": said}
        if context <= AFTER:
            raise MemoryError
        program = PROGRAMS[job.side](job, memory)
        memory.start()
        took = seconds(program, random_tokens(job.config, 1, context - AFTER), AFTER)
        yield {"seconds": took, "written": AFTER, "peak_bytes": memory.peak}


def _plan(job: Job) -> Budget:
    on_gpu = job.device.type == "cuda"
    return budget(job.config, quantize=job.quantize, kv=job.kv, chunk=CHUNK if on_gpu else 2048, kernels=on_gpu)


def limit_of(plan: Budget, room: int) -> int:
    """The longest context that the budget allows; 2^20 where it allows any."""
    most = plan.max_context(room)
    return 2**20 if most == math.inf else most
