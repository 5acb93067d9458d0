"""Text to train on that every machine with Python already has, and random windows of it. Nothing is downloaded.

The text is Python's own standard library: its source files and the chapters of its language reference. It differs a
little from one Python version to the next, so a loss compares only with losses of the same Python.
"""

import importlib
import sysconfig
import zlib
from itertools import chain
from pathlib import Path

import torch

from .tokenizer import BOS

# Third-party packages, tests, tables of characters and records of how this Python was built: not text of the library.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3"}


def standard_library_text():
    """The standard library as (train, validation), two dicts of document name -> text, in order of name.

    A document is one source file ("json/decoder.py") or one chapter of the reference ("reference/while"). About one in
    20 is kept for validation, chosen by its name alone: no document is in both, on any machine.
    """
    documents = {}
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(name.parts) and not name.name.startswith("_sysconfigdata"):
            documents[name.as_posix()] = path.read_text(encoding="utf-8", errors="replace")
    for name, text in importlib.import_module("pydoc_data.topics").topics.items():
        documents[f"reference/{name}"] = text
    return split({name: documents[name] for name in sorted(documents) if documents[name].strip()})


def split(documents, one_in=20):
    """dict of name -> text into (train, validation), by a checksum of the name."""
    train, validation = {}, {}
    for name, text in documents.items():
        held_out = zlib.crc32(name.encode()) % one_in == 0
        (validation if held_out else train)[name] = text
    return train, validation


def token_stream(texts, tokenizer):
    """An iterable of str -> (t,) int64: every text behind a <bos>, one after the other."""
    return torch.tensor(list(chain.from_iterable([BOS, *tokenizer.encode(text)] for text in texts)))


def random_windows(tokens, batch, length, seed=0):
    """Endless batches (b, t + 1) of windows drawn evenly from one long (t,) array: inputs [:, :-1], targets [:, 1:].

    The same seed draws the same windows. Raises ValueError if no window of length + 1 fits.
    """
    last = len(tokens) - length - 1
    if last < 0:
        raise ValueError(f"{len(tokens)} tokens hold no window of {length} + 1: take a shorter length or more text")
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(length + 1)
    while True:
        starts = torch.randint(last + 1, (batch, 1), generator=generator)
        yield tokens[starts + offsets]
