"""Every verb does its work from the command line, and says in one line what it cannot do."""

import filecmp
import json
import re
import subprocess
import sys

import pytest
import torch

import minijamba as mj
from minijamba import checkpoint, cli, data, doctor
from minijamba.evaluate import bits_per_byte
from minijamba.quantize import SCHEMES
from minijamba.tasks import accuracy, solved, task_batch
from minijamba.testing import assert_rejects
from minijamba.tokenizer import BOS, BPETokenizer, load_tokenizer

VERBS = (
    "tour", "lab", "site", "assignment", "generate", "train", "eval", "budget", "convert", "study", "conform", "bench",
    "doctor",
)  # fmt: skip


@pytest.fixture
def run(capsys):
    """run("budget", "tiny") -> (exit status, stdout, stderr)."""

    def run(*arguments):
        status = cli.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A tiny Jamba of transformers' and the folder that it wrote itself to."""
    from transformers import JambaConfig, JambaForCausalLM

    torch.manual_seed(0)
    sizes = mj.preset("tiny", vocab_size=300, eos_token_id=None, initializer_range=0.3).to_dict()
    model = JambaForCausalLM(JambaConfig(**sizes, use_mamba_kernels=False)).eval()
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    return model, folder


def continuation(model, ids, steps):
    with torch.no_grad():
        tokens = model.generate(torch.tensor([ids]), max_new_tokens=steps, do_sample=False)
    return tokens[0, len(ids) :].tolist()


def test_generate_continues_ids_as_transformers_does(theirs, run):
    model, folder = theirs

    def check(prompt):
        status, shown, _ = run("generate", "--model", folder, "--tokens", prompt, "--max-new-tokens", 12)
        assert status == 0 and [int(word) for word in shown.split()] == continuation(model, [1, 17, 5, 200], 12)

    check("1,17,5,200")
    assert_rejects(check, "1,17,5,201")


def test_generate_continues_text_as_transformers_does(theirs, run, tmp_path):
    model, folder = theirs
    status, _, _ = run("convert", folder, tmp_path / "copy")
    tokenizer = BPETokenizer.train(["the loop over time is the definition " * 9], 290)
    tokenizer.save(tmp_path / "copy")
    expected = tokenizer.decode(continuation(model, [1, *tokenizer.encode("the loop")], 12))
    _, shown, _ = run("generate", "--model", tmp_path / "copy", "--prompt", "the loop", "--max-new-tokens", 12)
    assert status == 0 and shown == expected + "\n"


def test_generate_reads_bytes_where_there_is_no_tokenizer(theirs, run):
    model, folder = theirs
    ids = [1, *(byte + 3 for byte in b"ab")]
    expected = bytes(token - 3 for token in continuation(model, ids, 12) if 3 <= token < 259).decode(errors="replace")
    _, shown, note = run("generate", "--model", folder, "--prompt", "ab", "--max-new-tokens", 12)
    assert shown == expected + "\n" and "has no tokenizer.json" in note


def test_generate_samples_the_same_text_from_the_same_seed(theirs, run):
    def sample(seed):
        options = ("--temperature", 1.0, "--top-k", 50, "--top-p", 0.9, "--seed", seed)
        return run("generate", "--model", theirs[1], "--tokens", "1 2", *options)[1]

    assert sample(0) == sample(0) != sample(1)


def test_generate_continues_with_the_shipped_model_unless_told_otherwise(run):
    model, tokenizer = mj.load(), load_tokenizer(checkpoint.SHIPPED)
    assert (cli.SHIPPED, list(cli.SCHEMES)) == (checkpoint.SHIPPED, list(SCHEMES))

    def check(prompt):
        status, shown, _ = run("generate", "--prompt", "import os\n", "--max-new-tokens", 8)
        new = mj.generate(model, [BOS, *tokenizer.encode(prompt)], max_new_tokens=8)[0].tolist()
        assert status == 0 and shown == tokenizer.decode(new) + "\n"

    check("import os\n")
    assert_rejects(check, "class A:\n")


def test_a_tokenizer_larger_than_the_model_is_refused(run, tmp_path):
    mj.save(mj.Jamba(mj.preset("tiny")), tmp_path / "tiny")
    status, _, error = run("generate", "--model", tmp_path / "tiny", "--prompt", "a")
    assert status == 2 and "has 259 tokens and the model 128" in error


def test_convert_keeps_the_logits(theirs, run, tmp_path):
    model, folder = theirs
    status, shown, _ = run("convert", folder, tmp_path / "half", "--dtype", "bfloat16")
    tokens = torch.tensor([[1, 17, 5]])
    assert status == 0 and "written" in shown
    assert mj.load(tmp_path / "half").dtype == torch.bfloat16
    converted, original = mj.load(tmp_path / "half", dtype="float32")(tokens), model(tokens).logits
    # bfloat16 weights: 8 bits, over eight layers
    assert (converted - original).abs().max() < 0.1 * original.abs().max()


