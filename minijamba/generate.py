"""Writing text: the prompt in chunks through both caches, then one token at a time."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .budget import budget, refuse_if_too_large
from .cache import Cache
from .model import Jamba, check_tokens


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
    chunk: int = 2048,
    progress: bool = False,
) -> Tensor:
    """Continue every prompt by up to `max_new_tokens` tokens.

    A batch gives each row what it gets alone, whatever the padding. Chunks of the prompt change memory, not results.

    Args:
        tokens: (b, t) int64, or one prompt as a list of ints, or prompts of different lengths as lists of ints.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it before sampling.
        top_k:  sample among the k likeliest tokens only.
        top_p:  sample among the fewest tokens whose probabilities reach p, in (0, 1].
        repetition_penalty: logits of tokens already in the row are divided by it if positive, else multiplied; 1 = off.
        stop:   token or tokens that end a row; the model's own (`config.stop_tokens`) when None, () for none.
        stream: called after each step with that step's token of every row.
        mask:   (b, t) bool, True for real tokens, when `tokens` is padded.
        cache:  sequences to continue; on return it holds the prompt and everything returned, ready for the next turn.
        seed:   makes sampling repeatable.
        chunk:  tokens of prompt per call of the model; bounds the memory of activations.
        progress: show progress bars.
    Returns: (b, new) int64, the new tokens; rows that stopped are filled up with the padding token.
    Raises:  ValueError for an empty prompt, tokens out of range, options out of range, or a context beyond memory.
    """
    tokens, mask = _prompts(model, tokens, mask)
    _check_options(max_new_tokens, temperature, top_k, top_p, repetition_penalty, chunk)
    batch = len(tokens)
    context = tokens.shape[1] + max_new_tokens + (0 if cache is None else cache.filled)
    _refuse_beyond_memory(model, context, batch, chunk)
    reused = cache is not None
    cache = cache if reused else model.new_cache(batch, capacity=context)

    generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)
    stops = torch.tensor(_stops(model, stop), dtype=torch.long, device=model.device)
    seen = _tokens_seen(model, tokens, mask)
    finished = torch.zeros(batch, dtype=torch.bool, device=model.device)
    padding = model.config.pad_token_id or 0
    logits = _prefill(model, tokens, mask, cache, chunk, progress)
    new: list[Tensor] = []
    for _ in _steps(max_new_tokens, progress):
        chosen = sample(_penalise(logits, seen, repetition_penalty), temperature, top_k, top_p, generator)
        chosen = chosen.masked_fill(finished, padding)
        new.append(chosen)
        if stream is not None:
            stream(chosen.tolist())
        writing = ~finished
        finished = finished | torch.isin(chosen, stops)
        done = len(new) == max_new_tokens or bool(finished.all())
        if reused or not done:
            logits = model(chosen[:, None], cache=cache, mask=writing[:, None])[:, -1]
            seen[torch.arange(batch, device=seen.device), chosen] |= writing
        if done:
            break
    return torch.stack(new, dim=1) if new else tokens.new_empty(batch, 0)


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
    probabilities = (logits.float() / temperature).softmax(-1)
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


def _refuse_beyond_memory(model: Jamba, context: int, batch: int, chunk: int) -> None:
    plan = budget(model.config, context=context, batch=batch, dtype=model.dtype, chunk=chunk)
    refuse_if_too_large(plan.working_bytes, model.device, f"the cache of {batch} sequences of {context:,} tokens")


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
        "temperature": (temperature, temperature < 0, "0 or more"),
        "top_k": (top_k, top_k is not None and top_k < 1, "at least 1"),
        "top_p": (top_p, top_p is not None and not 0 < top_p <= 1, "above 0 and at most 1"),
        "repetition_penalty": (repetition_penalty, repetition_penalty <= 0, "above 0"),
        "chunk": (chunk, chunk < 1, "at least 1"),
    }
    for name, (value, bad, wanted) in wrong.items():
        if bad:
            raise ValueError(f"{name} is {value}; it must be {wanted}")


