"""Writing after a prompt: tokens a second of whole models, and how near that is to reading the weights once."""

import gc
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..budget import budget
from ..generate import generate
from ..model import Jamba, Trace
from ..packed_files import in_memory
from .programs import OURS, TRANSFORMERS, Job, Program, chunk_of, write_ours
from .serving import ALL, ServingPlan, bench_serving, one_device, repeated, seconds, summary

LOOPED = 512  # tokens that are compared with those of the plain loop
LOOKED_AT = 8  # steps in which the experts are counted
EMBEDDING = "model.embed_tokens.weight"
PLANS = {
    "cuda": ServingPlan(
        ["jamba-v0.1", "mixtral-8x7b"], ["int8-all", "int8", "int4-all", None],
        [(1, 1024), (4, 1024), (16, 1024), (64, 1024), (1, 262144)], ALL, memory=79, repeats=3, new=128,
    ),
    "cpu": ServingPlan(
        ["tiny"], ["int8-all", None], [(1, 16), (2, 16)], [OURS, TRANSFORMERS], memory=None, repeats=3, new=8
    ),
}  # fmt: skip


def bench_decode(device: str = "auto", **options) -> Path:
    """Measure decoding; options as the fields of `ServingPlan`, what is None as the device's plan has it.

        seconds a token = (t(1 + 2 new) - t(1 + new)) / new,    t(n): from the start until n new tokens have come

    so that the prompt's time goes out: both in one call where a program tells when each token came, else in two.
    Also `add`, `commit` and `output` of `bench_serving`.
    Returns: the file. Raises: ValueError for what does not exist.
    """
    device, plan, rest = one_device(device, PLANS, options)
    return bench_serving("decode", figures, plan, device, 1 + 2 * plan.new, **rest)


def figures(program: Program, job: Job, tokens: Tensor) -> dict:
    """Seconds a step and what follows; ours also with the least that a step must read."""
    _step_seconds(program, tokens, job.new)  # the first call may compile
    step = summary(repeated(lambda: _step_seconds(program, tokens, job.new), job.repeats))
    row = {**step, "new": job.new, "tokens_per_second": len(tokens) / step["seconds"]}
    if program.model is not None:
        distinct = distinct_experts(program.model, tokens, job.kv)
        # Of the steps that are timed, the first sees new + 1 tokens behind the prompt and the last 2 new.
        least = step_bytes(program.model, len(tokens), tokens.shape[1] + (3 * job.new + 1) // 2, distinct, job.kv)
        row |= {"bytes": least, "distinct_experts": distinct}
        row["roofline"] = least / job.card["read_bytes_per_second"] / step["seconds"]
    if job.loop and program.loop is not None:
        row["loop"] = beside_loop(program, job, tokens)
    return row


def _step_seconds(program: Program, tokens: Tensor, new: int) -> float:
    few, many = 1 + new, 1 + 2 * new
    if program.moments is None:
        return (seconds(program, tokens, many) - seconds(program, tokens, few)) / new
    gc.collect()
    when = program.moments(tokens, many)
    return (when[many - 1] - when[few - 1]) / new


def beside_loop(program: Program, job: Job, tokens: Tensor) -> dict:
    """Seconds a step of the program's plain loop, and of ours how many of a row's first tokens are those of the graph.

    new: tokens that both wrote in each row;  same: before the first difference, in the row where it comes first.
    """
    found = {"seconds": _step_seconds(program._replace(moments=program.loop), tokens, job.new)}
    if program.model is None:
        return found
    graph, loop = (write_ours(program.model, job.kv, tokens, LOOPED, graph=graph) for graph in (True, False))
    same = int((graph == loop).long().cumprod(-1).sum(-1).min())
    return found | {"new": LOOPED, "same": same}


def step_bytes(model: Jamba, batch: int, context: int, distinct: list[float], kv: str | None = None) -> int:
    """Bytes that a step of `batch` rows, each at `context` tokens, must move at least.

        weights outside the experts, as they are held, once; of an embedding that is not the head the batch's rows
        + for each MoE layer: distinct experts  x  bytes of one
        + keys and values of the context, read  + states and windows of Mamba, read and written

    distinct: for each MoE layer, how many experts its tokens chose together, the mean over steps.
    """
    config, experts, total = model.config, {}, 0
    for name, tensor in in_memory(model).items():
        layer, _, expert = name.partition(".experts.")
        if expert:
            experts[layer] = experts.get(layer, 0) + tensor.nbytes // config.num_experts
        elif name != EMBEDDING or config.tie_word_embeddings:
            total += tensor.nbytes
    if not config.tie_word_embeddings:
        total += batch * config.hidden_size * model.dtype.itemsize
    seen = min(context, config.sliding_window or context)
    plan = budget(config, context=seen, batch=batch, dtype=model.dtype, kv=kv)
    chosen = sum(count * size for count, size in zip(distinct, experts.values(), strict=True))
    return round(total + chosen + plan.kv_bytes + 2 * plan.state_bytes)


@torch.no_grad()
def distinct_experts(model: Jamba, tokens: Tensor, kv: str | None = None) -> list[float]:
    """For each MoE layer, the experts that a step's tokens choose together, the mean over steps after the prompts."""
    moe = sum(layer.feed_forward == "moe" for layer in model.config.layers)
    if len(tokens) == 1:  # one token chooses no expert twice
        return [float(model.config.num_experts_per_tok)] * moe
    if not moe:
        return []
    counts = [_chosen(trace) for trace in _steps(model, tokens, kv)]
    return [sum(layer) / len(counts) for layer in zip(*counts, strict=True)]


def _chosen(trace: Trace) -> list[int]:
    return [len(experts.unique()) for experts in trace.experts]


def _steps(model: Jamba, tokens: Tensor, kv: str | None) -> Iterator[Trace]:
    """The traces of steps, one after the other: of the prompts' last tokens and of what follows."""
    batch, context = tokens.shape
    cache = model.new_cache(batch, capacity=context + LOOKED_AT, kv=kv)
    before, step = tokens[:, :-1], tokens[:, -1:].to(model.device)
    generate(model, before, max_new_tokens=0, cache=cache, chunk=chunk_of(model.device, batch))
    for _ in range(LOOKED_AT):
        trace = Trace()
        step = model(step, cache=cache, trace=trace)[:, -1:].argmax(-1)
        yield trace
