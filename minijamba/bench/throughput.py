"""Prompt and answer from end to end, as in the Jamba paper's Figures 2 and 3: contexts and batches that a memory holds.

Source: Jamba (arXiv 2403.19887), section 3.2.
"""

import gc
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from ..budget import budget
from ..config import preset
from ..generate import CHUNK
from .apart import KERNELS
from .prefill import limit_of
from .programs import OURS, Job, Program
from .serving import LONGEST, ServingPlan, bench_serving, one_device, repeated, seconds, summary

COMPARED = "llama-2-70b"  # Figure 2's third model
FIGURE_3A = [(batch, 8192) for batch in (1, 2, 4, 8, 16, 32, 64)]
FIGURE_3B = [(1, context) for context in (32768, 131072, 262144)]
PLANS = {
    "cuda": ServingPlan(
        ["jamba-v0.1", "mixtral-8x7b"], ["int8-all"], FIGURE_3A + FIGURE_3B, [OURS], memory=79, repeats=1, new=512
    ),
    "cpu": ServingPlan(["tiny"], ["int8-all"], [(1, 16), (2, 16)], [OURS], memory=None, repeats=1, new=8),
}


def bench_throughput(device: str = "auto", **options) -> Path:
    """Measure prompt and `new` tokens in one call, and compute the longest contexts; options as for `bench_decode`.

    Returns: the file. Raises: ValueError for what does not exist.
    """
    device, plan, rest = one_device(device, PLANS, options)
    return bench_serving("throughput", figures, plan, device, plan.new, more=longest_contexts, **rest)


def figures(program: Program, job: Job, tokens: Tensor) -> dict:
    """Of the call with all new tokens; its prefill is the time until the first has come, or that of a call with one."""
    seconds(program, tokens, job.new)  # may compile, also for the length of the caches
    until_first = []

    def call() -> float:
        gc.collect()
        start = time.perf_counter()
        if program.moments is None:
            until_first.append(seconds(program, tokens, 1))
            return seconds(program, tokens, job.new)
        when = program.moments(tokens, job.new)
        until_first.append(when[0] - start)
        return when[-1] - start

    whole = summary(repeated(call, job.repeats))
    prefill = statistics.median(until_first)
    written = len(tokens) * job.new
    return {
        **whole,
        "new": job.new,
        "prefill_seconds": prefill,
        "decode_seconds": whole["seconds"] - prefill,
        "tokens_per_second": written / whole["seconds"],
        "all_tokens_per_second": (tokens.numel() + written) / whole["seconds"],
    }


def longest_contexts(jobs: list[Job]) -> Iterator[dict]:
    """Figure 2: the longest context of one sequence that the budget allows in the same memory, computed, not run."""
    asked = dict.fromkeys((job.model, job.quantize) for job in jobs if job.side == OURS and job.limit is not None)
    asked |= dict.fromkeys((COMPARED, scheme) for scheme in ("int8", "int8-all", "int4-all") if asked)
    for model, scheme in asked:
        config = preset(model)
        row = {"measure": LONGEST, "model": model, "quantize": scheme, "side": OURS, "dtype": config.dtype}
        context = limit_of(budget(config, quantize=scheme, chunk=CHUNK, kernels=True), _room(jobs[0]))
        if context:
            yield {**row, "memory": jobs[0].memory, "batch": 1, "context": context, "computed": True}


def _room(job: Job) -> int:
    """Bytes of the job's memory that a model and its caches can take, as `Memory.room` in its own process."""
    most = int(job.memory * 2**30)
    if "context_bytes" not in job.card:
        return most
    return min(most - KERNELS - job.card["context_bytes"], job.card["free_bytes"])
