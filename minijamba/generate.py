"""Writing text: the prompt in chunks through both caches, then one token at a time."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .budget import budget, refuse_if_too_large
from .cache import Cache
from .model import Jamba, check_cache, check_tokens
from .moe import Experts, waits_for_host
from .quantize import PackedWeight
from .rungs import kernels_in_force

CHUNK = 16384  # tokens of prompt that a GPU reads at once
AHEAD = 3  # steps


@torch.no_grad()
def generate(
    model: Jamba,
    tokens: Tensor | Sequence[int] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: int | Sequence[int] | None = None,
    stream: Callable[[list[int]], None] | None = None,
    mask: Tensor | None = None,
    cache: Cache | None = None,
    seed: int | None = None,
    chunk: int | None = None,
    kv: str | None = None,
    graph: bool = True,
    progress: bool = False,
) -> Tensor:
    """Continue every prompt by up to `max_new_tokens` tokens.

    A batch gives each row what it gets alone, whatever the padding. Chunks of the prompt change memory, not results.

    Args:
        tokens: (b, t) int64, or one prompt as a list of ints, or prompts of different lengths as lists of ints.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it before sampling.
        top_k:  sample among the k likeliest tokens only.
        top_p:  sample among the fewest tokens whose probabilities reach p, in (0, 1].
        repetition_penalty: logits of tokens in this prompt, or written after it, are divided by it if positive, else
            multiplied; 1 = off.
        stop:   token or tokens that end a row; the model's own (`config.stop_tokens`) when None, () for none.
        stream: called after each step with that step's token of every row. If it raises, the cache ends with it.
        mask:   (b, t) bool, True for real tokens, when `tokens` is padded.
        cache:  sequences to continue; on return it holds the prompt and everything returned, ready for the next turn.
        seed:   makes sampling repeatable.
        chunk:  tokens of prompt per call of the model; bounds the memory of activations. 2,048, on a GPU 16,384.
        kv:     "int8" keeps keys and values in a byte a number, for twice the context; None in the model's dtype.
        graph:  on a GPU, record one step as a CUDA graph and replay it; False runs the same kernels one by one.
        progress: show progress bars.
    Returns: (b, new) int64, the new tokens; rows that stopped are filled up with the padding token.
    Raises:  ValueError for an empty prompt, tokens out of range, options out of range, or a context beyond memory.
    """
    tokens, mask = _prompts(model, tokens, mask)
    chunk = (CHUNK if model.device.type == "cuda" else 2048) if chunk is None else chunk
    _check_options(max_new_tokens, temperature, top_k, top_p, repetition_penalty, chunk)
    batch = len(tokens)
    context = tokens.shape[1] + max_new_tokens + (0 if cache is None else cache.filled)
    reused = cache is not None
    if reused:
        check_cache(model, cache, batch)
        if kv not in (None, cache.kv):
            raise ValueError(f"kv is {kv!r}, but the given cache keeps its own kind, {cache.kv!r}: leave kv out")
    _refuse_beyond_memory(model, context, batch, chunk, kv, cache, ragged=not bool(mask.all()))
    cache = cache if reused else model.new_cache(batch, kv=kv)
    cache.reserve(context)
    logits = _prefill(model, tokens, mask, cache, chunk, progress)
    if max_new_tokens == 0:
        return tokens.new_empty(batch, 0)

    def choose(logits: Tensor, seen: Tensor) -> Tensor:
        return sample(_penalise(logits, seen, repetition_penalty), temperature, top_k, top_p, generator)

    generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)
    seen = None if repetition_penalty == 1 else _tokens_seen(model, tokens, mask)
    writer = Writer(model, cache, choose, seen, _stops(model, stop))
    writer.write(logits)
    recordable = _recordable(model, cache)
    if recordable:
        cache.fix(context)
    try:
        new = _write(writer, max_new_tokens, graph and recordable, generator, stream, progress)
    except BaseException:
        cache.whole = False  # a GPU is steps ahead of what was seen
        raise
    if reused and writer.steps < len(new):
        writer.step()
    cache.measure()
    return torch.tensor(new, device=model.device).T.contiguous()


class Writer:
    """What writes one token of every row after the other, all of it on the model's device.

    token:    (b,) int64 the token that was chosen last; padding in rows that have ended.
    finished: (b,) bool, rows that have ended.
    writing:  (b,) bool, rows that had not ended before `token`: it still belongs to them.
    """

    def __init__(
        self, model: Jamba, cache: Cache, choose: Callable[[Tensor, Tensor | None], Tensor], seen: Tensor | None,
        stops: list[int],
    ) -> None:  # fmt: skip
        self.model, self.cache, self.choose, self.seen = model, cache, choose, seen
        batch = len(cache.lengths)
        self.stops = torch.tensor(stops, dtype=torch.long, device=model.device)
        self.padding = model.config.pad_token_id or 0
        self.token = torch.zeros(batch, dtype=torch.long, device=model.device)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=model.device)
        self.writing = ~self.finished
        self.steps = 0  # tokens that were written and read again
        self.graph: torch.cuda.CUDAGraph | None = None

    def write(self, logits: Tensor) -> None:
        """Choose the next token, from the logits (b, v) after what was read."""
        chosen = self.choose(logits, self.seen)
        if self.stops.numel():
            chosen = chosen.masked_fill(self.finished, self.padding)
            self.writing.copy_(~self.finished)
            self.finished |= torch.isin(chosen, self.stops)
        if self.seen is not None:
            self.seen |= torch.zeros_like(self.seen).scatter_(1, chosen[:, None], True) & self.writing[:, None]
        self.token.copy_(chosen)

    def step(self) -> None:
        """Read the token that was chosen last and choose the next."""
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()
            self.cache.filled += 1
        self.steps += 1

    def _step(self) -> None:
        mask = self.writing[:, None] if self.stops.numel() else None
        self.write(self.model(self.token[:, None], cache=self.cache, mask=mask)[:, 0])

    def record(self, generator: torch.Generator | None) -> None:
        """From now on a step is one launch, of the CUDA graph that is recorded here. A step must have run before."""
        graph, filled = torch.cuda.CUDAGraph(), self.cache.filled
        if generator is not None:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            self._step()
        self.cache.filled, self.graph = filled, graph  # recording is not running


def _recordable(model: Jamba, cache: Cache) -> bool:
    """Whether a CUDA graph can record a step: on a GPU, with kernels that never ask the host."""
    if model.device.type != "cuda" or cache.documents is not None or not kernels_in_force(model.device):
        return False
    stacks = (module.gate_proj for module in model.modules() if isinstance(module, Experts))
    bits = max((stack.packed().bits if isinstance(stack, PackedWeight) else 16 for stack in stacks), default=16)
    return not waits_for_host(model.config, model.dtype, model.device, len(cache.lengths), bits)


def _write(
    writer: Writer, steps: int, record: bool, generator: torch.Generator | None,
    stream: Callable[[list[int]], None] | None, progress: bool,
) -> list[list[int]]:  # fmt: skip
    """The new tokens, step by step, each a list with one of every row.

    A GPU works AHEAD steps ahead of what is looked at here, so that it never waits for the host. Steps in which all
    rows had ended already change nothing.
    """
    inbox, new = _Inbox(writer.token, steps), []
    stops = set(writer.stops.tolist())
    ended = [False] * len(writer.token)
    inbox.post(writer.token)
    for i in _steps(steps, progress):
        while inbox.posted < min(i + 1 + AHEAD * inbox.waits, steps):
            if record and writer.steps == 1:
                writer.record(generator)
            writer.step()
            inbox.post(writer.token)
        chosen = inbox.take(i)
        new.append(chosen)
        if stream is not None:
            stream(chosen)
        ended = [before or token in stops for before, token in zip(ended, chosen, strict=True)]
        if all(ended):
            break
    return new


class _Inbox:
    """Tokens (b,) on their way from the device: posted without waiting, taken when they have come."""

    def __init__(self, like: Tensor, steps: int) -> None:
        self.waits = like.device.type == "cuda"
        self.tokens = torch.empty(steps, *like.shape, dtype=like.dtype, pin_memory=self.waits)
        self.events, self.posted = [], 0

    def post(self, tokens: Tensor) -> None:
        self.tokens[self.posted].copy_(tokens, non_blocking=True)
        if self.waits:
            self.events.append(torch.cuda.Event())
            self.events[-1].record()
        self.posted += 1

    def take(self, i: int) -> list[int]:
        if self.waits:
            self.events[i].synchronize()
        return self.tokens[i].tolist()


def sample(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token for every row: logits (b, v) -> (b,) int64. Arguments as in `generate`."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ranked[:, top_k:] = 0
        ranked = ranked / ranked.sum(-1, keepdim=True)
    if top_p is not None:
        # A token stays if those before it have not yet reached p: the first always does.
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
    return order.gather(1, torch.multinomial(ranked, 1, generator=generator))[:, 0]


def _penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    if penalty == 1:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _prefill(model: Jamba, tokens: Tensor, mask: Tensor, cache: Cache, chunk: int, progress: bool) -> Tensor:
    """Logits (b, v) after each row's last real token. Real tokens are moved to the front of their rows first."""
    order = (~mask).long().argsort(dim=1, stable=True)
    tokens, mask = tokens.gather(1, order), mask.gather(1, order)
    logits = None
    for start in _steps(range(0, tokens.shape[1], chunk), progress, "prompt"):
        here = mask[:, start : start + chunk]
        last = model(tokens[:, start : start + chunk], cache=cache, mask=here, last_only=True)[:, -1]
        logits = last if logits is None else torch.where(here.any(1)[:, None], last, logits)
    return logits


