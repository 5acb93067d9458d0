"""`minijamba train`: a run of a recipe in a folder of its own, which any interruption leaves ready to go on.

    recipe.json             the recipe, all of it
    tokens/                 the text as token files, corpus.json with sizes and checksums
    tokenizer.json          where text is no bytes
    log.csv                 a line a step
    validation.csv          loss on the validation text; experts.csv: the load of every expert at that time
    samples/001000.txt      what the model wrote after 1000 steps
    checkpoint-001000.pt    model, optimiser and random state after 1000 steps; the last two are kept
    model/                  the trained model in bfloat16, as any released checkpoint
"""

import csv
import json
import math
import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from . import data
from .bench.measure import matrix_rate
from .budget import budget
from .checkpoint import load, save
from .data import Batch, Corpus, Windows, write_whole
from .evaluate import Score, bits_per_byte, check_vocabulary, ngram_bits_per_byte
from .generate import generate
from .model import Jamba, Trace
from .moe import expert_load
from .ngram import KneserNey
from .recipe import Recipe
from .rungs import find_device
from .tasks import task_batch
from .tokenizer import BOS, BPETokenizer, ByteTokenizer, load_tokenizer
from .train import Record, Watch, broken, evaluate, losses, repeatable

COLUMNS = [field for field in Record._fields if field != "activations"] + ["share_of_card", "activations"]
KEPT = 2  # checkpoints


def run(recipe: Recipe, folder: str | Path, device: str = "auto", progress: bool = True) -> Path:
    """Trains what the recipe says and returns the folder of the model, folder/model.

    Where the folder holds an unfinished run of the same recipe, that run goes on from its last checkpoint, with the
    losses it would have had, to the last bit. Ctrl-C ends a run after the current step, with a checkpoint.

    Raises: ValueError for a folder that holds another run or other things, for text that does not do;
        FloatingPointError for a loss that is not finite, with the step and the layer that grew first;
        OSError for a full disk. The last good checkpoint stays in every case.
    """
    folder = Path(folder)
    device = find_device(device)
    with repeatable():
        _claim(folder, recipe)
        torch.manual_seed(recipe.seed)
        tokenizer, corpus = _text(recipe, folder, progress)
        model = _model(recipe, tokenizer).to(device)
        Run(recipe, folder, model, tokenizer, corpus, progress).go()
    return folder / "model"


