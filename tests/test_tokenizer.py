"""Text survives the way to ids and back, whole or streamed."""

import doctest
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minijamba.testing import assert_rejects
from minijamba.tokenizer import BOS, EOS, PAD, SPECIAL_TOKENS, BPETokenizer, ByteTokenizer, load_tokenizer

TEXT = "def f(x):\n    return x + 1  # naïve: 世界 🎉 2024\n" * 20


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train([TEXT], 290)


@pytest.fixture(scope="module", params=["byte", "bpe"])
def tokenizer(request, bpe):
    return ByteTokenizer() if request.param == "byte" else bpe


def stream_all(stream, ids):
    return [stream.add(token) for token in ids] + [stream.finish()]


@given(text=st.text())
def test_any_text_survives(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(len(SPECIAL_TOKENS) <= token < tokenizer.vocab_size for token in ids)


@given(ids=st.lists(st.integers(0, 289)))
def test_the_stream_adds_up_to_the_decoded_text(tokenizer, ids):
    """Of any ids at all: a model may write bytes that are no text, and special tokens."""
    ids = [token % tokenizer.vocab_size for token in ids]
    assert "".join(stream_all(tokenizer.stream(), ids)) == tokenizer.decode(ids)


def test_the_stream_prints_whole_characters_only(tokenizer):
    class Impatient:
        """Decodes every id by itself."""

        add, finish = staticmethod(lambda token: tokenizer.decode([token])), staticmethod(lambda: "")

    def check(stream):
        pieces = stream_all(stream, tokenizer.encode("é世🎉"))
        assert "".join(pieces) == "é世🎉" and not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)

    check(tokenizer.stream())
    assert_rejects(check, Impatient())


def test_special_tokens_are_shared_and_silent(tokenizer, bpe):
    assert [bpe._tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [PAD, BOS, EOS] == [0, 1, 2]
    assert tokenizer.decode([BOS, *tokenizer.encode("a"), EOS, PAD]) == "a"


def test_every_digit_is_a_token_and_frequent_words_are_one(bpe):
    assert len(bpe.encode("2024")) == 4
    assert len(bpe.encode(" return")) == 1 < len(ByteTokenizer().encode(" return"))


def test_training_is_repeatable(bpe):
    assert BPETokenizer.train([TEXT], 290).encode(TEXT) == bpe.encode(TEXT)


def test_saved_and_loaded(bpe, tmp_path):
    bpe.save(tmp_path / "new")
    loaded = load_tokenizer(tmp_path / "new")
    assert loaded.encode(TEXT) == bpe.encode(TEXT) and loaded.vocab_size == bpe.vocab_size == 290
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)


def test_transformers_reads_what_we_save(bpe, tmp_path):
    from transformers import PreTrainedTokenizerFast

    bpe.save(tmp_path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert theirs.encode(TEXT) == bpe.encode(TEXT)


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="vocab_size 100 is below 259"):
        BPETokenizer.train(["a"], 100)
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        BPETokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="is not a tokenizer.json"):
        BPETokenizer.load(tmp_path)


def test_the_docstrings_examples_hold():
    results = doctest.testmod(sys.modules["minijamba.tokenizer"])
    assert results.attempted and not results.failed