def test_convert_and_generate_with_packed_weights(theirs, run, tmp_path):
    """The checkpoint of packed weights continues as the one that is packed while it loads; each scheme its own way."""
    _, folder = theirs
    status, shown, _ = run("convert", folder, tmp_path / "packed", "--quantize", "int4-all")
    assert status == 0 and "written" in shown
    prompt = ("--tokens", "1,17,5,200", "--max-new-tokens", 12)
    _, expected, _ = run("generate", "--model", tmp_path / "packed", *prompt)

    def check(*options):
        status, shown, _ = run("generate", "--model", folder, *prompt, *options)
        assert status == 0 and len(shown.split()) == 12 and shown == expected

    check("--quantize", "int4-all")
    assert_rejects(lambda options: check(*options), ("--quantize", "int8"), ())
    status, _, error = run("generate", "--model", tmp_path / "packed", *prompt, "--quantize", "int8")
    assert status == 2 and "packed as 'int4-all'" in error and error.count("\n") == 1


def test_convert_makes_a_random_checkpoint(run, tmp_path):
    status, shown, _ = run("convert", "--random", "tiny", tmp_path / "a", "--dtype", "bfloat16", "--seed", 3)
    assert status == 0 and "written" in shown
    checkpoint.write_random(mj.preset("tiny"), tmp_path / "b", seed=3, dtype="bfloat16")
    checkpoint.write_random(mj.preset("tiny"), tmp_path / "c", seed=0, dtype="bfloat16")

    def check(folder):  # compared as bytes, files that differ would take pytest minutes to show
        one, other = (where / "model.safetensors" for where in (tmp_path / "a", folder))
        assert filecmp.cmp(one, other, shallow=False)

    check(tmp_path / "b")
    assert_rejects(check, tmp_path / "c")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(30):
        (folder / f"{i}.txt").write_text("".join(f"line {j} of text {i} says {i * j % 31}\n" for j in range(8)))
    return folder


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory):
    """The folder of a run that is over."""
    recipe, folder = tmp_path_factory.mktemp("recipe") / "tiny.toml", tmp_path_factory.mktemp("runs") / "tiny"
    recipe.write_text(
        '[model]\npreset = "tiny"\nnum_hidden_layers = 2\nattn_layer_period = 2\nattn_layer_offset = 1\n'
        f'[data]\nfolder = "{texts}"\nvocab_size = 280\n[train]\nsteps = 4\nbatch = 2\nlength = 16\n'
    )
    assert cli.main(["train", str(recipe), "--output", str(folder), "--device", "cpu", "--quiet"]) == 0
    return folder


def shown_rows(shown):
    """Name -> measure -> value of what eval prints, in columns."""
    found = {}
    for line in shown.splitlines():
        name, measure, value = (part.strip() for part in re.split(r"\s{2,}", line))
        found.setdefault(name, {})[measure] = value
    return found


def test_eval_predicts_the_held_out_part_of_a_folder(finished, texts, run):
    model, tokenizer = mj.load(finished / "model", device="cpu"), load_tokenizer(finished / "model")
    parts = data.split(data.text_folder(texts))
    status, shown, _ = run("eval", finished / "model", "--data", texts, "--context", 50, "--device", "cpu")
    assert status == 0

    def check(documents, context=50):
        score = bits_per_byte(model, tokenizer, data.texts(documents), context=context)
        assert shown_rows(shown)[str(texts)] == {
            "documents held out": str(len(documents)),
            "bytes": f"{score.bytes:,}",
            "tokens": f"{score.tokens:,}",
            "bits per byte": f"{score.bits_per_byte:.4f}",
            "nats per token": f"{score.nats_per_token:.4f}",
        }

    check(parts["held_out"])
    assert_rejects(check, parts["validation"], parts["train"])
    assert_rejects(lambda context: check(parts["held_out"], context), 20)


