"""How well a model predicts text, in bits per byte: the same unit for any model, any tokenizer, and for counting."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .model import Jamba
from .ngram import KneserNey
from .tokenizer import BOS


@dataclass(frozen=True)
class Score:
    """What it costs to predict a text.

    bits:   -log2 p of all its tokens. The <bos> in front is given, and the end of a document is not predicted.
    bytes:  of the text in UTF-8.
    tokens: that were predicted.
    """

    bits: float
    bytes: int
    tokens: int

    @property
    def bits_per_byte(self) -> float:
        """8 for a model that knows nothing of bytes; what is compared, for it does not depend on the tokenizer."""
        return self.bits / self.bytes

    @property
    def nats_per_token(self) -> float:
        """The loss of training, as long as the tokenizer is the same."""
        return self.bits * math.log(2) / self.tokens


def bits_per_byte(
    model: Jamba,
    tokenizer,
    documents: Mapping[str, str] | Iterable[str],
    *,
    context: int | None = 1024,
    batch: int = 8,
    progress: bool = False,
) -> Score:
    """The cost of the documents, each predicted by itself from its <bos> on.

        bits = - sum over documents of log2 p(token_1 .. token_t | <bos>)

    Args:
        tokenizer: must give every text back from its tokens, as those of `tokenizer` do.
        documents: name -> text, or texts.
        context:   most tokens to be predicted from one <bos>, for attention takes time with the square of it. What is
                   longer is cut into pieces that know nothing of each other, each behind a <bos> of its own; None cuts
                   nothing.
        batch:     pieces at once, padded to the longest; changes speed and memory, not the score.
        progress:  show a progress bar.
    Raises: ValueError for no document, an empty one, a tokenizer of another model, or a model without <bos>.
    """
    if context is not None and context < 1:
        raise ValueError(f"context is {context}, but must be at least 1, or None for whole documents")
    check_vocabulary(tokenizer, model.config.vocab_size)
    texts = _named(documents)
    pieces = []
    for ids in _encoded(tokenizer, texts):
        length = context or len(ids)
        pieces += [[bos(model), *ids[start : start + length]] for start in range(0, len(ids), length)]
    predictions = predict(model, pieces, batch=batch, progress=progress)
    return _score((log_p for log_p, _ in predictions), texts)


def ngram_bits_per_byte(ngram: KneserNey, tokenizer, documents: Mapping[str, str] | Iterable[str]) -> Score:
    """The cost of the documents to an n-gram model, each predicted by itself from its <bos> on. Raises: as above."""
    check_vocabulary(tokenizer, ngram.vocab_size)
    texts = _named(documents)
    rows = ([BOS, *ids] for ids in _encoded(tokenizer, texts))
    return _score((torch.from_numpy(ngram.log_probability(row)[1:]) for row in rows), texts)


@torch.no_grad()
def predict(
    model: Jamba, rows: Sequence[Sequence[int]], *, batch: int = 8, chunk: int = 1024, progress: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """How the model predicts every token of every row but the first, from those before it in its row.

    Args:
        rows:  ids, of different lengths from 2 on.
        batch: rows at once, those of similar length together. chunk: tokens a call, the rest through the cache.
    Returns: for each row of t tokens log p (t-1,) float64, nats, and whether the token is the likeliest (t-1,) bool.
    Raises:  ValueError for a row of fewer than 2 tokens.
    """
    if short := [row for row in rows if len(row) < 2]:
        raise ValueError(f"there is nothing to predict in {list(short[0])}: a row needs <bos> and a token at least")
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    groups = [order[start : start + batch] for start in range(0, len(order), batch)]
    predictions = {}
    for group in _steps(groups, progress):
        tokens, mask = _padded([rows[i] for i in group])
        log_p, likeliest = _predict_batch(model, tokens.to(model.device), mask.to(model.device), chunk)
        for i, *prediction in zip(group, log_p.cpu().double(), likeliest.cpu(), strict=True):
            predictions[i] = tuple(values[: len(rows[i]) - 1] for values in prediction)
    return [predictions[i] for i in range(len(rows))]


def _padded(rows: list[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of ids -> (b, t) int64 and the (b, t) mask of real tokens, padding on the right."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return tokens, torch.arange(longest) < lengths[:, None]


def _predict_batch(model: Jamba, tokens: Tensor, mask: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """tokens, mask (b, t) -> log p and whether likeliest, (b, t-1) each, of tokens 1 .. t-1; anything at padding."""
    # A token is read if the one after it is real: the last of a row predicts nothing that is judged.
    inputs, targets, real = tokens[:, :-1], tokens[:, 1:], mask[:, 1:]
    steps = inputs.shape[1]
    cache = model.new_cache(len(tokens), capacity=steps) if steps > chunk else None
    log_p, likeliest = [], []
    for start in range(0, steps, chunk):
        here = slice(start, start + chunk)
        logits = model(inputs[:, here], cache=cache, mask=real[:, here])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_p.append(logits.log_softmax(-1).gather(2, targets[:, here, None])[..., 0])
        likeliest.append(logits.argmax(-1) == targets[:, here])
    return torch.cat(log_p, dim=1), torch.cat(likeliest, dim=1)


def bos(model: Jamba) -> int:
    """The token that opens a document. Raises: ValueError if the model has none."""
    if model.config.bos_token_id is None:
        raise ValueError(
            "the model's config has no bos_token_id, so that nothing predicts a document's first token: set it to the "
            "token that opened documents in training"
        )
    return model.config.bos_token_id


def check_vocabulary(tokenizer, vocab_size: int) -> None:
    """Raises: ValueError unless a tokenizer can be the one of a model with so many tokens.

    A model may have more tokens than its tokenizer, to a rounder number; never twice as many.
    """
    if not tokenizer.vocab_size <= vocab_size < 2 * tokenizer.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {vocab_size}, so they are no pair: put the "
            f"tokenizer.json that the model was trained with beside its weights"
        )


def _named(documents: Mapping[str, str] | Iterable[str]) -> dict[str | int, str]:
    if isinstance(documents, str):
        raise ValueError("documents is a str: give a list of texts, such as [text], or a dict of name -> text")
    texts = dict(documents) if isinstance(documents, Mapping) else dict(enumerate(documents))
    if not texts:
        raise ValueError("there is no document to predict: give one text at least")
    return texts


def _encoded(tokenizer, texts: dict[str | int, str]) -> Iterable[list[int]]:
    for name, text in texts.items():
        ids = tokenizer.encode(text)
        if not ids:
            raise ValueError(f"document {name!r} is empty, so there is nothing to predict in it: leave it out")
        yield ids


def _score(log_p: Iterable[Tensor], texts: dict[str | int, str]) -> Score:
    """log p of the tokens of all pieces, nats -> Score."""
    log_p = torch.cat(list(log_p))
    size = sum(len(text.encode("utf-8")) for text in texts.values())
    return Score(-log_p.sum().item() / math.log(2), size, len(log_p))


def _steps(groups: list, progress: bool):
    if not progress:
        return groups
    from tqdm import tqdm

    return tqdm(groups, desc="predicting", leave=False)
