"""A run survives whatever ends it, goes on with the same bits, and says what is wrong with what it is given."""

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minijamba import Jamba, load, preset, save
from minijamba.recipe import recipe_from_dict
from minijamba.run import COLUMNS, held_out_scores, run, summary
from minijamba.testing import assert_rejects
from minijamba.tokenizer import BPETokenizer

MODEL = {"preset": "tiny", "num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "hidden_size": 16}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(40):
        lines = [f"line {j} of text {i} says {i * j % 13}\n" for j in range(12)]
        (folder / f"{i}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def recipe(texts):
    def make(seed=0, model=MODEL, data=None, log=None, **train):
        tables = {
            "seed": seed,
            "model": dict(model),
            "data": {"folder": str(texts), "vocab_size": 265} if data is None else data,
            "train": {"steps": 12, "batch": 4, "length": 16} | train,
            "log": {"save": 4, "validate": 6, "sample": 12, "prompt": "line"} | (log or {}),
        }
        return recipe_from_dict(tables)

    return make


def rows(folder, columns=COLUMNS[:7]):
    """The log as text, without what depends on the clock."""
    with (folder / "log.csv").open(newline="") as file:
        return [[row[name] for name in columns] for row in csv.DictReader(file)]


def weights(folder):
    return {name: value.clone() for name, value in load(folder / "model", dtype="bfloat16").state_dict().items()}


def test_a_run_leaves_a_model_a_log_and_samples(recipe, tmp_path):
    folder = run(recipe(), tmp_path / "run", progress=False)
    model, tokenizer = load(folder), BPETokenizer.load(folder)
    assert model.config.vocab_size == tokenizer.vocab_size == 265
    assert len(list(folder.glob("*.safetensors"))) >= 2
    lines = rows(tmp_path / "run")
    assert [int(line[0]) for line in lines] == list(range(12))
    assert float(lines[-1][1]) < float(lines[0][1])
    with (tmp_path / "run" / "validation.csv").open() as file:
        validation = list(csv.DictReader(file))
    assert [row["step"] for row in validation] == ["6", "12"]
    assert float(validation[1]["loss"]) < float(validation[0]["loss"]) and 0 < float(validation[1]["bits_per_byte"]) < 9
    with (tmp_path / "run" / "experts.csv").open() as file:
        load_row = next(csv.DictReader(file))
    assert abs(sum(map(float, load_row["load"].split())) - 4) < 0.01
    (sample,) = (tmp_path / "run" / "samples").iterdir()
    assert sample.name == "000012.txt" and sample.read_text(encoding="utf-8").startswith("line")
    assert sorted(file.name for file in (tmp_path / "run").glob("checkpoint-*")) == [
        "checkpoint-000008.pt", "checkpoint-000012.pt",
    ]  # fmt: skip


def test_a_summary_adds_up_the_seconds_of_the_steps(recipe, tmp_path):
    run(recipe(), tmp_path, progress=False)

    def check(tokens_per_second):
        with (tmp_path / "log.csv").open(newline="") as file:
            lines = [row | {"tokens_per_second": tokens_per_second} for row in csv.DictReader(file)]
        with (tmp_path / "log.csv").open("w", newline="") as file:
            log = csv.DictWriter(file, COLUMNS)
            log.writeheader()
            log.writerows(lines)
        assert summary(tmp_path)["training_seconds"] == 12 * 4  # steps of 4 x 16 tokens in 4 seconds

    check(16)
    assert_rejects(check, 32)


def test_transformers_reads_model_and_tokenizer(recipe, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run(recipe(steps=2), tmp_path / "run", progress=False)
    theirs, ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), load(folder, "cpu", "float32")
    ids = AutoTokenizer.from_pretrained(folder)("line 12 of text", return_tensors="pt").input_ids
    assert ids[0].tolist() == BPETokenizer.load(folder).encode("line 12 of text")
    with torch.no_grad():
        # float32, sums of a few dozen terms
        assert torch.allclose(theirs(ids).logits, ours(ids), atol=1e-5)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_an_interrupted_run_goes_on_with_the_same_bits(recipe, tmp_path, stop):
    """A second process is ended in the middle, by force or politely; this one takes its run up."""
    whole = recipe(steps=60, accumulate=2, log={"save": 7})
    run(whole, tmp_path / "whole", progress=False)
    tables = json.dumps(whole.to_dict())
    script = (
        "import json, sys, torch; torch.set_num_threads(1)\n"
        "from minijamba.recipe import recipe_from_dict; from minijamba.run import run\n"
        f"run(recipe_from_dict(json.loads(sys.argv[1])), {str(tmp_path / 'cut')!r}, progress=False)"
    )
    log = tmp_path / "cut" / "log.csv"
    process = subprocess.Popen([sys.executable, "-c", script, tables], stderr=subprocess.DEVNULL)
    while process.poll() is None and (not log.is_file() or len(log.read_text().splitlines()) < 20):
        time.sleep(0.01)
    process.send_signal(stop)
    assert process.wait() != 0
    done = len(rows(tmp_path / "cut"))
    assert 15 <= done < 60 and not (tmp_path / "cut" / "model").exists()
    if stop == signal.SIGINT:  # nothing is lost
        assert f"checkpoint-{done:06d}.pt" in os.listdir(tmp_path / "cut")
    run(whole, tmp_path / "cut", progress=False)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "cut")[name]), name