def test_eval_asks_a_synthetic_task(finished, run):
    model = mj.load(finished / "model", device="cpu")
    settings = ("--length", 32, "--batch", 4, "--device", "cpu")
    status, shown, _ = run("eval", finished / "model", "--synthetic", "needle", "repeated", *settings)
    assert status == 0 and shown_rows(shown).keys() == {"needle, 32 tokens", "repeated, 32 tokens"}
    status, shown, _ = run("eval", finished / "model", "--synthetic", "needle", *settings, "--setting", "digits=2")

    @torch.no_grad()
    def check(length):
        options = {"vocabulary": model.config.vocab_size, "digits": 2}
        batches = [task_batch("needle", 4, length, seed=0, step=step, **options) for step in range(8)]
        right, all_right = (
            sum(judge(model(batch.tokens), batch.targets) for batch in batches) / 8 for judge in (accuracy, solved)
        )
        expected = {"answers right": f"{right:.1%}", "rows all right": f"{all_right:.1%}"}
        assert shown_rows(shown) == {f"needle, {length} tokens": expected}

    check(32)
    assert_rejects(check, 30)


def test_eval_scores_a_run_beside_counting_and_records_it(finished, run, tmp_path, monkeypatch):
    arguments = ["eval", "--run", str(finished), "--device", "cpu"]
    recording = [*arguments, "--record", str(tmp_path / "a.json"), "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", ["minijamba", *recording])
    status, shown, _ = run(*recording)
    found = json.loads((tmp_path / "a.json").read_text())
    facts = json.loads((finished / "tokens" / "corpus.json").read_text())["parts"]["held_out"]

    def check(found):
        assert [row["model"] for row in found["rows"]] == ["model", "5-gram"]
        assert [row["bytes"] for row in found["rows"]] == [facts["bytes"]] * 2
        for row in found["rows"]:
            assert 0 < row["bits_per_byte"] < 12 and row["bits_per_byte"] == row["bits"] / row["bytes"]
            assert f"{row['model']:<8}{row['bits_per_byte']:.4f} bits a byte" in shown
        assert found["recipe"]["train"]["steps"] == 4 and found["curve"]["step"] == [3]
        assert found["commit"] == "abc" and found["command"].split() == ["minijamba", *arguments]

    assert status == 0 and f"recorded in {tmp_path / 'a.json'}" in shown
    check(found)
    assert_rejects(check, found | {"rows": found["rows"][::-1]}, found | {"command": " ".join(recording)})
    status, shown, _ = run(*arguments)
    assert status == 0 and "recorded" not in shown


def test_a_loss_that_breaks_ends_training_with_one_line(texts, run, tmp_path):
    (tmp_path / "wild.toml").write_text(
        f'[model]\npreset = "tiny"\nnum_hidden_layers = 2\n[data]\nfolder = "{texts}"\nvocab_size = 280\n'
        "[train]\nsteps = 60\nbatch = 2\nlength = 16\nwarmup = 0\nclip = 1e9\n"
    )

    def check(rate):
        arguments = ("--set", f"train.learning_rate={rate}", "--output", tmp_path / rate)
        status, shown, error = run("train", tmp_path / "wild.toml", "--quiet", "--device", "cpu", *arguments)
        assert status == 2 and not shown and error.startswith("minijamba: step ") and error.count("\n") == 1
        assert "not finite" in error and "Lower the learning rate" in error

    check("1e4")
    assert_rejects(check, "1e-3")


