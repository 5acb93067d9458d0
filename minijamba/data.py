"""Text to train on, split by document, stored as tokens and drawn in windows. Nothing is downloaded.

Three sources, each a dict of document name -> file or text: Python's standard library, installed packages, and a folder
of the user's own. A document's part (train, validation, held_out) follows from its name, so that what is held out on
one machine was trained on by none. Tokens are stored in files and read in place: a corpus may be larger than memory.
"""

import hashlib
import importlib
import importlib.util
import json
import sysconfig
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .tokenizer import BOS, EOS

IGNORED = -100  # a target that is not judged
PARTS = ("train", "validation", "held_out")
ONE_IN = 20  # documents are validation, and as many held out
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")

# Third-party packages, tests, tables of characters and records of how this Python was built: not text to learn from.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "testing", "idle_test", "encodings", "pydoc_data"}
LONGEST_FILE = 300_000  # bytes; longer files of packages are generated, or tables


class Batch(NamedTuple):
    """What a model is trained on in one step.

    tokens:   (b, t) int64.
    targets:  (b, t) int64: what comes after each token, `IGNORED` where nothing is to be said.
    segments: (b, t) int, packed documents: a new one starts wherever the number changes; None when nothing is packed.
    """

    tokens: Tensor
    targets: Tensor
    segments: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(None if tensor is None else tensor.to(device, non_blocking=True) for tensor in self))

    def split(self, pieces: int) -> list["Batch"]:
        """Rows in so many equal pieces."""
        tensors = ([None] * pieces if tensor is None else tensor.chunk(pieces) for tensor in self)
        return [Batch(*piece) for piece in zip(*tensors, strict=True)]


def standard_library() -> dict[str, Path | str]:
    """Python's own source files ("json/decoder.py") and the chapters of its reference ("reference/while").

    They differ a little from one Python version to the next, so a loss compares only with losses of the same Python.
    """
    documents = _source_files(Path(sysconfig.get_path("stdlib")), "")
    topics = importlib.import_module("pydoc_data.topics").topics
    return documents | {f"reference/{name}": text for name, text in sorted(topics.items())}


def installed_packages(names: list[str]) -> dict[str, Path | str]:
    """The source files of installed packages, tests left out: "numpy/linalg/_linalg.py".

    Raises: ValueError naming a package that is not installed.
    """
    documents = {}
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"there is no package {name!r} to read: pip install it, or take it out of the recipe")
        documents |= _source_files(Path(next(iter(spec.submodule_search_locations))), f"{name}/")
    return documents


def _source_files(root: Path, prefix: str) -> dict[str, Path]:
    found = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        skipped = not SKIPPED_FOLDERS.isdisjoint(name.parts) or name.name.startswith("_sysconfigdata")
        if not skipped and 0 < path.stat().st_size <= LONGEST_FILE:
            found[prefix + name.as_posix()] = path
    return found