def _claim(folder: Path, recipe: Recipe) -> None:
    """Make the folder this recipe's, or make sure that it is."""
    file = folder / "recipe.json"
    wanted = json.loads(json.dumps(recipe.to_dict()))
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        if differences := _differences(found, wanted):
            raise ValueError(
                f"{folder} holds a run of another recipe: {'; '.join(differences)}. "
                f"Give another folder with --output, or go on with that run's recipe"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds other things: give a folder with --output that is absent or empty")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(wanted, indent=1))


def _differences(found, wanted, name: str = "") -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted(found.keys() | wanted.keys())
        return [line for key in keys for line in _differences(found.get(key), wanted.get(key), f"{name}.{key}")]
    return [] if found == wanted else [f"{name[1:]} is {found!r} there and {wanted!r} here"]


def _text(recipe: Recipe, folder: Path, progress: bool):
    """Tokenizer and corpus of the recipe; read from the folder where they are there already."""
    if recipe.data.task is not None:
        return None, None
    documents = {} if (folder / "tokens" / "corpus.json").is_file() else recipe.data.documents()
    if "checkpoint" in recipe.model:
        tokenizer = load_tokenizer(recipe.model["checkpoint"])
    elif recipe.data.vocab_size is None:
        tokenizer = ByteTokenizer()
    elif (folder / "tokenizer.json").is_file():
        tokenizer = BPETokenizer.load(folder)
    else:
        texts = data.sample_texts(data.split(documents)["train"])
        tokenizer = BPETokenizer.train(texts, recipe.data.vocab_size, progress)
        tokenizer.save(folder)
    corpus = data.prepare(documents, tokenizer, folder / "tokens", progress)
    length = recipe.train.length
    for part in ("train", "validation"):
        count = len(corpus.tokens[part])
        if count < length + 1 and (part == "train" or count):
            raise ValueError(
                f"the {part} text has {count} tokens, and train.length {length} needs {length + 1}: "
                f"take a shorter length or more text"
            )
    return tokenizer, corpus


def _model(recipe: Recipe, tokenizer) -> Jamba:
    if "checkpoint" not in recipe.model:
        vocab_size = recipe.model.get("vocab_size", 0) if tokenizer is None else tokenizer.vocab_size
        return Jamba(recipe.config(vocab_size))
    model = load(recipe.model["checkpoint"], device="cpu", dtype="float32")
    if tokenizer is not None:
        check_vocabulary(tokenizer, model.config.vocab_size)
    return model


def held_out_scores(
    folder: str | Path, device: str = "auto", order: int = 5, progress: bool = True
) -> dict[str, Score]:
    """What a finished run's held-out documents cost its model, and an n-gram model counted on the same text.

    Returns: "model" and "5-gram". Raises: ValueError for a folder without a finished run of text.
    """
    folder = Path(folder)
    if not (folder / "model").is_dir() or not (folder / "tokens" / "corpus.json").is_file():
        raise ValueError(f"{folder} holds no finished run of a text: give the folder of one")
    model, tokenizer = load(folder / "model", device), load_tokenizer(folder / "model")
    tokens = data.prepare({}, tokenizer, folder / "tokens").tokens
    stream = np.asarray(tokens["held_out"])
    documents = [tokenizer.decode(row.tolist()) for row in np.split(stream, np.flatnonzero(stream == BOS)[1:])]
    ngram = KneserNey.fit(tokens["train"], tokenizer.vocab_size, order)
    return {
        "model": bits_per_byte(model, tokenizer, documents, batch=32, progress=progress),
        f"{order}-gram": ngram_bits_per_byte(ngram, tokenizer, documents),
    }


def summary(folder: str | Path, every: int = 50) -> dict:
    """What a run's files say of it, short enough to keep: recipe, corpus, curves, expert load at the end.

    Figures of the log are means over `every` steps. training_seconds are those of all steps, one by one: they leave
    out the reading of the text, validation, checkpoints, and what an interruption cost.
    """
    folder = Path(folder)
    recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    log = _read_table(folder / "log.csv")
    tokens_a_step = recipe["train"]["batch"] * recipe["train"]["length"]
    groups = [log[start : start + every] for start in range(0, len(log), every)]
    names = ("loss", "balance", "norm", "learning_rate", "tokens_per_second")
    curve = {
        name: [round(sum(float(row[name]) for row in group) / len(group), 5) for group in groups] for name in names
    }
    experts = _read_table(folder / "experts.csv")
    return {
        "recipe": recipe,
        "corpus": json.loads((folder / "tokens" / "corpus.json").read_text(encoding="utf-8")),
        "training_seconds": round(sum(tokens_a_step / float(row["tokens_per_second"]) for row in log)),
        "curve": {"step": [int(group[-1]["step"]) for group in groups], **curve},
        "activations": [list(map(float, group[-1]["activations"].split())) for group in groups],
        "validation": [
            {name: float(value) for name, value in row.items()} for row in _read_table(folder / "validation.csv")
        ],
        "experts": [list(map(float, row["load"].split())) for row in experts if row["step"] == experts[-1]["step"]],
    }


def _read_table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as table:
        return list(csv.DictReader(table))


class Run:
    """The loop of a run, and what it writes."""

    def __init__(self, recipe: Recipe, folder: Path, model: Jamba, tokenizer, corpus: Corpus | None, progress: bool):
        self.recipe, self.folder, self.model, self.tokenizer, self.progress = recipe, folder, model, tokenizer, progress
        options = recipe.train
        self.batches = _batches(recipe, corpus)
        self.validation = _validation(recipe, corpus)
        self.bytes_per_token = _bytes_per_token(corpus, "validation")
        self.trainer = options.trainer(model)
        self.tokens_a_step = options.batch * options.length
        dtype = torch.bfloat16 if options.bfloat16 else torch.float32
        flops = budget(model.config, context=options.length).training_flops_per_token
        self.tokens_at_full_rate = matrix_rate(model.device, dtype) / flops

    def go(self) -> None:
        from tqdm import tqdm

        steps, start = self.recipe.train.steps, self._resume()
        watch, batch = Watch(self.model), self.batches(start) if start < steps else None
        self.model.train()
        bar = tqdm(range(start, steps), initial=start, total=steps, unit=" steps", disable=not self.progress)
        with _stop_at_signal() as stop, _Log(self.folder, start, self.recipe.log.tensorboard) as log, bar:
            for step in bar:
                began = time.perf_counter()
                measured = self.trainer.step(batch, self.recipe.train.rate(step))
                batch = self.batches(step + 1)  # while the device works
                record = self.trainer.record(step, measured, self.tokens_a_step, began)
                watch.see(record)
                if not record.finite:
                    raise broken(record, watch)
                share = record.tokens_per_second / self.tokens_at_full_rate
                log.step(record, share)
                bar.set_postfix_str(f"loss {record.loss:.3f}, {record.tokens_per_second:,.0f} tokens/s, {share:.0%}")
                self._look(step + 1, record, log, bar)
                if stop.wanted or self._due("save", step + 1) or step + 1 == steps:
                    self._save(step + 1)
                if stop.wanted and step + 1 < steps:
                    raise KeyboardInterrupt
        self._finish()

    def _due(self, what: str, done: int) -> bool:
        every = getattr(self.recipe.log, what)
        return every > 0 and (done % every == 0 or done == self.recipe.train.steps)

    def _look(self, done: int, record: Record, log: "_Log", bar) -> None:
        if self.validation and self._due("validate", done):
            loss = evaluate(self.model, self.validation, self.recipe.train.bfloat16)
            bits = loss / math.log(2) / self.bytes_per_token if self.bytes_per_token else math.nan
            log.validation(done, record.loss, loss, bits, self._load())
            bar.write(f"step {done}: validation loss {loss:.4f}, {bits:.3f} bits a byte")
        if self.tokenizer is not None and self._due("sample", done):
            text = self._sample()
            log.sample(done, text)
            bar.write(f"step {done} writes: {text[:300]!r}")

    @torch.no_grad()
    def _load(self) -> list[list[float]]:
        """How busy each expert of each layer is on a validation batch; 1 = an even share."""
        trace, batch = Trace(), self.validation[0].to(self.model.device)
        losses(self.model, batch, trace)
        return expert_load(trace.experts, self.model.config.num_experts).tolist() if trace.experts else []

    def _sample(self) -> str:
        prompt = self.recipe.log.prompt
        ids = [BOS, *self.tokenizer.encode(prompt)]
        self.model.eval()
        new = generate(self.model, ids, max_new_tokens=200, temperature=0.7, top_p=0.9, seed=self.recipe.seed)
        self.model.train()
        return prompt + self.tokenizer.decode(new[0].tolist())

    def _save(self, done: int) -> None:
        """A checkpoint exists whole or not at all, and the last good one goes only when a later one is there."""
        file = self.folder / f"checkpoint-{done:06d}.pt"
        aside = file.with_suffix(".part")
        try:
            with aside.open("wb") as output:
                torch.save({"step": done, **self.trainer.state_dict()}, output)
                output.flush()
                os.fsync(output.fileno())
            aside.replace(file)
        except (OSError, RuntimeError) as error:  # torch.save raises the latter for a full disk
            aside.unlink(missing_ok=True)
            kept = _checkpoints(self.folder)
            last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no earlier one"
            raise OSError(
                f"{file} could not be written ({error}): make room and start the same command again; {last}"
            ) from error
        for old in _checkpoints(self.folder)[:-KEPT]:
            old.unlink()

    def _resume(self) -> int:
        """Take up the last checkpoint; returns the steps done."""
        checkpoints = _checkpoints(self.folder)
        if not checkpoints:
            return 0
        state = torch.load(checkpoints[-1], map_location=self.model.device, weights_only=True)
        self.trainer.load_state_dict(state)
        return state["step"]

    def _finish(self) -> None:
        # In shards, as released checkpoints are: whatever reads these has seen that it can.
        stored = 2 * sum(parameter.numel() for parameter in self.model.parameters())
        save(self.model, self.folder / "model", shard_bytes=stored // 2 + 1, dtype="bfloat16")
        if isinstance(self.tokenizer, BPETokenizer):
            self.tokenizer.save(self.folder / "model")


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*.pt"))


def _batches(recipe: Recipe, corpus: Corpus | None):
    """step -> Batch."""
    options, source = recipe.train, recipe.data
    if corpus is None:
        return lambda step: task_batch(
            source.task, options.batch, options.length, seed=recipe.seed, step=step, **source.settings
        )
    return Windows(corpus.tokens["train"], options.batch, options.length, recipe.seed)


def _validation(recipe: Recipe, corpus: Corpus | None) -> list[Batch]:
    """The first batches of the validation text, or of another seed's tasks."""
    options, count = recipe.train, recipe.log.validation_batches
    if corpus is None:
        other = recipe.seed + 2**31
        return [
            task_batch(
                recipe.data.task, options.batch, options.length, seed=other, step=step, **recipe.data.settings
            )
            for step in range(count)
        ]
    if not len(corpus.tokens["validation"]):
        return []
    windows = Windows(corpus.tokens["validation"], options.batch, options.length, seed=0)
    # More batches than an epoch has would judge windows twice.
    return [windows(step) for step in range(min(count, max(1, windows.in_epoch // options.batch)))]


def _bytes_per_token(corpus: Corpus | None, part: str) -> float:
    if corpus is None or not corpus.facts["parts"][part]["tokens"]:
        return 0.0
    facts = corpus.facts["parts"][part]
    return facts["bytes"] / (facts["tokens"] - facts["documents"])  # <bos> is never judged


class _Log:
    """log.csv and its siblings. What stands in them beyond the step that a run goes on from is dropped."""

    def __init__(self, folder: Path, start: int, tensorboard: bool) -> None:
        self.folder = folder
        self.steps = _table(folder / "log.csv", COLUMNS, start)
        self.validations = _table(folder / "validation.csv", ["step", "train_loss", "loss", "bits_per_byte"], start + 1)
        self.experts = _table(folder / "experts.csv", ["step", "moe_layer", "load"], start + 1)
        self.board = _board(folder, start) if tensorboard else None

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_) -> None:
        for file in (self.steps, self.validations, self.experts):
            file.close()
        if self.board:
            self.board.close()

    def step(self, record: Record, share: float) -> None:
        *numbers, activations = record
        sizes = " ".join(f"{size:.4g}" for size in activations)
        # repr, so that equal losses are equal bits.
        _row(self.steps, [*map(repr, numbers), f"{share:.4f}", sizes])
        if self.board:
            for name, value in zip(COLUMNS, numbers, strict=False):
                self.board.add_scalar(name, value, record.step)

    def validation(self, done: int, train_loss: float, loss: float, bits: float, load: list[list[float]]) -> None:
        _row(self.validations, [done, repr(train_loss), repr(loss), f"{bits:.5f}"])
        for layer, experts in enumerate(load):
            _row(self.experts, [done, layer, " ".join(f"{share:.3f}" for share in experts)])
        if self.board:
            self.board.add_scalar("validation_loss", loss, done)

    def sample(self, done: int, text: str) -> None:
        (self.folder / "samples").mkdir(exist_ok=True)
        write_whole(self.folder / "samples" / f"{done:06d}.txt", text)


def _row(file, values: list) -> None:
    csv.writer(file).writerow(values)
    file.flush()


def _table(file: Path, columns: list[str], end: int):
    """The CSV file open at its end, with only those rows of an earlier try whose step is below `end`."""
    rows = []
    if file.is_file():
        with file.open(newline="", encoding="utf-8") as old:
            # A process that was killed may have left half a row.
            rows = [row for row in list(csv.reader(old))[1:] if len(row) == len(columns) and int(row[0]) < end]
    aside = file.with_name(file.name + ".part")
    with aside.open("w", newline="", encoding="utf-8") as new:
        csv.writer(new).writerows([columns, *rows])
    aside.replace(file)
    return file.open("a", newline="", encoding="utf-8")


def _board(folder: Path, start: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("log.tensorboard is on, but TensorBoard is not installed: pip install tensorboard") from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=start)


class _Stop:
    wanted = False


@contextmanager
def _stop_at_signal():
    """The first Ctrl-C (or SIGTERM) asks the loop to end after its step; the second ends it at once."""
    stop = _Stop()

    def ask(number, frame):
        if stop.wanted:
            raise KeyboardInterrupt
        stop.wanted = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