def test_budget_of_a_preset_and_of_a_file(run, theirs):
    assert "51,570,323,328" in run("budget")[1]
    _, shown, _ = run("budget", "jamba-v0.1", "--memory", 80, "--quantize", "int8", "--context", 1024)
    assert "fits in 80 GiB" in shown
    assert "does not fit in 80 GiB" in run("budget", "--memory", 80)[1]
    assert tuple(SCHEMES) == cli.SCHEMES and all(
        "weights in " + q in run("budget", "--quantize", q)[1] for q in SCHEMES
    )
    assert "any number of tokens" in run("budget", "mamba-130m", "--memory", 80)[1]
    compared = run("budget", "--compare", "--context", 131072)[1]
    assert "131,072 tokens" in compared and "46,702,792,704" in compared and "2.00 GiB" in compared
    total = sum(parameter.numel() for parameter in theirs[0].parameters())
    assert f"{total:,}" in run("budget", theirs[1])[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("budget", "nowhere"), "'nowhere' is no file, and no preset: jamba-v0.1"),
        (("budget", "--context", "0"), "context is 0"),
        (("budget", "--compare", "--context", "0"), "context is 0"),
        (("budget", "--compare", "--memory", "80"), "--compare takes --context alone"),
        (("generate", "--model", "nowhere", "--prompt", "a"), "nowhere does not exist"),
        (("convert", "nowhere", "there"), "nowhere does not exist"),
        (("convert", "there"), "convert takes SRC and DST, or --random PRESET"),
        (("convert", "nowhere", "there", "--seed", "1"), "convert takes SRC and DST, or --random PRESET"),
        (("convert", "--random", "tiny", "nowhere", "there"), "--random takes DST, --seed and --dtype alone"),
        (("convert", "--random", "tiny", "there", "--quantize", "int8"), "--random takes DST, --seed and --dtype"),
        (("convert", "--random", "huge", "there"), "no preset is called 'huge'"),
        (("train", "nowhere.toml"), "nowhere.toml does not exist: give a recipe"),
        (("study", "triplets"), "there is no study 'triplets': choose of twins"),
        (("study", "twins", "--steps", "0"), "0 steps and 3 seeds train nothing"),
        (("eval", "nowhere"), "nowhere does not exist"),
        (("eval", "--data", "nowhere"), "nowhere is no folder"),
        (("eval", "--run", "nowhere"), "nowhere holds no finished run"),
        (("eval", "--synthetic", "chess"), "there is no task 'chess'"),
        (("eval", "--synthetic", "needle", "--setting", "digits"), "'digits' is no setting: write it as pairs=8"),
        (("eval", "--synthetic", "needle", "--setting", "depth=x"), "'depth=x' is no setting"),
        (("eval", "--synthetic", "needle", "--setting", "pears=8"), "needle: got an unexpected keyword argument"),
        (("eval", "--synthetic", "associative_recall"), "associative_recall: missing a required argument: 'pairs'"),
        (("bench", "scan", "--sides", "nobody", "--device", "cpu"), "there is no side 'nobody'"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_mistake_gets_one_line(arguments, says, run, tmp_path, monkeypatch):
    def check(prefix):
        status, shown, error = run(*prefix, *arguments)
        assert status == 2 and not shown and error.startswith("minijamba: ") and says in error
        assert error.count("\n") == 1 and not list(tmp_path.iterdir())

    monkeypatch.chdir(tmp_path)
    check([])
    with pytest.raises(ValueError, match=says[:20]):
        check(["--debug"])


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([verb, "--help"])
    assert stopped.value.code == 0 and f"usage: minijamba {verb}" in capsys.readouterr().out


def test_bench_hands_its_options_on(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "scan", "--help"])
    assert stopped.value.code == 0 and "--device" in capsys.readouterr().out


def test_ids_that_are_none_are_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", "--model", "m", "--tokens", "1,x"])
    assert stopped.value.code == 2 and "'1,x' is no list of ids" in capsys.readouterr().err


def test_doctor_names_versions_rungs_and_remedies(run, monkeypatch):
    def check(missing):
        version = doctor._version
        with monkeypatch.context() as patched:
            patched.setattr(doctor, "_version", lambda package: None if package in missing else version(package))
            _, shown, _ = run("doctor")
        assert version("torch") in shown
        (line,) = (line for line in shown.splitlines() if line.split()[:1] == ["nbval"])
        assert "pip install -e '.[test]'" in line
        assert all(component in shown for component in doctor.COMPONENTS)

    check(["nbval"])
    assert_rejects(check, [])


def test_lab_opens_the_notebooks_or_says_where_they_are(run, monkeypatch, tmp_path):
    calls = []
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(subprocess, "call", lambda command: calls.append(command) or 0)
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "minijamba" / "cli.py"))
    assert run("lab", "--no-browser")[0] == 0
    assert calls == [[sys.executable, "-m", "jupyterlab", "--no-browser", str(tmp_path / "notebooks")]]
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "elsewhere" / "minijamba" / "cli.py"))
    status, _, error = run("lab")
    assert status == 2 and "clone it" in error and len(calls) == 1


def test_tour(run):
    status, shown, _ = run("tour", "--seconds", 3)
    assert status == 0
    for part in (
        "m+ mE m+ mE A+ mE m+ mE", "11,088,976 parameters", "associative scan", "def mean(values):", "3 seconds more",
        "51,570,323,328", "00_map",
    ):  # fmt: skip
        assert part in shown

    def check(shown):
        errors = [float(line.split()[-1]) for line in shown.splitlines() if re.search(r" \de-\d\d$", line)]
        assert len(errors) == 5 and max(errors) < 1e-10  # float64, sums of hundreds of terms in another order
        names = ("bytes all alike", "knowing how frequent each token is", "this model before", "this model after")
        alike, frequent, before, after = (float(re.search(rf"{name} +(\d\.\d\d)", shown)[1]) for name in names)
        assert alike == 8 and after < before < frequent / 1.5 < alike

    check(shown)
    worse = re.sub(r"this model after .*", "this model after    9.99", shown)
    assert_rejects(check, worse, shown.replace("e-16", "e-06"), re.sub(r"\ndecoding.*", "", shown))


def test_python_m_minijamba():
    shown = subprocess.run([sys.executable, "-m", "minijamba", "--help"], capture_output=True, text=True, check=True)
    assert all(verb in shown.stdout for verb in VERBS)