def test_what_a_checkpoint_holds_is_all_needed(recipe, tmp_path):
    """Without the optimiser, or from another place in the text, the losses would differ."""
    whole = recipe()
    run(whole, tmp_path / "whole", progress=False)

    def check(damage):
        folder = tmp_path / damage.__name__
        run(recipe(), folder, progress=False)
        (folder / "checkpoint-000012.pt").unlink()
        state = torch.load(folder / "checkpoint-000008.pt")
        torch.save(damage(state), folder / "checkpoint-000008.pt")
        run(whole, folder, progress=False)
        assert rows(folder) == rows(tmp_path / "whole")

    def nothing(state):
        return state

    def forgetting_the_optimiser(state):
        for moments in state["optimizer"]["state"].values():
            moments["exp_avg"].zero_()
        return state

    def forgetting_the_place(state):
        return state | {"step": 7}

    check(nothing)
    assert_rejects(check, forgetting_the_optimiser, forgetting_the_place)


def test_a_finished_run_is_not_trained_again(recipe, tmp_path):
    run(recipe(), tmp_path / "run", progress=False)
    before = (tmp_path / "run" / "log.csv").read_text()
    run(recipe(), tmp_path / "run", progress=False)
    assert (tmp_path / "run" / "log.csv").read_text() == before


def test_the_seed_decides(recipe, tmp_path):
    run(recipe(steps=3), tmp_path / "a", progress=False)
    run(recipe(steps=3, seed=1), tmp_path / "b", progress=False)
    assert rows(tmp_path / "a") != rows(tmp_path / "b")


def test_another_recipe_is_refused(recipe, tmp_path):
    run(recipe(steps=2), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="another recipe: train.learning_rate is 0.003 there and 0.1 here. Give"):
        run(recipe(steps=2, learning_rate=0.1), tmp_path / "run", progress=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "diary.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other things"):
        run(recipe(), tmp_path / "other", progress=False)
    assert (tmp_path / "other" / "diary.txt").read_text() == "mine"


def test_text_that_does_not_do_is_refused(recipe, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no text"):
        run(recipe(data={"folder": str(tmp_path / "empty")}), tmp_path / "a", progress=False)
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "a.txt").write_text("short")
    data = {"folder": str(tmp_path / "short"), "vocab_size": None}
    with pytest.raises(ValueError, match="train text has 7 tokens, and train.length 16 needs 17: take a shorter"):
        run(recipe(data=data, model=MODEL | {"vocab_size": 259}), tmp_path / "b", progress=False)
    (tmp_path / "short" / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="b.txt is not UTF-8 text"):
        run(recipe(data=data), tmp_path / "c", progress=False)