def _steps(steps: int | range, progress: bool, name: str = "tokens"):
    steps = range(steps) if isinstance(steps, int) else steps
    if not progress:
        return steps
    from tqdm import tqdm

    return tqdm(steps, desc=name, leave=False)


def _prompts(model: Jamba, tokens: Tensor | Sequence, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Prompts as (b, t) int64 on the model's device, with the mask of real tokens; lists are padded on the left."""
    if not isinstance(tokens, Tensor):
        if mask is not None:
            raise ValueError("mask goes with a tensor of tokens; lists of prompts are padded for you")
        rows = [list(row) for row in tokens] if len(tokens) and not isinstance(tokens[0], int) else [list(tokens)]
        longest = max(map(len, rows))
        real = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], dtype=torch.bool)
        tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows], dtype=torch.long)
        mask = real.view_as(tokens)
    if tokens.dim() != 2 or tokens.shape[0] == 0:
        raise ValueError(f"tokens must be (b, t) with at least one row, not {tuple(tokens.shape)}")
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    if mask.shape != tokens.shape:
        raise ValueError(f"mask must have the shape of tokens {tuple(tokens.shape)}, not {tuple(mask.shape)}")
    if tokens.shape[1] == 0 or not bool(mask.any(1).all()):
        raise ValueError("a prompt is empty: give every row at least one token, such as the beginning-of-text token")
    check_tokens(model.config, tokens)
    return tokens.to(model.device), mask.to(model.device)


