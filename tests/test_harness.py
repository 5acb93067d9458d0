"""Tasks of lm-evaluation-harness get the model's own probabilities and texts. All tasks are files written here."""

import json
import math
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import datasets
import lm_eval
import pytest
import torch

from minijamba import harness
from minijamba.checkpoint import save
from minijamba.generate import generate
from minijamba.harness import HarnessModel, run_harness
from minijamba.model import Jamba
from minijamba.testing import assert_matches, assert_rejects
from minijamba.tokenizer import BOS, EOS, SPECIAL_TOKENS, ByteTokenizer

CHOICES = [
    {"question": "ab", "choices": [" c", " dd", "ef"], "answer": 0},
    {"question": "x + y =", "choices": [" a", " z"], "answer": 1},
    {"question": "jam", "choices": ["ba", "bo"], "answer": 0},
]
TEXTS = ["a text of some words.", "another"]
PROMPTS = ["def f", "a longer prompt than the first"]


@pytest.fixture(autouse=True)
def nothing_is_asked_of_the_network(monkeypatch):
    asked = []

    def refuse(*request, **_):
        asked.append(request)
        raise OSError(f"no network in tests, not even for {request}")

    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)  # it counts its readers, of files, too
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert not asked


class Letters:
    """A character is a token, so that every token that a random model writes can be read."""

    alphabet = "abcdefghijklmnopqrstuvwxyz =+.\n()[]:!?"
    vocab_size = len(SPECIAL_TOKENS) + len(alphabet)

    def encode(self, text):
        return [self.alphabet.index(letter) + len(SPECIAL_TOKENS) for letter in text]

    def decode(self, ids):
        return "".join(self.alphabet[token - len(SPECIAL_TOKENS)] for token in ids if token >= len(SPECIAL_TOKENS))


LETTERS = Letters()


@pytest.fixture(scope="module")
def model(hybrid, long_memory):
    return long_memory(Jamba(hybrid)).double()


@pytest.fixture(scope="module")
def adapter(model):
    return HarnessModel(model, LETTERS, batch_size=3)


@torch.no_grad()
def log_p(model, context, continuation):
    """log p(continuation | <bos> context), nats, from one plain run."""
    row = torch.tensor([[BOS, *LETTERS.encode(context + continuation)]])
    tokens = model(row[:, :-1]).log_softmax(-1)[0].gather(1, row[0, 1:, None])[:, 0]
    return tokens[len(context) :].sum().item()


@torch.no_grad()
def greedy(model, prompt, count):
    """The likeliest text of so many tokens or up to <eos>, found without a cache."""
    row = [BOS, *LETTERS.encode(prompt)]
    for _ in range(count):
        row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
        if row[-1] == EOS:
            break
    return LETTERS.decode(row)[len(prompt) :]


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


class EarlyBoundary(HarnessModel):
    """Wrong: the last token of the context is scored, too."""

    def _loglikelihood_tokens(self, requests, **options):
        moved = [(texts, context[:-1], context[-1:] + continuation) for texts, context, continuation in requests]
        return super()._loglikelihood_tokens(moved, **options)


class LateBoundary(HarnessModel):
    """Wrong: the first token of the continuation is taken as given."""

    def _loglikelihood_tokens(self, requests, **options):
        moved = [(texts, context + continuation[:1], continuation[1:]) for texts, context, continuation in requests]
        return super()._loglikelihood_tokens(moved, **options)


class WithoutBos(HarnessModel):
    """Wrong: a text begins with its own first token."""

    def tok_encode(self, string, add_special_tokens=None):
        return super().tok_encode(string, add_special_tokens=False)


def test_loglikelihood_is_the_models_own(model):
    pairs = [("", "no context")] + [(item["question"], choice) for item in CHOICES for choice in item["choices"]]
    expected = [log_p(model, *pair) for pair in pairs]

    def check(kind, pairs=pairs, expected=expected):
        answers = kind(model, LETTERS, batch_size=2).loglikelihood(requests(*pairs), disable_tqdm=True)
        # float64, four layers and a sum of ten terms: 1e-12.
        assert_matches([value for value, _ in answers], expected, 1e-12, "log p")

    check(HarnessModel)
    assert_rejects(partial(check, pairs=pairs[1:], expected=expected[1:]), EarlyBoundary, LateBoundary, WithoutBos)


