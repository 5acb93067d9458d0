"""What a trained model does, seen from outside: where it looks, what a head is worth, what it can copy and find.

Models are read and switched through hooks that are gone afterwards; no weight is touched.

| probe | the question |
|---|---|
| `attention_weights` | where does every head look? |
| `induction_scores` | which heads look at what followed the same token the last time? |
| `previous_token_scores` | which heads look at the token before? |
| `switched_off` | what is lost without these heads, or without this mixer? |
| `copying` | how much better is what was said before predicted the second time? |
| `needle_map` | from how far back is one fact found? |
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from .attention import Attention
from .cache import Layout
from .mamba import Mamba
from .model import Jamba
from .tasks import CODE_DIGITS, needle_in_text, repeated
from .tokenizer import SPECIAL_TOKENS


def attention_layers(model: Jamba) -> dict[int, Attention]:
    """The attention mixers of a model by the index of their layer, lowest first; empty for a pure Mamba."""
    mixers = {i: block.mixer for i, block in enumerate(model.model.layers)}
    return {i: mixer for i, mixer in mixers.items() if isinstance(mixer, Attention)}


@torch.no_grad()
def attention_weights(model: Jamba, tokens: Tensor, segments: Tensor | None = None) -> dict[int, Tensor]:
    """How much every head of every attention layer looks at each earlier token, when the model reads `tokens`.

        w_ts = softmax_s(q_t . k_s / sqrt(p)),   over the visible s; the head's output is sum_s w_ts v_s

    Args:
        tokens:   (b, t) int64.
        segments: (b, t) int, packed documents, as the model takes them.
    Returns: index of the layer -> (b, h, t, s), float32 at least; each row sums to 1, with zeros where nothing is seen.
    """
    found = {}

    def remember(i: int) -> Callable:
        def hook(mixer: Attention, inputs: tuple) -> None:
            x, layout = inputs[:2]
            found[i] = _weights(mixer, x, layout)

        return hook

    with ExitStack() as hooks:
        for i, mixer in attention_layers(model).items():
            hooks.enter_context(mixer.register_forward_pre_hook(remember(i)))
        model(tokens.to(model.device), segments=None if segments is None else segments.to(model.device), last_only=True)
    return found


def _weights(mixer: Attention, x: Tensor, layout: Layout) -> Tensor:
    """What a layer makes of its input x (b, t, d): weights (b, h, t, s)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    q, k = (heads.to(wide) for heads in mixer.heads(x, layout)[:2])
    k = repeat(k, "b s g p -> b s (g n) p", n=q.shape[2] // k.shape[2])
    scores = torch.einsum("b t h p, b s h p -> b h t s", q, k) / mixer.head_dim**0.5
    visible = layout.visible
    if visible is None:
        visible = torch.ones(1, *scores.shape[2:], dtype=torch.bool, device=x.device).tril()
    return scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)


@contextmanager
def switched_off(model: Jamba, parts: Mapping[int, Sequence[int] | str]) -> Iterator[None]:
    """Inside the block these heads, or whole mixers, add nothing to the residual stream.

        with switched_off(model, {4: [0, 3], 5: "all"}):     # two heads of layer 4, and all of layer 5's mixer
            logits = model(tokens)

    A head h is its slice p h .. p (h + 1) of what enters o_proj, and that is set to zero. The feed-forward of a layer
    goes on working, and so does a Mamba mixer's own state. Blocks may be nested; afterwards, also after an exception,
    the model is as before.

    Args:
        parts: index of the layer -> heads of an attention layer, or "all" for the mixer of any layer.
    Raises: ValueError for a layer or a head that does not exist, or heads of a Mamba layer.
    """
    with ExitStack() as hooks:
        for i, heads in parts.items():
            mixer = _checked_mixer(model, i, heads)
            if isinstance(heads, str):
                hooks.enter_context(mixer.register_forward_hook(lambda mixer, inputs, y: torch.zeros_like(y)))
            else:
                hooks.enter_context(mixer.o_proj.register_forward_pre_hook(_without(heads, mixer.head_dim)))
        yield


def _without(heads: Sequence[int], width: int) -> Callable:
    def hook(o_proj: torch.nn.Linear, inputs: tuple[Tensor]) -> Tensor:
        y = rearrange(inputs[0], "b t (h p) -> b t h p", p=width).clone()
        y[:, :, list(heads)] = 0
        return rearrange(y, "b t h p -> b t (h p)")

    return hook


def _checked_mixer(model: Jamba, i: int, heads: Sequence[int] | str) -> Attention | Mamba:
    layers, queries = len(model.model.layers), model.config.num_attention_heads
    if i not in range(layers):
        raise ValueError(f"there is no layer {i}: the model has {layers}, counted from 0")
    mixer = model.model.layers[i].mixer
    if mixer is None:
        raise ValueError(f"layer {i} has no mixer to switch off, only a feed-forward: name another layer")
    if isinstance(heads, str):
        if heads != "all":
            raise ValueError(f'layer {i}: {heads!r} is not understood, give a list of heads, or "all"')
    elif not isinstance(mixer, Attention):
        raise ValueError(f'layer {i} is a Mamba layer and has no heads: give "all" for its whole mixer')
    elif wrong := [head for head in heads if head not in range(queries)]:
        raise ValueError(f"layer {i} has no head {wrong[0]}: its {queries} heads are counted from 0")
    return mixer