def _tokens_seen(model: Jamba, tokens: Tensor, mask: Tensor) -> Tensor:
    """(b, v) bool: which tokens each row contains."""
    seen = torch.zeros(len(tokens), model.config.vocab_size + 1, dtype=torch.bool, device=tokens.device)
    return seen.scatter(1, tokens.masked_fill(~mask, model.config.vocab_size), True)[:, :-1]


def _stops(model: Jamba, stop: int | Sequence[int] | None) -> list[int]:
    if stop is None:
        return list(model.config.stop_tokens)
    return [stop] if isinstance(stop, int) else list(stop)


def _refuse_beyond_memory(
    model: Jamba, context: int, batch: int, chunk: int, kv: str | None, cache: Cache | None, ragged: bool
) -> None:  # fmt: skip
    if cache is not None:
        kv, ragged = cache.kv, ragged or cache.ragged or cache.documents is not None  # these need a mask
    plan = budget(
        model.config,
        context=context,
        batch=batch,
        dtype=model.dtype,
        chunk=chunk,
        kv=kv,
        ragged=ragged,
        kernels=kernels_in_force(model.device),
    )
    caches = plan.kv_bytes + plan.state_bytes
    held = 0 if cache is None else min(cache.nbytes, caches)
    what = f"{batch} x {context:,} tokens, {chunk:,} of a prompt at a time,"
    smaller = ["a smaller chunk"] if chunk > 1 else []
    smaller += ['kv="int8"'] if cache is None and kv is None else []
    remedy = f"use {', '.join([*smaller, 'a shorter context', 'a smaller batch'])} or a device with more memory"
    refuse_if_too_large(plan.working_bytes - held, model.device, what, remedy)


def _check_options(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float,
    chunk: int,
) -> None:
    wrong = {
        "max_new_tokens": (max_new_tokens, max_new_tokens < 0, "0 or more"),
        "temperature": (temperature, not temperature >= 0, "0 or more"),  # so NaN is wrong too
        "top_k": (top_k, top_k is not None and top_k < 1, "at least 1"),
        "top_p": (top_p, top_p is not None and not 0 < top_p <= 1, "above 0 and at most 1"),
        "repetition_penalty": (repetition_penalty, not repetition_penalty > 0, "above 0"),
        "chunk": (chunk, chunk < 1, "at least 1"),
    }
    for name, (value, bad, wanted) in wrong.items():
        if bad:
            raise ValueError(f"{name} is {value}; it must be {wanted}")
