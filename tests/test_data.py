"""The text is found everywhere, split without overlap, stored whole and drawn repeatably."""

import zlib

import numpy as np
import pytest
import torch

from minijamba import data
from minijamba.data import IGNORED, PARTS, Batch, Windows, pack, prepare, split
from minijamba.testing import assert_rejects
from minijamba.tokenizer import BOS, EOS, BPETokenizer, ByteTokenizer


@pytest.fixture(scope="module")
def library():
    return data.standard_library()


@pytest.fixture
def folder(tmp_path):
    """A folder of 30 texts, two of them equal, with a file that is none."""
    for i in range(29):
        (tmp_path / f"{i}.txt").write_text(f"text number {i}\n", encoding="utf-8")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "copy.md").write_text("text number 3\n", encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    return tmp_path


def test_the_library_is_source_and_reference(library):
    assert "def loads(" in data.read(library["json/__init__.py"])
    assert "while" in data.read(library["reference/while"])
    sizes = [len(document) if isinstance(document, str) else document.stat().st_size for document in library.values()]
    assert sum(sizes) > 5_000_000
    assert not any("site-packages" in name or name.startswith("test/") for name in library)


def test_packages_are_read_by_name():
    documents = data.installed_packages(["einops", "tqdm"])
    assert {"einops/einops.py", "tqdm/std.py"} <= documents.keys() and not any("/tests/" in name for name in documents)
    with pytest.raises(ValueError, match="no package 'no_such_package'.*pip install"):
        data.installed_packages(["no_such_package"])


def test_a_folder_gives_its_texts_and_refuses_what_is_none(folder):
    documents = data.text_folder(folder)
    assert len(documents) == 30 and data.read(documents["below/copy.md"]) == "text number 3\n"
    assert data.text_folder(folder, (".md",)).keys() == {"below/copy.md"}
    with pytest.raises(ValueError, match="is no folder"):
        data.text_folder(folder / "absent")
    with pytest.raises(ValueError, match="holds no text: no file that ends in .tex"):
        data.text_folder(folder, (".tex",))


@pytest.mark.parametrize("content, message", [
    (b"caf\xe9", "bad.txt is not UTF-8 text .* at byte 3.*convert it"),
    (b"\0\0\0\1", "bad.txt is not text: it holds zero bytes"),
])  # fmt: skip
def test_a_file_that_is_not_text_is_named(folder, content, message):
    (folder / "bad.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.without_copies(data.text_folder(folder))


def test_no_document_is_in_two_parts(library):
    def check(splitter):
        documents = {f"{i}.py": "text" for i in range(2000)}
        parts = splitter(documents)
        names = [name for part in PARTS for name in parts[part]]
        assert sorted(names) == sorted(documents)
        assert all(60 < len(parts[part]) < 140 for part in PARTS[1:])

    def overlapping(documents):
        return split(documents) | {"held_out": split(documents)["validation"]}

    check(split)
    assert_rejects(check, overlapping)
    assert all(list(part) == sorted(part) for part in split(library).values())


def test_the_part_of_a_document_depends_on_its_name_alone():
    names = [f"{i}.py" for i in range(200)]
    parts = split(dict.fromkeys(names, ""))
    assert parts["held_out"].keys() == {name for name in names if zlib.crc32(name.encode()) % data.ONE_IN == 0}
    assert split(dict.fromkeys(names[::2], ""))["held_out"].keys() <= parts["held_out"].keys()


def test_the_chapters_of_the_reference_stay_together(library):
    """They quote one another: a chapter held out would be read in another one."""

    def check(parts):
        where = {part for part in PARTS if any(name.startswith("reference/") for name in parts[part])}
        assert where == {"train"}

    parts = split(library)
    check(parts)
    chapter = next(name for name in parts["train"] if name.startswith("reference/"))
    assert_rejects(check, parts | {"held_out": parts["held_out"] | {chapter: ""}})


def test_three_documents_make_three_parts_and_fewer_are_trained_on():
    parts = split({name: "" for name in ("a", "b", "c")})
    assert [len(parts[part]) for part in PARTS] == [1, 1, 1]
    assert [len(split({"a": "", "b": ""})[part]) for part in PARTS] == [2, 0, 0]


def test_a_copy_counts_once(folder):
    documents = data.without_copies(data.text_folder(folder))
    assert len(documents) == 29 and ("3.txt" in documents) != ("below/copy.md" in documents)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPETokenizer.train(["text number 1 <bos>\n"] * 9, 270)])
def test_a_document_is_stored_between_bos_and_eos_whatever_it_says(tmp_path, tokenizer):
    """Text that spells a special token is no special token: it would cut the document in two."""
    documents = {"a": "one <bos> two", "b": "naïve 🎉", "c": "three", "d": "four"}
    corpus = prepare(documents, tokenizer, tmp_path / "tokens")
    for part, members in split(documents).items():
        stream = corpus.tokens[part].tolist()
        assert stream.count(BOS) == stream.count(EOS) == len(members) == corpus.facts["parts"][part]["documents"]
        assert "".join(members.values()) == tokenizer.decode(stream)
        assert corpus.facts["parts"][part]["bytes"] == sum(len(text.encode()) for text in members.values())
        assert corpus.facts["parts"][part]["tokens"] == len(stream)
    assert isinstance(corpus.tokens["train"], np.memmap) and corpus.tokens["train"].dtype == np.uint16


