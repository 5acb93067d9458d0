"""Bits per byte: probabilities known in closed form, one document at a time, and what must not be counted."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minijamba.evaluate import Score, bits_per_byte, ngram_bits_per_byte, predict
from minijamba.model import Jamba
from minijamba.ngram import KneserNey
from minijamba.testing import assert_matches, assert_rejects
from minijamba.tokenizer import BOS, PAD, BPETokenizer, ByteTokenizer

TEXTS = {"long": "def f(x):\n    return x\n" * 2, "one": "a", "accents": "naïve 世界 🎉", "middle": "Jamba, Jamba"}
BYTES = ByteTokenizer()


class Repeater:
    """A model that gives a token repeated 1/2 and each of the other v - 1 the same: p known without a computation."""

    config = SimpleNamespace(vocab_size=BYTES.vocab_size, bos_token_id=BOS)
    device = torch.device("cpu")

    def __call__(self, tokens, cache=None, mask=None):
        v = self.config.vocab_size
        p = torch.full((*tokens.shape, v), 0.5 / (v - 1), dtype=torch.float64).scatter(2, tokens[:, :, None], 0.5)
        return p.log().masked_fill(~mask[:, :, None], 0)

    def new_cache(self, batch, capacity=0):
        return None


@pytest.fixture(scope="module")
def model(hybrid, long_memory):
    return long_memory(Jamba(replace(hybrid, vocab_size=BYTES.vocab_size, dtype="float32"))).double()


@torch.no_grad()
def one_by_one(model, texts):
    """-log2 p of texts, token by token from the plain run of each."""
    nats = 0.0
    for text in texts:
        row = torch.tensor([[BOS, *BYTES.encode(text)]])
        p = model(row[:, :-1]).softmax(-1)[0]
        nats -= sum(math.log(p[i, row[0, i + 1]]) for i in range(len(p)))
    return nats / math.log(2)


class Opened:
    """A tokenizer that puts <bos> in front by itself, so that it is predicted and counted."""

    vocab_size, encode = BYTES.vocab_size, staticmethod(lambda text: [BOS, *BYTES.encode(text)])


class Padded:
    """A tokenizer that pads, so that padding is predicted and counted."""

    vocab_size, encode = BYTES.vocab_size, staticmethod(lambda text: [*BYTES.encode(text), PAD])


def counts_bos(model, texts, **options):
    return bits_per_byte(model, Opened, texts, **options)


def counts_padding(model, texts, **options):
    return bits_per_byte(model, Padded, texts, **options)


def counts_characters(model, texts, **options):
    return replace(bits_per_byte(model, BYTES, texts, **options), bytes=sum(map(len, texts)))


def of_bytes(model, texts, **options):
    return bits_per_byte(model, BYTES, texts, **options)


def test_a_repeated_letter_by_hand():
    """A token unlike the one before it costs log2(2 * 258) bits, a repeated one 1; "é" is two unlike bytes."""

    def check(score):
        aaaa, other = score(Repeater(), ["aaaa"]), math.log2(2 * 258)
        assert (aaaa.bytes, aaaa.tokens) == (4, 4)
        assert_matches(aaaa.bits, other + 3, 1e-14)  # float64, a sum of four terms
        both = score(Repeater(), ["aaaa", "é"])
        assert (both.bytes, both.tokens) == (6, 6)
        assert_matches(both.bits, 3 * other + 3, 1e-14)
        assert_matches(both.bits_per_byte, (3 * other + 3) / 6, 1e-14)
        assert_matches(both.nats_per_token, (3 * other + 3) / 6 * math.log(2), 1e-14)

    check(of_bytes)
    assert_rejects(check, counts_bos, counts_padding, counts_characters)


def cuts(model, texts, **options):
    """Wrong: pieces of ten tokens."""
    return of_bytes(model, texts, **{**options, "context": 10})


def runs_on(model, texts, **options):
    """Wrong: every document knows those before it."""
    return of_bytes(model, ["".join(texts)], **options)


@pytest.mark.parametrize("batch", [1, 2, 3, 99])
def test_equals_one_document_at_a_time(model, batch):
    texts, expected = list(TEXTS.values()), one_by_one(model, TEXTS.values())

    def check(score):
        actual = score(model, texts, batch=batch, context=None)
        assert_matches(actual.bits, expected, 1e-12, "bits")  # float64, sums of a hundred terms in another order
        assert actual.bytes == sum(len(text.encode()) for text in texts) == actual.tokens

    check(of_bytes)
    assert_rejects(check, counts_bos, counts_padding, counts_characters, cuts, runs_on)
    assert of_bytes(model, TEXTS, batch=batch) == of_bytes(model, texts, batch=batch), "names or no names"


class Forgetful:
    """The model without its cache: every call starts anew."""

    def __init__(self, model):
        self.model, self.config, self.device, self.new_cache = model, model.config, model.device, model.new_cache

    def __call__(self, tokens, cache=None, mask=None):
        return self.model(tokens, mask=mask)


@pytest.mark.parametrize("chunk", [1, 7, 20, 46])
def test_chunks_through_the_cache_equal_one_call(model, chunk):
    """The longest document has 46 tokens behind its <bos>."""
    rows = [[BOS, *BYTES.encode(text)] for text in TEXTS.values()]

    def check(chunked):
        for row, (log_p, likeliest) in zip(rows, predict(chunked, rows, batch=3, chunk=chunk), strict=True):
            logits = model(torch.tensor([row]))[0, :-1]
            expected = logits.log_softmax(-1)[range(len(row) - 1), row[1:]]
            assert_matches(log_p, expected, 1e-11, "log p")  # float64, four layers and sums of dozens of terms
            assert_matches(likeliest, logits.argmax(-1) == torch.tensor(row[1:]), 0, "likeliest")

    check(model)
    if chunk < 46:
        assert_rejects(check, Forgetful(model))


def test_likeliest_is_seen(model):
    """A row continued greedily is likeliest everywhere; with one token changed, not there."""
    row = [BOS, 70]
    for _ in range(6):
        row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
    (_, likeliest), (_, changed) = predict(model, [row, [*row[:4], (row[4] + 1) % 259]])
    assert likeliest[1:].all() and changed.tolist()[1:] == [True, True, False]


def test_context_cuts_a_document_into_pieces_that_start_afresh(model):
    text = TEXTS["long"]
    pieces = [text[start : start + 20] for start in range(0, len(text), 20)]
    expected = replace(of_bytes(model, pieces), bytes=len(text))

    def check(context):
        assert_matches(of_bytes(model, [text], context=context).bits, expected.bits, 1e-12)  # the same, batched so, too

    check(20)
    assert_rejects(check, 19, 21, None)


def test_bfloat16_loses_no_more_than_its_weights(hybrid, long_memory):
    """The softmax over the vocabulary is float32 at least, the sum over tokens float64."""
    model = long_memory(Jamba(replace(hybrid, vocab_size=BYTES.vocab_size)))
    half = of_bytes(model.to(torch.bfloat16), TEXTS)
    assert_matches(half.bits, of_bytes(model.double(), TEXTS).bits, 0.02)  # 8 bits a number


def test_ngram_equals_its_own_probabilities():
    tokens = np.array([token for text in TEXTS.values() for token in [BOS, *BYTES.encode(text)]])
    ngram = KneserNey.fit(tokens, BYTES.vocab_size, 3)
    rows = [[BOS, *BYTES.encode(text)] for text in TEXTS.values()]
    nats = -sum(math.log(ngram.distribution(row[:i])[row[i]]) for row in rows for i in range(1, len(row)))

    def check(tokenizer):
        actual = ngram_bits_per_byte(ngram, tokenizer, TEXTS)
        assert_matches(actual.bits, nats / math.log(2), 1e-12)  # float64, sums of a hundred terms
        assert actual.bytes == actual.tokens == sum(map(len, rows)) - len(rows)

    check(BYTES)
    assert_rejects(check, Opened, Padded)


def test_bits_per_byte_compare_over_tokenizers():
    """Half the tokens at twice the nats is the same model of the text."""
    assert Score(bits=80, bytes=40, tokens=40).bits_per_byte == Score(bits=80, bytes=40, tokens=20).bits_per_byte == 2
    assert Score(bits=80, bytes=40, tokens=20).nats_per_token == 4 * math.log(2)


@pytest.mark.parametrize(
    "documents, message",
    [
        ([], "no document"),
        ({}, "no document"),
        ("text", "documents is a str: give a list"),
        (["a", ""], "document 1 is empty"),
        ({"notes.txt": ""}, "document 'notes.txt' is empty, .* leave it out"),
    ],
)
def test_documents_that_say_nothing_are_refused(documents, message):
    ngram = KneserNey.fit([1, 2, 3], BYTES.vocab_size, 2)
    with pytest.raises(ValueError, match=message):
        bits_per_byte(Repeater(), BYTES, documents)
    with pytest.raises(ValueError, match=message):
        ngram_bits_per_byte(ngram, BYTES, documents)


@pytest.mark.parametrize("vocab_size", [258, 41, 518, 4096])
def test_a_tokenizer_of_another_model_is_refused(vocab_size):
    model = Repeater()
    model.config = SimpleNamespace(vocab_size=vocab_size, bos_token_id=BOS)
    remedy = f"the tokenizer has 259 tokens and the model {vocab_size}, .* put the tokenizer.json .* beside its weights"
    with pytest.raises(ValueError, match=remedy):
        bits_per_byte(model, BYTES, ["a"])


def test_a_model_may_round_its_vocabulary_up():
    model = Repeater()
    model.config = SimpleNamespace(vocab_size=512, bos_token_id=BOS)
    assert_matches(bits_per_byte(model, BYTES, ["aa"]).bits, math.log2(2 * 511) + 1, 1e-14)


def test_what_else_is_refused():
    model = Repeater()
    with pytest.raises(ValueError, match="context is 0, but must be at least 1"):
        bits_per_byte(model, BYTES, ["a"], context=0)
    with pytest.raises(ValueError, match="nothing to predict in \\[1\\]"):
        predict(model, [[1, 2], [1]])
    model.config = SimpleNamespace(vocab_size=259, bos_token_id=None)
    with pytest.raises(ValueError, match="no bos_token_id"):
        bits_per_byte(model, BYTES, ["a"])


def test_a_byte_pair_tokenizer_counts_the_bytes_of_the_text():
    text = TEXTS["accents"] * 3
    tokenizer = BPETokenizer.train([text], 270)
    model = Repeater()
    model.config = SimpleNamespace(vocab_size=tokenizer.vocab_size, bos_token_id=BOS)
    score = bits_per_byte(model, tokenizer, [text])
    assert score.bytes == len(text.encode()) > score.tokens == len(tokenizer.encode(text))