def test_a_space_at_the_end_of_the_context_belongs_to_the_continuation(model, adapter):
    """The harness's own rule, for tokenizers that join a space to the word behind it."""
    [(value, _)] = adapter.loglikelihood(requests(("a ", "b")), disable_tqdm=True)

    def check(context, continuation):
        assert_matches(value, log_p(model, context, continuation), 1e-12)

    check("a", " b")
    assert_rejects(lambda context: check(context, "b"), "a ", "a")


def test_greedy_means_likeliest_at_every_token(model, adapter):
    def check(continuation):
        [(_, is_greedy)] = adapter.loglikelihood(requests(("ab", continuation)), disable_tqdm=True)
        assert is_greedy

    text = greedy(model, "ab", 4)
    check(text)
    assert_rejects(check, text[:-1] + "=", "=" + text[1:])


def test_rolling_is_the_whole_text(model):
    expected = [log_p(model, "", text) for text in TEXTS]

    def check(kind):
        answers = kind(model, LETTERS).loglikelihood_rolling(requests(*((text,) for text in TEXTS)), disable_tqdm=True)
        assert_matches(answers, expected, 1e-12, "log p")

    check(HarnessModel)
    assert_rejects(check, WithoutBos)


class WritesOn(HarnessModel):
    """Wrong: stop strings are ignored."""

    def _text(self, row, until):
        return super()._text(row, [])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_answers_end_before_the_first_stop_string(model, batch_size):
    whole = [greedy(model, prompt, 12) for prompt in PROMPTS]
    stop = whole[0][4:6]  # two characters, so that an answer may hold the first of them
    asked = requests(*((prompt, {"until": ["never", stop], "max_gen_toks": 12}) for prompt in PROMPTS))

    def check(kind):
        answers = kind(model, LETTERS, batch_size).generate_until(asked, disable_tqdm=True)
        assert answers == [text.split(stop)[0] for text in whole]

    check(HarnessModel)
    assert_rejects(check, WritesOn)


def test_writing_ends_with_the_last_answer(model, adapter, monkeypatch):
    steps = []

    def counting(*arguments, stream, **options):
        return generate(*arguments, stream=lambda tokens: (steps.append(tokens), stream(tokens)), **options)

    monkeypatch.setattr(harness, "generate", counting)
    text = greedy(model, "ab", 5)
    adapter.generate_until(requests(("ab", {"until": [text[3:]], "max_gen_toks": 200})))
    assert len(steps) == 5


class Sorted(HarnessModel):
    """Wrong: answers in the order of the alphabet."""

    def generate_until(self, requests):
        return sorted(super().generate_until(requests))


def test_answers_come_in_the_order_of_the_requests(model):
    """Requests with different options are no batch."""
    counts = (5, 3, 1)
    asked = [(prompt, {"until": [], "max_gen_toks": count}) for count in counts for prompt in PROMPTS]

    def check(kind):
        expected = [greedy(model, prompt, count) for count in counts for prompt in PROMPTS]
        assert kind(model, LETTERS).generate_until(requests(*asked)) == expected

    check(HarnessModel)
    assert_rejects(check, Sorted)


def test_options_are_those_of_generate():
    until, options = harness._options({"until": "x", "do_sample": True, "temperature": 0.7, "top_p": 0.9})
    assert until == ["x"] and options == {"max_new_tokens": 256, "temperature": 0.7, "top_p": 0.9}
    assert harness._options({"until": ["x"], "do_sample": False, "temperature": 0.7})[1]["temperature"] == 0
    with pytest.raises(ValueError, match="num_beams, which `generate` does not know"):
        harness._options({"until": ["x"], "num_beams": 4})


