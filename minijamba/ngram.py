"""What counting alone can predict: an n-gram model with Kneser-Ney smoothing, the yardstick beside a neural model.

It needs NumPy only. Compare it with a model in bits per byte: nats / ln 2 / bytes of the text.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

# Discounts of counts 1, 2, 3 and more where a text is too small, or too regular, to estimate them: as KenLM does.
FALLBACK = (0.5, 1.0, 1.5)


@dataclass(frozen=True)
class Level:
    """All n-grams of one length n that were seen, packed into integers and sorted, and what each is worth.

    grams:    (m,) int64, the n-grams h w: history h, token w.
    share:    (m,) what an n-gram has by itself of the probability after h, its count less the discount.
    contexts: (q,) int64, the histories h among them.
    rest:     (q,) what the discounts after h leave for the level below.
    """

    vocab_size: int
    grams: np.ndarray
    share: np.ndarray
    contexts: np.ndarray
    rest: np.ndarray

    @classmethod
    def of(cls, grams: np.ndarray, counts: np.ndarray, vocab_size: int) -> "Level":
        """share(h w) = (c(h w) - D(c(h w))) / sum_w c(h w) and rest(h) = sum_w D(c(h w)) / sum_w c(h w)."""
        contexts, first, sizes = np.unique(grams // vocab_size, return_index=True, return_counts=True)
        discount = np.array([0.0, *discounts(counts)])[np.minimum(counts, 3)]
        totals = np.add.reduceat(counts, first)
        share = (counts - discount) / np.repeat(totals, sizes)
        return cls(vocab_size, grams, share, contexts, np.add.reduceat(discount, first) / totals)

    def probability(self, grams: np.ndarray, below: np.ndarray) -> np.ndarray:
        """p(w | h) = share(h w) + rest(h) * below, for any n-grams; after a history never seen it is `below`."""
        share = _look_up(grams, self.grams, self.share, absent=0.0)
        return share + _look_up(grams // self.vocab_size, self.contexts, self.rest, absent=1.0) * below


@dataclass(frozen=True)
class KneserNey:
    """Interpolated Kneser-Ney with three discounts a level.

        p_n(w | h) = (c(h w) - D(c(h w))) / sum_w c(h w)  +  rest(h) * p_{n-1}(w | h without its first token)
        p_0(w)     = 1 / v

    At the highest level c counts n-grams. Below, it counts the different tokens that an n-gram was seen after:
    "Francisco" may be frequent, but follows "San" only, and so is unlikely after anything else. p_0 makes every token
    possible.

        ngram = KneserNey.fit(tokens, vocab_size=4096)
        nats = -ngram.log_probability(held_out).sum()

    Source: Chen and Goodman, An Empirical Study of Smoothing Techniques for Language Modeling (1999), section 3.
    """

    vocab_size: int
    levels: tuple[Level, ...]  # of n = 1, 2, ... order

    @classmethod
    def fit(cls, tokens: ArrayLike, vocab_size: int, order: int = 5) -> "KneserNey":
        """Counts one long stream of ids.

        Args:
            tokens:     (t,) integers, 0 .. v-1; documents one after the other, each behind its <bos>.
            vocab_size: v, tokens.
            order:      tokens of the longest n-gram; each token is predicted from the order - 1 before it.
        Raises: ValueError for an order below 1, fewer tokens than that, n-grams too large to pack, or ids outside v.
        """
        tokens = _checked(tokens, vocab_size)
        if order < 1 or len(tokens) < order:
            raise ValueError(f"order is {order}, but must be at least 1 and at most the {len(tokens)} tokens given")
        if vocab_size**order > 2**63:
            raise ValueError(
                f"{order} tokens of a vocabulary of {vocab_size} do not fit in 64 bits: take a lower order"
            )
        grams, counts = np.unique(_pack(tokens, order, vocab_size), return_counts=True)
        levels = [Level.of(grams, counts, vocab_size)]
        for n in range(order - 1, 0, -1):
            # An (n+1)-gram stands here once, however often it was seen: its last n tokens have one more predecessor.
            grams, counts = np.unique(grams % vocab_size**n, return_counts=True)
            levels.insert(0, Level.of(grams, counts, vocab_size))
        return cls(vocab_size, tuple(levels))

    @property
    def order(self) -> int:
        return len(self.levels)

    def log_probability(self, tokens: ArrayLike) -> np.ndarray:
        """log p of every token given the order - 1 before it, in nats: (..., t) integers -> (..., t) float64.

        The first tokens have fewer before them and are predicted from those. Raises: ValueError for ids outside v.
        """
        tokens = _checked(tokens, self.vocab_size)
        probability = np.full(tokens.shape, 1 / self.vocab_size)
        for n, level in enumerate(self.levels[: tokens.shape[-1]], start=1):
            predicted = probability[..., n - 1 :]
            predicted[...] = level.probability(_pack(tokens, n, self.vocab_size), predicted)
        return np.log(probability)

    def distribution(self, context: ArrayLike) -> np.ndarray:
        """p of every token after a context of any length: sequence of ids -> (v,) float64."""
        context = np.asarray(context, dtype=np.int64)
        rows = np.tile(context, (self.vocab_size, 1))
        rows = np.column_stack([rows, np.arange(self.vocab_size)])
        return np.exp(self.log_probability(rows)[:, -1])


def discounts(counts: np.ndarray) -> tuple[float, float, float]:
    """What is taken off a count of 1, of 2 and of 3 or more, estimated from how many n-grams have counts 1 to 4.

        Y = n_1 / (n_1 + 2 n_2),   D(c) = c - (c + 1) Y n_{c+1} / n_c

    FALLBACK where one of the n_c is 0 or a discount is not above 0.

    >>> discounts(np.array([1, 1, 1, 1, 2, 2, 3, 4]))
    (0.5, 1.25, 1.0)
    """
    n = np.bincount(np.minimum(counts, 5), minlength=5).tolist()
    if 0 in n[1:5]:
        return FALLBACK
    Y = n[1] / (n[1] + 2 * n[2])
    estimated = tuple(c - (c + 1) * Y * n[c + 1] / n[c] for c in (1, 2, 3))
    return estimated if min(estimated) > 0 else FALLBACK


def _pack(tokens: np.ndarray, n: int, vocab_size: int) -> np.ndarray:
    """Every n-gram as one integer, its tokens being the digits in base v: (..., t) -> (..., t - n + 1).

    >>> _pack(np.array([1, 2, 3, 4]), 3, 10)
    array([123, 234])
    """
    count = tokens.shape[-1] - n + 1
    packed = np.zeros((*tokens.shape[:-1], count), dtype=np.int64)
    for i in range(n):
        packed = packed * vocab_size + tokens[..., i : i + count]
    return packed


def _look_up(wanted: np.ndarray, keys: np.ndarray, values: np.ndarray, absent: float) -> np.ndarray:
    """The value of each wanted key, `absent` where there is none. The keys are sorted."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], absent)


def _checked(tokens: ArrayLike, vocab_size: int) -> np.ndarray:
    tokens = np.asarray(tokens, dtype=np.int64)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        wrong = tokens.min() if tokens.min() < 0 else tokens.max()
        raise ValueError(f"token {wrong} is outside the vocabulary 0 .. {vocab_size - 1}: another tokenizer's?")
    return tokens
