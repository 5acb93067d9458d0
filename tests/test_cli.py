"""Every verb does its work from the command line, and says in one line what it cannot do."""

import subprocess
import sys

import pytest
import torch

import minijamba as mj
from minijamba import cli, doctor
from minijamba.testing import assert_rejects
from minijamba.tokenizer import BPETokenizer

VERBS = ("tour", "lab", "generate", "budget", "convert", "bench", "doctor")


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


def test_budget_of_a_preset_and_of_a_file(run, theirs):
    assert "51,570,323,328" in run("budget")[1]
    _, shown, _ = run("budget", "jamba-v0.1", "--memory", 80, "--quantize", "int8", "--context", 1024)
    assert "fits in 80 GiB" in shown
    assert "does not fit in 80 GiB" in run("budget", "--memory", 80)[1]
    total = sum(parameter.numel() for parameter in theirs[0].parameters())
    assert f"{total:,}" in run("budget", theirs[1])[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("budget", "nowhere"), "'nowhere' is no file, and no preset: jamba-v0.1"),
        (("budget", "--context", "0"), "context is 0"),
        (("generate", "--model", "nowhere", "--prompt", "a"), "nowhere does not exist"),
        (("convert", "nowhere", "there"), "nowhere does not exist"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:2]),
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
        assert torch.__version__ in shown
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
    for part in ("m+ mE m+ mE A+ mE m+ mE", "associative scan", "after training", "51,570,323,328", "00_map"):
        assert part in shown


def test_python_m_minijamba():
    shown = subprocess.run([sys.executable, "-m", "minijamba", "--help"], capture_output=True, text=True, check=True)
    assert all(verb in shown.stdout for verb in VERBS)
