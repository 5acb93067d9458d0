"""Kneser-Ney equals its formulas, written down a second time with dictionaries, and a case worked by hand."""

import doctest
import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from minijamba import ngram
from minijamba.ngram import FALLBACK, KneserNey, Level, discounts
from minijamba.testing import assert_matches, assert_rejects

BOS = 1


def structured(count, vocab_size=12, seed=0):
    """A text in which the token three places back says most about the next: runs of it can be told apart by order."""
    generator = np.random.default_rng(seed)
    text = [BOS, 3, 4, 5]
    for surprise in generator.random(count):
        guess = (text[-1] + 2 * text[-3]) % vocab_size
        text.append(guess if surprise < 0.8 else int(generator.integers(2, vocab_size)))
    return np.array(text)


class Dictionaries:
    """Interpolated Kneser-Ney straight from the paper's formulas, one n-gram and one question at a time."""

    def __init__(self, tokens, vocab_size, order):
        tokens = [int(token) for token in tokens]
        self.tokens, self.vocab_size, self.order = tokens, vocab_size, order
        self.counts = {order: Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))}
        for n in range(order - 1, 0, -1):
            predecessors = defaultdict(set)
            for gram in self.counts[n + 1]:
                predecessors[gram[1:]].add(gram[0])
            self.counts[n] = {gram: len(before) for gram, before in predecessors.items()}

    def discount(self, n, count):
        if count == 0:
            return 0.0
        have = Counter(self.counts[n].values())
        if not all(have[c] for c in (1, 2, 3, 4)):
            return FALLBACK[min(count, 3) - 1]
        Y = have[1] / (have[1] + 2 * have[2])
        D = [1 - 2 * Y * have[2] / have[1], 2 - 3 * Y * have[3] / have[2], 3 - 4 * Y * have[4] / have[3]]
        return (D if min(D) > 0 else FALLBACK)[min(count, 3) - 1]

    def probability(self, context, token):
        if context is None:
            return 1 / self.vocab_size
        n = len(context) + 1
        below = self.probability(context[1:] if context else None, token)
        after = {gram[-1]: count for gram, count in self.counts[n].items() if gram[:-1] == tuple(context)}
        if not after:
            return below
        total = sum(after.values())
        rest = sum(self.discount(n, count) for count in after.values()) / total
        count = after.get(token, 0)
        return (count - self.discount(n, count)) / total + rest * below

    def log_probability(self, tokens):
        tokens = [int(token) for token in tokens]
        contexts = [tuple(tokens[max(0, i - self.order + 1) : i]) for i in range(len(tokens))]
        return np.log([self.probability(*pair) for pair in zip(contexts, tokens, strict=True)])


def plain_counts(tokens, vocab_size, order):
    """Wrong: how often an n-gram was seen, at the lower levels, too."""
    grams = [np.unique(ngram._pack(tokens, n, vocab_size), return_counts=True) for n in range(1, order + 1)]
    return KneserNey(vocab_size, tuple(Level.of(*level, vocab_size) for level in grams))


def one_discount(tokens, vocab_size, order):
    """Wrong: the discount of a single count for all."""
    right, ngram.discounts = ngram.discounts, lambda counts: discounts(counts)[:1] * 3
    try:
        return KneserNey.fit(tokens, vocab_size, order)
    finally:
        ngram.discounts = right


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_equals_the_formulas(order):
    tokens = np.random.default_rng(order).zipf(1.5, 400) % 9
    other = np.random.default_rng(9).integers(0, 12, 60)  # tokens 9 to 11 were never seen

    def check(fit):
        expected = Dictionaries(tokens, 12, order).log_probability(other)
        # float64, sums and products of a dozen terms: 1e-12.
        assert_matches(fit(tokens, 12, order).log_probability(other), expected, 1e-12, "log p")

    check(KneserNey.fit)
    if order > 1:
        assert_rejects(check, plain_counts, one_discount)


def test_both_ways_to_discount_are_met():
    """The text of order 3 above has both: estimated discounts, and those of a level too small to estimate them."""
    levels = Dictionaries(np.random.default_rng(3).zipf(1.5, 400) % 9, 12, 3)
    assert {tuple(levels.discount(n, c) for c in (1, 2, 3)) == FALLBACK for n in (1, 2, 3)} == {True, False}
    assert discounts(np.array([1, 2, 3])) == FALLBACK
    assert discounts(np.array([1] * 20 + [2] + [3] * 9 + [4])) == FALLBACK, "the discount of 2 would be negative"