def text_folder(folder: str | Path, suffixes: tuple[str, ...] = TEXT_SUFFIXES) -> dict[str, Path | str]:
    """The texts below a folder of the user's, by their names in it.

    Raises: ValueError where there is no such folder, or no file with one of the suffixes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give the one that holds your texts")
    documents = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix in suffixes and path.stat().st_size
    }
    if not documents:
        raise ValueError(f"{folder} holds no text: no file that ends in {', '.join(suffixes)} and is not empty")
    return documents


def read(document: Path | str) -> str:
    """The text of a document, given as the file that holds it or as itself.

    Raises: ValueError naming a file that is not UTF-8 text.
    """
    if isinstance(document, str):
        return document
    try:
        text = document.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{document} is not UTF-8 text ({error.reason} at byte {error.start}): {_REMEDY}") from None
    if "\0" in text:
        raise ValueError(f"{document} is not text: it holds zero bytes; {_REMEDY}")
    return text


_REMEDY = "convert it, or move it out of the folder"


def without_copies(documents: dict[str, Path | str]) -> dict[str, Path | str]:
    """The documents, those of equal content once: the first by name. A copy in another part would not be held out."""
    first: dict[bytes, str] = {}
    for name in sorted(documents):
        first.setdefault(hashlib.sha256(read(documents[name]).encode()).digest(), name)
    return {name: documents[name] for name in first.values()}


def split(documents: dict, one_in: int = ONE_IN) -> dict[str, dict]:
    """The documents as {"train": ..., "validation": ..., "held_out": ...}, in order of name, none in two.

    A checksum of the name decides: about one in `one_in` is validation, and as many are held out, the same ones on any
    machine. The chapters of the language reference quote one another, and go to one part together. A part that this
    leaves empty takes a document of the largest part, so that three documents make three parts. Fewer are all trained
    on.
    """
    checksums = {name: zlib.crc32(_group(name).encode()) for name in sorted(documents)}
    parts = {part: [] for part in PARTS}
    if len(documents) < len(PARTS):
        return {part: documents if part == "train" else {} for part in PARTS}
    for name, checksum in checksums.items():
        parts[{0: "held_out", 1: "validation"}.get(checksum % one_in, "train")].append(name)
    for part in PARTS:
        if not parts[part]:
            largest = max(parts.values(), key=len)
            parts[part].append(min(largest, key=checksums.get))
            largest.remove(parts[part][0])
    return {part: {name: documents[name] for name in names} for part, names in parts.items()}


def _group(name: str) -> str:
    return "reference" if name.startswith("reference/") else name


def texts(documents: dict[str, Path | str]) -> dict[str, str]:
    """All documents read at once, for what fits in memory."""
    return {name: read(document) for name, document in documents.items()}


def encode(text: str, tokenizer) -> list[int]:
    """A whole document: <bos>, its tokens, <eos>."""
    return [BOS, *tokenizer.encode(text), EOS]


def token_stream(documents: dict[str, Path | str], tokenizer) -> np.ndarray:
    """Documents one after the other, as one array of tokens in memory."""
    return np.concatenate([encode(read(document), tokenizer) for document in documents.values()])


class Windows:
    """Windows of a long array of tokens, in an order of its own for every epoch; any step's batch is at hand at once.

        batches = Windows(tokens, batch=8, length=64)
        batches(0), batches(1), ...

    An epoch cuts the array into windows from a random start and shuffles them, so that every token is seen once. A
    batch depends on seed and step alone: that is all a run needs to take up its data where it stopped. Documents, which
    begin with <bos>, are packed: each is a segment, and its <bos> is no target.

    Raises: ValueError if no window of length + 1 fits.
    """

    def __init__(self, tokens: np.ndarray, batch: int, length: int, seed: int = 0) -> None:
        if len(tokens) < length + 1:
            raise ValueError(f"{len(tokens)} tokens hold no window of {length} + 1: take a shorter length or more text")
        self.tokens, self.batch, self.length, self.seed = tokens, batch, length, seed
        self.in_epoch = max(1, (len(tokens) - 1) // length - 1)
        self._order = lru_cache(maxsize=2)(self._shuffle)  # a batch may reach into the next epoch

    def _shuffle(self, epoch: int) -> np.ndarray:
        """Where the windows of an epoch begin."""
        generator = np.random.default_rng((self.seed, epoch))
        slack = min(self.length - 1, len(self.tokens) - 1 - self.in_epoch * self.length)
        return generator.integers(slack + 1) + self.length * generator.permutation(self.in_epoch)

    def __call__(self, step: int) -> Batch:
        rows = [divmod(step * self.batch + row, self.in_epoch) for row in range(self.batch)]
        starts = [self._order(epoch)[place] for epoch, place in rows]
        window = np.stack([self.tokens[start : start + self.length + 1] for start in starts]).astype(np.int64)
        return pack(torch.from_numpy(window))


def pack(windows: Tensor) -> Batch:
    """Windows (b, t + 1) of documents that begin with <bos> -> the batch that predicts them."""
    tokens, targets = windows[:, :-1], windows[:, 1:]
    segments = (tokens == BOS).cumsum(1)
    return Batch(tokens, targets.masked_fill(targets == BOS, IGNORED), segments)


class Corpus(NamedTuple):
    """What `prepare` leaves in a folder: an array of tokens for every part, read in place, and facts about them."""

    tokens: dict[str, np.ndarray]
    facts: dict


def prepare(documents: dict[str, Path | str], tokenizer, folder: Path, progress: bool = False) -> Corpus:
    """Writes the parts of the documents as token files into the folder, or reads them if it holds them already.

    Documents of equal content count once. corpus.json records documents, bytes, tokens and checksum of every part.

    Raises: ValueError for no documents at all; OSError, leaving nothing half-written, for a full disk.
    """
    facts_file = folder / "corpus.json"
    if not facts_file.is_file():
        if not documents:
            raise ValueError("there is no text to train on: the corpus is empty")
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"dtype": "uint16" if tokenizer.vocab_size <= 2**16 else "uint32", "parts": {}}
        for part, members in split(without_copies(documents)).items():
            facts["parts"][part] = _write(members, tokenizer, folder / f"{part}.bin", facts["dtype"], progress)
        write_whole(facts_file, json.dumps(facts, indent=1))
    facts = json.loads(facts_file.read_text(encoding="utf-8"))
    counts = {part: facts["parts"][part]["tokens"] for part in PARTS}
    tokens = {
        part: np.memmap(folder / f"{part}.bin", facts["dtype"], "r") if count else np.empty(0, facts["dtype"])
        for part, count in counts.items()
    }
    return Corpus(tokens, facts)


def _write(members: dict, tokenizer, file: Path, dtype: str, progress: bool) -> dict:
    from tqdm import tqdm

    facts, checksum = {"documents": len(members), "bytes": 0, "tokens": 0}, hashlib.sha256()
    with file.open("wb") as output:
        for document in tqdm(members.values(), f"tokens, {file.stem}", unit=" documents", disable=not progress):
            text = read(document)
            tokens = np.array(encode(text, tokenizer), dtype)
            output.write(tokens.tobytes())
            checksum.update(text.encode())
            facts["bytes"] += len(text.encode())
            facts["tokens"] += len(tokens)
    return {**facts, "sha256": checksum.hexdigest()}


def sample_texts(documents: dict[str, Path | str], limit: int = 2**25) -> Iterator[str]:
    """Texts for a tokenizer to learn from, evenly over the documents, about `limit` characters in all."""
    names = list(documents)
    for name in (names[int(i)] for i in np.random.default_rng(0).permutation(len(names))):
        text = read(documents[name])
        yield text
        limit -= len(text)
        if limit <= 0:
            return


def write_whole(file: Path, text: str) -> None:
    """Write a file so that it exists either whole or not at all."""
    aside = file.with_name(file.name + ".part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(file)