def test_bytes_and_tasks_need_no_tokenizer(recipe, tmp_path):
    data = dict(recipe().to_dict()["data"], vocab_size=None)
    folder = run(recipe(data=data, steps=2), tmp_path / "bytes", progress=False)
    assert load(folder).config.vocab_size == 259 and not (folder / "tokenizer.json").exists()
    task = {"task": "induction_heads", "settings": {"vocabulary": 16}}
    folder = run(recipe(data=task, model=MODEL | {"vocab_size": 32}, steps=2), tmp_path / "task", progress=False)
    assert load(folder).config.vocab_size == 32


def test_a_run_can_start_from_a_checkpoint_whose_tokenizer_fits(recipe, tmp_path, texts):
    first = run(recipe(), tmp_path / "first", progress=False)
    second = run(recipe(model={"checkpoint": str(first)}, steps=3), tmp_path / "second", progress=False)
    assert float(rows(tmp_path / "second")[0][1]) < float(rows(tmp_path / "first")[0][1]) - 0.3
    assert (second / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    save(Jamba(preset("tiny", vocab_size=264)), tmp_path / "small")
    BPETokenizer.load(first).save(tmp_path / "small")
    with pytest.raises(ValueError, match="tokenizer has 265 tokens and the model 264.*put the tokenizer.json"):
        run(recipe(model={"checkpoint": str(tmp_path / "small")}), tmp_path / "third", progress=False)


def test_a_full_disk_keeps_the_last_checkpoint(recipe, tmp_path, monkeypatch):
    written = []
    torch_save = torch.save

    def full(state, file):
        if written:
            file.write(b"half a checkpoint")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(file)
        torch_save(state, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"000008.pt could not be written .*No space left.*last good .*000004.pt"):
        run(recipe(), tmp_path / "run", progress=False)
    assert [file.name for file in (tmp_path / "run").glob("checkpoint*")] == ["checkpoint-000004.pt"]
    monkeypatch.undo()
    run(recipe(), tmp_path / "run", progress=False)
    run(recipe(), tmp_path / "whole", progress=False)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_a_loss_that_breaks_keeps_the_last_checkpoint(recipe, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step \d+: loss .*grew first, at step \d+.*Lower the learning rate"):
        run(recipe(steps=200, learning_rate=1e4, warmup=0, clip=1e9, log={"save": 1}), tmp_path / "run", progress=False)
    last = sorted((tmp_path / "run").glob("checkpoint*"))[-1]
    assert all(value.isfinite().all() for value in torch.load(last)["model"].values())


def test_held_out_text_costs_model_and_ngram_something(recipe, tmp_path):
    run(recipe(), tmp_path / "run", progress=False)
    scores = held_out_scores(tmp_path / "run", progress=False)
    facts = json.loads((tmp_path / "run" / "tokens" / "corpus.json").read_text())["parts"]["held_out"]
    assert [score.bytes for score in scores.values()] == [facts["bytes"]] * 2 and facts["bytes"] > 0
    assert 0 < scores["5-gram"].bits_per_byte < scores["model"].bits_per_byte < 8  # twelve steps are few
    with pytest.raises(ValueError, match="no finished run"):
        held_out_scores(tmp_path)


def test_the_command_trains_and_goes_on(texts, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        '[model]\npreset = "tiny"\nnum_hidden_layers = 2\n'
        f'[data]\nfolder = "{texts}"\nvocab_size = 300\n[train]\nsteps = 2\nbatch = 2\nlength = 16\n'
    )
    command = [sys.executable, "-m", "minijamba", "train", "mine.toml", "--set", "train.steps=3"]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert Path("runs/mine/model").as_posix() in done.stdout and (tmp_path / "runs/mine/model/config.json").is_file()
    done = subprocess.run([*command, "--set", "train.clip=2"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "another recipe: train.clip is 1.0 there and 2 here" in done.stderr


def test_tensorboard_gets_the_curves_or_says_what_is_missing(recipe, tmp_path):
    from importlib.util import find_spec

    wanted = recipe(steps=2, log={"tensorboard": True})
    if find_spec("tensorboard"):
        run(wanted, tmp_path / "run", progress=False)
        assert list((tmp_path / "run" / "tensorboard").iterdir())
    else:
        with pytest.raises(ValueError, match="pip install tensorboard"):
            run(wanted, tmp_path / "run", progress=False)