def test_a_prepared_corpus_is_read_again_not_made_again(folder, tmp_path):
    target = tmp_path / "tokens"
    first = prepare(data.text_folder(folder), ByteTokenizer(), target)
    again = prepare({}, ByteTokenizer(), target)
    assert again.facts == first.facts and np.array_equal(again.tokens["train"], first.tokens["train"])
    assert len(first.facts["parts"]["train"]["sha256"]) == 64
    (target / "corpus.json").unlink()  # as after a kill: the token files alone are not trusted
    with pytest.raises(ValueError, match="the corpus is empty"):
        prepare({}, ByteTokenizer(), target)


def test_a_large_vocabulary_takes_wider_numbers(tmp_path):
    class Wide(ByteTokenizer):
        vocab_size = 2**17

        def encode(self, text, special=False):
            return [2**17 - 1 for _ in text]

    corpus = prepare({"a": "xyz", "b": "xyzw"}, Wide(), tmp_path)
    assert corpus.tokens["train"].dtype == np.uint32 and corpus.tokens["train"].max() == 2**17 - 1


def test_windows_are_runs_of_the_text_and_repeat_with_the_seed():
    tokens = np.arange(3, 1003)
    first, again, other = ([Windows(tokens, 4, 16, seed)(step) for step in range(3)] for seed in (0, 0, 1))
    for batch in first:
        assert batch.tokens.shape == batch.targets.shape == (4, 16) and batch.tokens.dtype == torch.int64
        assert bool((batch.targets == batch.tokens + 1).all()) and bool((batch.tokens.diff(dim=1) == 1).all())
    tokens_of = lambda batches: torch.stack([batch.tokens for batch in batches])  # noqa: E731
    assert torch.equal(tokens_of(first), tokens_of(again)) and not torch.equal(tokens_of(first), tokens_of(other))


def test_any_step_is_at_hand_without_those_before_it():
    tokens, in_order = np.arange(3, 203), Windows(np.arange(3, 203), 3, 16, seed=5)
    batches = [in_order(step) for step in range(12)]  # several epochs
    for step in (11, 4, 7):
        assert torch.equal(Windows(tokens, 3, 16, seed=5)(step).tokens, batches[step].tokens)


def test_an_epoch_shows_every_token_at_most_once_and_nearly_all_of_them():
    def check(windows):
        drawn = torch.cat([windows(step).tokens.flatten() for step in range(windows.in_epoch)]).tolist()
        assert len(drawn) == len(set(drawn)) > 0.9 * 1000

    check(Windows(np.arange(1000), 1, 16))
    random = Windows(np.arange(1000), 1, 16)
    random._order = lambda epoch: np.random.default_rng(0).integers(900, size=random.in_epoch)
    assert_rejects(check, random)


def test_epochs_differ_in_order_and_start():
    windows = Windows(np.arange(1000), 1, 16)
    starts = [windows._order(epoch) for epoch in range(20)]
    assert len({tuple(order) for order in starts}) == 20 and len({order.min() for order in starts}) > 5


def test_a_short_text_is_refused():
    batch = Windows(np.arange(17), 2, 16)(0)
    assert batch.tokens[0].tolist() == list(range(16))
    with pytest.raises(ValueError, match="16 tokens hold no window of 16"):
        Windows(np.arange(16), 1, 16)


def test_packing_marks_documents_and_predicts_no_bos():
    """By hand: two documents in a window that begins within a third."""
    batch = pack(torch.tensor([[7, EOS, BOS, 8, EOS, BOS, 9]]))
    assert batch.tokens.tolist() == [[7, EOS, BOS, 8, EOS, BOS]]
    assert batch.targets.tolist() == [[EOS, IGNORED, 8, EOS, IGNORED, 9]]
    assert batch.segments.tolist() == [[0, 0, 1, 1, 1, 2]]


def test_a_batch_splits_by_rows():
    batch = Batch(torch.arange(8).view(4, 2), torch.arange(8).view(4, 2) + 1)
    pieces = batch.split(2)
    assert [piece.tokens.tolist() for piece in pieces] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert pieces[1].segments is None


def test_a_tokenizer_learns_from_all_over_the_documents():
    documents = {f"{i:03}": f"{i} " * 50 for i in range(200)}
    sample = list(data.sample_texts(documents, limit=5000))
    assert 5000 <= sum(map(len, sample)) < 5400
    numbers = [int(text.split()[0]) for text in sample]
    assert min(numbers) < 60 and max(numbers) > 140
    assert len(list(data.sample_texts(documents))) == 200


def test_a_file_is_written_whole(tmp_path):
    data.write_whole(tmp_path / "a.json", "{}")
    assert (tmp_path / "a.json").read_text() == "{}" and len(list(tmp_path.iterdir())) == 1