def induction_scores(
    model: Jamba, *, length: int = 256, batch: int = 8, seed: int = 0, vocabulary: Sequence[int] | None = None
) -> Tensor:
    """Which heads are induction heads: they look at what came after the same token the last time.

    Random tokens are read twice, so that token t of the second half occurred at t - length / 2, and

        score = mean over the second half of w[t, t - length/2 + 1]

    which is 1 for a head that does nothing else, and about 1 / t for one that looks everywhere alike.

    Args:
        length, batch: of the rows, even; see `tasks.repeated`.
        seed:       of the random tokens.
        vocabulary: ids to draw from; all that are not special when None.
    Returns: (attention layers, h), layers in their order.
    Source:  Olsson et al., In-context Learning and Induction Heads (arXiv 2209.11895).
    """
    tokens = _repeated(model, length, batch, seed, vocabulary)
    queries = torch.arange(length // 2, length)
    return _mean_weight(model, tokens, queries, queries - length // 2 + 1)


def previous_token_scores(
    model: Jamba, *, length: int = 128, batch: int = 8, seed: int = 0, vocabulary: Sequence[int] | None = None
) -> Tensor:
    """Which heads look at the token before, on random tokens that are read once.

        score = mean over t > 0 of w[t, t - 1]

    length: of the rows, at least 2. Otherwise as `induction_scores`.
    """
    tokens = _repeated(model, 2 * length, batch, seed, vocabulary)[:, :length]
    queries = torch.arange(1, length)
    return _mean_weight(model, tokens, queries, queries - 1)


def _mean_weight(model: Jamba, tokens: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """(attention layers, h): the mean of w[t, s] over pairs of a query's place t and a key's place s."""
    found = [weights[:, :, queries, keys].mean((0, 2)).cpu() for weights in attention_weights(model, tokens).values()]
    return torch.stack(found) if found else torch.empty(0, model.config.num_attention_heads)


def _repeated(model: Jamba, length: int, batch: int, seed: int, vocabulary: Sequence[int] | None) -> Tensor:
    ids = range(len(SPECIAL_TOKENS), model.config.vocab_size) if vocabulary is None else vocabulary
    return repeated(batch, length, vocabulary=ids, generator=torch.Generator().manual_seed(seed)).tokens


class Copying(NamedTuple):
    """Cross-entropy of random tokens that are read twice, nats a token."""

    first: float  # the first time; ln(ids) is the best that a model which knows the ids can do
    second: float  # the second time; 0 for a model that looks everything up

    @property
    def gain(self) -> float:
        """What having read them once is worth."""
        return self.first - self.second


@torch.no_grad()
def copying(
    model: Jamba, *, length: int = 256, batch: int = 8, seed: int = 0, vocabulary: Sequence[int] | None = None
) -> Copying:
    """How well a model says again what it has read: the loss on random tokens the first and the second time.

    No model can have learned the rows, so the difference comes from the context alone. The first token of either half
    is not judged: nothing announces it. Arguments as of `induction_scores`.
    """
    tokens = _repeated(model, length, batch, seed, vocabulary).to(model.device)
    logits = model(tokens[:, :-1])
    wide = torch.promote_types(logits.dtype, torch.float32)
    nats = F.cross_entropy(logits.to(wide).transpose(1, 2), tokens[:, 1:], reduction="none")  # (b, t-1)
    half = length // 2
    return Copying(nats[:, : half - 1].mean().item(), nats[:, half:].mean().item())


class NeedleMap(NamedTuple):
    """How a needle's digits are predicted, (lengths, depths) each, means over trials and digits."""

    right: Tensor  # share of the digits that are the likeliest token
    probability: Tensor  # given to the right digit; 0.1 from a model that knows only that a digit comes


@torch.no_grad()
def needle_map(
    model: Jamba,
    tokenizer,
    haystack: Tensor | np.ndarray,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int = 8,
    seed: int = 0,
    batch: int = 8,
) -> NeedleMap:
    """From where in how long a text one line is found again: `tasks.needle_in_text` at every length and depth.

    Args:
        haystack: (t,) tokens of source text that the model was not trained on, longer than the longest length.
        lengths:  of the rows, tokens.
        depths:   0 puts the needle first, 1 right before the question.
        trials:   needles a cell; trial i has the secret of seed + i in every cell.
        batch:    rows that are read at once; changes speed and memory, not the map.
    Raises: ValueError for no length, depth or trial, and as `tasks.needle_in_text`.
    """
    for name, size in (("lengths", len(lengths)), ("depths", len(depths)), ("trials", trials), ("batch", batch)):
        if size < 1:
            raise ValueError(f"{name} must be at least one, or there is nothing to measure")
    right, probability = [], []
    for length in lengths:
        rows = [
            needle_in_text(tokenizer, haystack, length, depth, seed=seed + trial)
            for depth in depths
            for trial in range(trials)
        ]
        tokens = torch.cat([row.tokens for row in rows]).to(model.device)
        digits = torch.cat([row.targets for row in rows])[:, -CODE_DIGITS:].to(model.device)
        logits = torch.cat([_last_logits(model, some, CODE_DIGITS) for some in tokens.split(batch)])
        likeliest, p = logits.argmax(-1) == digits, logits.softmax(-1).gather(2, digits[:, :, None])[:, :, 0]
        right.append(likeliest.float().view(len(depths), -1).mean(1).cpu())
        probability.append(p.float().view(len(depths), -1).mean(1).cpu())
    return NeedleMap(torch.stack(right), torch.stack(probability))


def _last_logits(model: Jamba, tokens: Tensor, number: int) -> Tensor:
    """Logits (b, number, v) at the last tokens only, float32 at least: those of a long row would fill the memory."""
    cache = model.new_cache(len(tokens), capacity=tokens.shape[1])
    model(tokens[:, :-number], cache=cache, last_only=True)
    logits = model(tokens[:, -number:], cache=cache)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
