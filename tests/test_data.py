"""The training text is found everywhere, split without overlap, and drawn repeatably."""

from itertools import islice

import pytest
import torch

from minijamba.data import random_windows, split, standard_library_text, token_stream
from minijamba.testing import assert_rejects
from minijamba.tokenizer import BOS, ByteTokenizer


@pytest.fixture(scope="module")
def text():
    return standard_library_text()


def test_the_text_is_source_and_reference(text):
    train, validation = text
    assert "def loads(" in train["json/__init__.py"]
    assert "while" in (train | validation)["reference/while"]
    assert sum(map(len, train.values())) > 4_000_000 and sum(map(len, validation.values())) > 100_000
    assert not any("site-packages" in name or name.startswith("test/") for name in train | validation)


def test_order_is_by_name(text):
    assert all(list(part) == sorted(part) for part in text)


def test_no_document_is_in_two_splits(text):
    def check(splitter):
        train, validation = splitter({f"{i}.py": "text" for i in range(1000)})
        assert not train.keys() & validation.keys() and len(train) + len(validation) == 1000
        assert 20 < len(validation) < 100

    def overlapping(documents):
        return documents, dict(islice(documents.items(), 50))

    check(split)
    assert_rejects(check, overlapping)
    assert not text[0].keys() & text[1].keys()


def test_the_split_of_a_document_depends_on_its_name_alone():
    names = [f"{i}.py" for i in range(200)]
    alone = {name for name in names if split({name: ""})[1]}
    assert alone == split(dict.fromkeys(names, ""))[1].keys()


def test_token_stream_puts_bos_before_every_text():
    assert token_stream(["a", "bc"], ByteTokenizer()).tolist() == [BOS, 100, BOS, 101, 102]


def test_windows_are_runs_of_the_text_and_repeat_with_the_seed():
    tokens = torch.arange(1000)
    first, again, other = (list(islice(random_windows(tokens, 4, 16, seed), 3)) for seed in (0, 0, 1))
    assert all(batch.shape == (4, 17) and bool((batch.diff(dim=1) == 1).all()) for batch in first)
    assert torch.equal(torch.stack(first), torch.stack(again)) and not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])


def test_every_position_can_be_drawn_and_a_short_text_is_refused():
    drawn = next(random_windows(torch.arange(18), 200, 16))
    assert set(drawn[:, 0].tolist()) == {0, 1}
    with pytest.raises(ValueError, match="16 tokens hold no window of 16"):
        next(random_windows(torch.arange(16), 1, 16))