def test_francisco_by_hand():
    """The words Francisco and glasses come three times each, the one after one word only, the other after three.

    There are 8 different pairs. Francisco ends 1 of them and glasses 3; 5 words end one, so n_1 = 5 and n_2 = 0:
    the discounts are 0.5, 1 and 1.5. They leave (5 * 0.5 + 1.5) / 8 = 1/2 for the 8 words of the vocabulary.
    """
    words = ["San", "Francisco"] * 3 + ["the", "glasses", "my", "glasses", "new", "glasses"]
    vocabulary = [*dict.fromkeys(words), "jazz", "piano"]
    tokens = np.array([vocabulary.index(word) for word in words])

    def check(fit):
        after_jazz = dict(zip(vocabulary, fit(tokens, 8, 2).distribution([vocabulary.index("jazz")]), strict=True))
        wanted = {"Francisco": 0.5 / 8 + 1 / 16, "glasses": 1.5 / 8 + 1 / 16, "piano": 1 / 16}
        assert_matches({word: after_jazz[word] for word in wanted}, wanted, 1e-15, "p after jazz")  # sums of two terms

    check(KneserNey.fit)
    assert_rejects(check, plain_counts)


def leaks(tokens, vocab_size, order):
    """Wrong: a level hands down half of what its discounts took."""
    right = KneserNey.fit(tokens, vocab_size, order)
    levels = [Level(vocab_size, level.grams, level.share, level.contexts, level.rest / 2) for level in right.levels]
    return KneserNey(vocab_size, tuple(levels))


@pytest.mark.parametrize("context", [[], [3], [11], [3, 4, 5, 6], [11, 11, 11, 11], [2, 9, 9, 4, 3, 5, 7, 8]])
def test_a_distribution_sums_to_one(context):
    """After contexts seen, unseen, shorter and longer than the order."""
    tokens = structured(2000, 11)

    def check(fit):
        p = fit(tokens, 12, 5).distribution(context)
        assert p.min() > 0, "every token must be possible"
        assert abs(p.sum() - 1) < 1e-12  # float64, sums of a dozen terms

    check(KneserNey.fit)
    assert_rejects(check, leaks)


def test_distribution_is_what_tokens_get():
    model = KneserNey.fit(structured(1000), 12, 4)
    text = structured(30, seed=1)
    expected = [model.distribution(text[:i])[text[i]] for i in range(len(text))]
    assert_matches(np.exp(model.log_probability(text)), np.array(expected), 1e-13, "p")  # the same sums, exp of a log


def test_more_context_predicts_better_as_far_as_the_structure_reaches():
    text, held_out = structured(20_000), structured(5_000, seed=1)

    def check(orders):
        nats = [-KneserNey.fit(text, 12, order).log_probability(held_out).mean() for order in orders]
        assert all(longer < shorter - 0.01 for shorter, longer in zip(nats, nats[1:], strict=False))

    check([1, 3, 4])
    assert_rejects(check, [4, 5], [4, 3])

    # Nothing beats the source: 80 % of the tokens are its guess, all others one of ten, which the guess may be, too.
    hit = 0.8 + 0.2 / 10
    entropy = -(hit * math.log(hit) + 9 * 0.02 * math.log(0.02))
    best = -KneserNey.fit(text, 12, 4).log_probability(held_out).mean()
    assert 0.9 * entropy < best < 1.25 * entropy


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([1, 2, 12], 12, 2), "token 12 is outside the vocabulary 0 .. 11"),
        (([1, -1, 2], 12, 2), "token -1 is outside"),
        (([1, 2, 3], 12, 4), "order is 4, but must be at least 1 and at most the 3 tokens given"),
        (([1, 2, 3], 12, 0), "order is 0"),
        (([1] * 9, 65536, 5), "5 tokens of a vocabulary of 65536 do not fit in 64 bits: take a lower order"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        KneserNey.fit(*arguments)


def test_ids_of_another_tokenizer_are_refused():
    with pytest.raises(ValueError, match="another tokenizer's"):
        KneserNey.fit([1, 2, 3], 12, 2).log_probability([3, 12])


def test_the_largest_keys_fit():
    """4096^5 = 2^60: the last n-gram of the vocabulary is told from the first."""
    model = KneserNey.fit([4095] * 6 + [0] * 6, 4096, 5)
    assert model.distribution([4095] * 4)[4095] > 0.5 < model.distribution([0] * 4)[0]


def test_examples_in_docstrings():
    assert doctest.testmod(ngram).failed == 0