def write_task(folder, name, documents, **config):
    """A task is a YAML file, of which JSON is a part, and here a file of documents."""
    data = folder / f"{name}.jsonl"
    data.write_text("\n".join(map(json.dumps, documents)))
    reading = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    config |= {"task": name, "dataset_path": "json", "dataset_kwargs": reading, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """Three tasks, one of each kind of question that the harness asks a model."""
    folder = tmp_path_factory.mktemp("tasks")
    mean = {"aggregation": "mean", "higher_is_better": True}
    write_task(
        folder, "mini_choice", CHOICES, output_type="multiple_choice", target_delimiter="", doc_to_text="{{question}}",
        doc_to_choice="{{choices}}", doc_to_target="{{answer}}", metric_list=[{"metric": "acc", **mean}],
    )  # fmt: skip
    write_task(
        folder, "mini_text", [{"text": text} for text in TEXTS], output_type="loglikelihood_rolling", doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
    )  # fmt: skip
    answers = [{"prompt": PROMPTS[0], "wanted": greedy(model, PROMPTS[0], 3)}, {"prompt": PROMPTS[1], "wanted": "no"}]
    write_task(
        folder, "mini_writing", answers, output_type="generate_until", doc_to_text="{{prompt}}",
        doc_to_target="{{wanted}}", metric_list=[{"metric": "exact_match", **mean}],
        generation_kwargs={"until": ["never"], "max_gen_toks": 3},
    )  # fmt: skip
    return folder


def test_tasks_of_every_kind(model, folder, monkeypatch):
    def check(kind):
        monkeypatch.setattr(harness, "HarnessModel", kind)
        right = [likeliest_choice(model, item) == item["answer"] for item in CHOICES]
        bits = -sum(log_p(model, "", text) for text in TEXTS) / math.log(2)
        expected = {
            "mini_choice": {"acc,none": sum(right) / len(right)},
            "mini_text": {"bits_per_byte,none": bits / len("".join(TEXTS))},
            "mini_writing": {"exact_match,none": 0.5},
        }
        results = run_harness(model, list(expected), tokenizer=LETTERS, include_path=folder)
        results = {task: {name: results[task][name] for name in expected[task]} for task in expected}
        assert_matches(results, expected, 1e-12)  # float64, sums of dozens of terms

    check(HarnessModel)
    assert_rejects(check, WithoutBos)


def likeliest_choice(model, item):
    scores = [log_p(model, item["question"], choice) for choice in item["choices"]]
    return scores.index(max(scores))


def test_limit_takes_the_first_documents(model, folder):
    def check(limit):
        results = run_harness(model, ["mini_writing"], tokenizer=LETTERS, include_path=folder, limit=limit)
        assert results["mini_writing"]["exact_match,none"] == 1

    check(1)
    assert_rejects(check, 2)


def test_the_harness_finds_a_checkpoint_by_our_name(hybrid, long_memory, folder, tmp_path):
    """Without a tokenizer.json beside it, its text is bytes."""
    model = long_memory(Jamba(replace(hybrid, vocab_size=ByteTokenizer.vocab_size)))
    save(model, tmp_path / "model")
    found = lm_eval.simple_evaluate(
        model="minijamba", model_args=f"model={tmp_path / 'model'},device=cpu", batch_size=2, tasks=["mini_text"],
        task_manager=harness._task_manager(["mini_text"], folder), bootstrap_iters=0,
    )  # fmt: skip
    for given in (model, tmp_path / "model"):
        direct = run_harness(given, ["mini_text"], tokenizer=ByteTokenizer(), include_path=folder, device="cpu")
        bits = direct["mini_text"]["bits_per_byte,none"]
        # float32, batches of other sizes: 1e-5.
        assert_matches(found["results"]["mini_text"]["bits_per_byte,none"], bits, 1e-5)


def test_what_is_refused(model, hybrid, folder, monkeypatch):
    with pytest.raises(ValueError, match="give it as tokenizer="):
        HarnessModel(model)
    with pytest.raises(ValueError, match="the tokenizer has 259 tokens and the model 41"):
        HarnessModel(model, ByteTokenizer())
    with pytest.raises(ValueError, match="no bos_token_id"):
        HarnessModel(Jamba(replace(hybrid, bos_token_id=None)), LETTERS)
    # The harness's own tasks take ten seconds to list.
    monkeypatch.setattr(harness, "TaskManager", partial(harness.TaskManager, include_defaults=False))
    with pytest.raises(ValueError, match="the harness has no task mini_chess: `lm-eval ls tasks`"):
        run_harness(model, ["mini_choice", "mini_chess"], tokenizer=LETTERS, include_path=folder)


def test_without_the_harness_the_error_says_what_to_install():
    code = "import sys; sys.modules['lm_eval'] = None; import minijamba.harness"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "pip install 'minijamba[eval]'" in done.stderr.splitlines()[-1]
