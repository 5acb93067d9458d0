"""The assignment: stubs that hold nothing of the solution, a solution that passes, wrong answers that learn why."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple

import pytest
import torch

from minijamba import attention, cli, conv, moe, norm, scan
from minijamba.assignment import SOLUTION, TEMPLATE, solved, stubbed, template_files, write_assignment
from minijamba.block import Block
from minijamba.cache import Layout
from minijamba.mamba import Mamba
from minijamba.rungs import use_rung
from minijamba.testing import assert_matches, assert_rejects

# What a part's tests are called, and the file that is written for it.
PARTS = {
    "1_scan": "scan", "2_step": "scan", "3_router": "router", "4_attention": "attention", "5_mixer": "mixer",
    "6_block": "block", "7_checkpoint": "model",
}  # fmt: skip


@pytest.fixture(scope="module")
def solution(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assignment") / "solved"
    write_assignment(folder, solutions=True)
    return folder


@pytest.fixture(scope="module")
def stubs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assignment")  # empty, which is as good as absent
    assert cli.main(["assignment", str(folder)]) == 0
    return folder


def _read(file):
    return file.read_text(encoding="utf-8")


@contextmanager
def modules_of(*folders):
    """Modules from these folders, which are forgotten at the end: the next ones have the same names."""
    path = list(sys.path)
    sys.path[:0] = [str(folder) for folder in folders]
    importlib.invalidate_caches()
    try:
        yield importlib.import_module
    finally:
        sys.path[:] = path
        for name, module in list(sys.modules.items()):
            if any(str(folder) in (getattr(module, "__file__", None) or "") for folder in folders):
                del sys.modules[name]


def judged(folder):
    """What pytest prints in the folder."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # they take longer to import than the tests
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True).stdout


def test_the_solution_passes_wholly(solution):
    def check(said):
        assert re.search(r"^34 passed in", said, flags=re.MULTILINE) and "together        100 of 100" in said, said

    said = judged(solution)
    check(said)
    assert_rejects(check, said.replace("34 passed", "33 passed, 1 skipped"), said.replace("100 of", " 97 of"))


def test_stubs_are_not_attempted_and_nothing_passes_or_fails(stubs):
    def check(said):
        assert re.search(r"^34 skipped in", said, flags=re.MULTILINE), said
        shown = said.rpartition(" points ")[2]
        assert all(f"{part.replace('_', ' '):<16}not attempted" in shown for part in PARTS), shown
        assert "together          0 of 100" in shown, shown

    said = judged(stubs)
    check(said)
    assert_rejects(check, said.replace("34 skipped", "1 passed, 33 skipped"), said.replace("not attempted", "20 of 20"))
    readme = _read(stubs / "README.md")
    table = said.rpartition(" points ")[2].partition("\n")[2].partition("\n34 skipped")[0]
    assert table.strip() in readme, "README.md shows another first run"


def test_stubs_hold_no_line_of_the_solution(stubs):
    def check(folder):
        for file in template_files():
            text = _read(file)
            secret = {line.strip() for _, code in SOLUTION.findall(text) for line in code.splitlines()} - {")", "}"}
            left = {line.strip() for line in _read(folder / file.relative_to(TEMPLATE)).splitlines()}
            assert not secret & left, f"{file.name} shows {sorted(secret & left)}"

    check(stubs)
    assert_rejects(check, TEMPLATE)
    solutions, raised = (
        sum(_read(file).count(words) for file in folder.glob("my_jamba/*.py"))
        for folder, words in ((TEMPLATE, "# <solution>"), (stubs, "raise NotImplementedError\n"))
    )
    assert solutions == raised == 17


def test_both_outputs_come_from_one_source(solution, stubs):
    def check(folder, other):
        for file in template_files():
            text, name = _read(file), file.relative_to(TEMPLATE)
            assert other(text) == _read(folder / name), name
            assert "solution>" not in other(text), name

    check(solution, solved)
    check(stubs, stubbed)
    assert_rejects(lambda other: check(stubs, other), solved, str)
    assert {file.name for file in stubs.iterdir()} - {"__pycache__"} == {
        "README.md", "checkpoint", "conftest.py", "my_jamba", "pytest.ini", "tests",
    }  # fmt: skip


def test_the_solution_is_short_and_does_not_import_minijamba(solution):
    def check(text):
        assert "minijamba" not in text
        code = [line for line in re.sub(r'""".*?"""', "", text, flags=re.DOTALL).splitlines() if line.strip()]
        assert len(code) < 210

    text = "".join(map(_read, solution.glob("my_jamba/*.py")))
    check(text)
    assert_rejects(check, text + "import minijamba\n", text + text)


def test_points_are_those_of_the_readme(solution):
    readme = _read(solution / "README.md")

    def check(readme):
        for part in PARTS:
            text = _read(TEMPLATE / "tests" / f"test_{part}.py")
            points = sum(map(int, re.findall(r"points\((\d+)\)", text)))
            assert re.search(rf"^\| {part.replace('_', ' ')} \|.*\| {points} \| \d+ \|$", readme, re.MULTILINE), part

    check(readme)
    assert_rejects(check, readme.replace("| 20 |", "| 25 |", 1))


def test_a_folder_that_holds_anything_is_refused_and_left_alone(tmp_path, capsys, monkeypatch):
    (tmp_path / "work.py").write_text("mine")
    for taken in tmp_path, tmp_path / "work.py":
        assert cli.main(["assignment", str(taken)]) == 2
        assert "absent or empty" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["work.py"]

    monkeypatch.setattr("minijamba.assignment.shutil.copytree", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_assignment(tmp_path / "new")
    assert [file.name for file in tmp_path.iterdir()] == ["work.py"], "an unfinished folder was left behind"


def test_without_the_checkpoint_the_remedy_is_named(tmp_path, monkeypatch):
    for module in "minijamba.assignment", "minijamba.checkpoint":
        monkeypatch.setattr(f"{module}.SHIPPED", tmp_path / "absent")
    with pytest.raises(ValueError, match="in the repository, not in the installed package; clone it"):
        write_assignment(tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_the_judge_knows_the_right_answer(solution):
    """What the judge changes to make a mistaken value is, unchanged, what minijamba computes."""
    with modules_of(solution, solution / "tests") as load, torch.no_grad(), use_rung("naive"):
        judge, first, mixers, blocks = map(load, ("judge", "test_1_scan", "test_5_mixer", "test_6_block"))
        given = first.inputs()
        decay = (given["delta"][..., None] * given["A"]).exp()
        pushed = (given["delta"] * given["x"])[..., None] * given["B"][:, :, None]
        y = first.recurrence(decay, pushed, given["C"], given["state"]) + given["D"] * given["x"]
        assert_matches(y, first.reference(**given)[0], 1e-12, "recurrence")
        own, x = judge.filled(Mamba(judge.CONFIG)), judge.draw(2, 9, judge.CONFIG.hidden_size)
        assert_matches(mixers.mamba_with(own, x), own(x, Layout()), 1e-12, "mamba_with")
        assert_matches(mixers.carried(own, x, [2, 1, 6], "window", "state"), own(x, Layout()), 1e-12, "carried")
        for i in range(judge.CONFIG.num_hidden_layers):
            own = judge.filled(Block(judge.CONFIG, i))
            stream, last, _ = own(x, None, Layout())

            def check(h, expected=stream + last, layer=i):
                assert_matches(h, expected, 1e-12, f"layer {layer}")

            check(blocks.layer(own, x))
            assert_rejects(check, *blocks.mistakes(own, x).values())


def test_functions_of_the_package_s_names_do_what_the_package_s_do(solution):
    torch.manual_seed(0)
    x, B, C = torch.randn(2, 7, 5), torch.randn(2, 7, 3), torch.randn(2, 7, 3)
    A, D, state = -torch.rand(5, 3), torch.randn(5), torch.randn(2, 5, 3)
    q, k, v, weight = torch.randn(2, 4, 6, 8), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 8), torch.randn(5, 4)
    both = {"state": state, "return_state": True}
    window = {"state": torch.randn(2, 3, 5), "return_state": True}
    calls = [
        ("scan", scan, "selective_scan", (x, x.exp(), A, B, C, D), both),
        ("scan", scan, "selective_scan", (x, x.exp(), A, B, C), {}),
        ("mixer", conv, "causal_conv", (x, weight, D), window),
        ("mixer", conv, "causal_conv", (x, weight), {}),
        ("router", moe, "route", (x, 2), {}),
        ("attention", attention, "attention", (q, k, v), {}),
    ]
    with modules_of(solution) as load:
        for file, theirs, name, arguments, options in calls:
            mine, theirs = (partial(getattr(module, name), **options) for module in (load(f"my_jamba.{file}"), theirs))
            expected = theirs(*arguments)

            def check(first, rest=arguments[1:], name=name, mine=mine, expected=expected):
                assert_matches(mine(first, *rest), expected, 1e-5, name)  # float32, sums of some dozens of terms

            check(arguments[0])
            assert_rejects(check, 2 * arguments[0])
        mine, theirs = load("my_jamba.mixer").RMSNorm(5, 0.1), norm.RMSNorm(5, 0.1)
        assert_matches(mine(x), theirs(x), 1e-6, "RMSNorm")


class Wrong(NamedTuple):
    """An answer that differs from the solution in one place, and words that a test tells its author.

    test: the part, and a word that only this test of the part has in its name.
    """

    test: str
    right: str
    wrong: str
    words: str


UPDATE = "    state = A_bar * state + (delta * x)[:, :, None] * B[:, None, :]\n"
READ = '    y = torch.einsum("b c n, b n -> b c", state, C)\n'
EXP = "torch.exp(delta[:, :, None] * A)"
SUM = "y.index_add(0, token, weights[token, choice, None].to(x.dtype) * expert(tokens[token]))"
PAIR = '"b s g p -> b s (g n) p"'
NORMS = "delta, B, C = self.dt_layernorm(delta), self.b_layernorm(B), self.c_layernorm(C)"
LAST = "self.lm_head(self.model.final_layernorm(h))"
ROUTE = "logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).topk(k, dim=-1)"
ROTATE = "__import__('minijamba.attention').attention.rotate"
TURNED = ", ".join(f"{ROTATE}({x}, torch.arange({x}.shape[1]), 1e4)" for x in "qk")
WRONG = [
    Wrong("1_scan hand", UPDATE + READ, READ + UPDATE, "read before it is updated"),
    Wrong("1_scan values", UPDATE + READ, READ + UPDATE, "read before it is updated: y_t reads state_t"),
    Wrong("1_scan values", "(delta * x)[:, :, None]", "x[:, :, None]", "without its step length"),
    Wrong("1_scan values", EXP, f"1 + {EXP[10:-1]}", "only the beginning of exp"),
    Wrong("1_scan values", EXP, "torch.exp(A)", "the decay forgets the step length"),
    Wrong("1_scan values", "else y + D * x)", "else y)", "skip connection D x_t is missing"),
    Wrong("1_scan values", "delta_t, A, B_t, C_t", "delta_t, A, C_t, B_t", "B and C are swapped"),
    Wrong("1_scan given", "if state is None:", "if True:", "the state that was given is ignored"),
    Wrong("1_scan given", "(y, state) if", "(y, 0 * state) if", "the returned state: error"),
    Wrong("1_scan given", "    state = A_bar", "    state[:] = A_bar", "writes into the state it was given"),
    Wrong("1_scan split", "if state is None:", "if True:", "each call starts from zeros"),
    Wrong("1_scan gradients", "state, C)\n", "state, C.detach())\n", "no gradient reaches C"),
    Wrong("1_scan wider", "dtype=torch.promote_types(x.dtype, torch.float32)", "", "needs float32"),
    Wrong("2_step one_token", UPDATE + READ, READ + UPDATE, "read before it is updated"),
    Wrong("2_step one_token", EXP, "torch.exp(-delta[:, :, None] * A)", "lets the state grow"),
    Wrong("2_step anew", "    state = A_bar", "    state[:] = A_bar", "a kept one would change"),
    Wrong("2_step anew", "    state = A_bar * state", "    state = state", "does not decay"),
    Wrong("2_step anew", "(delta * x)[:, :, None]", "x[:, :, None]", "without its step length"),
    Wrong("2_step row", "    state = A_bar * state", "    state = state", "the state never decays"),
    Wrong("3_router weights", ROUTE, "(lambda w, i: (w.softmax(-1), i))(*logits.topk(k))", "they sum to one"),
    Wrong("3_router weights", ROUTE, ROUTE.replace("softmax(-1", "softmax(0"), "softmax runs over the tokens"),
    Wrong("3_router wider", ROUTE, "logits.softmax(-1).topk(k)", "take the softmax in float32"),
    Wrong("3_router feed_forward", "F.silu(self.gate_proj(x)) *", "F.gelu(self.gate_proj(x)) *", "is gelu"),
    Wrong("3_router feed_forward", "F.silu(self.gate_proj(x)) *", "self.gate_proj(x) *", "silu is missing"),
    Wrong("3_router mixture", "weights[token, choice, None].to(x.dtype) * ", "", "without their weights"),
    Wrong("3_router mixture", SUM, SUM.replace("index_add", "index_copy"), "do not overwrite"),
    Wrong("3_router mixture", "indices == i)", "indices[:, :1] == i)", "only the first choice counts"),
    Wrong("3_router dropped", "torch.where(indices == i)", "torch.where(indices == i)\n"
        "            token, choice = token[:8], choice[:8]", "12 of 20 tokens get less"),
    Wrong("3_router learns", "weights[token", "weights.detach()[token", "no gradient reaches the router"),
    Wrong("4_attention values", ".masked_fill(~visible, -torch.inf)", "", "sees those after it"),
    Wrong("4_attention values", " / q.shape[-1] ** 0.5", "", "not divided by sqrt(p)"),
    Wrong("4_attention values", PAIR, PAIR.replace("(g n)", "(n g)"), "heads are paired in turns"),
    Wrong("4_attention last", ".tril(s - t)", ".tril()", "the queries are the last t of the s tokens"),
    Wrong("4_attention positions", "attention(q, k, v), ", f"attention({TURNED}, v), ", "rotary"),
    Wrong("4_attention split", "if cache is not None", "if False", "earlier calls are forgotten"),
    Wrong("4_attention heads", ", (k, v)\n", ", tuple(x.repeat_interleave(2, 2) for x in (k, v))\n",
        "repeat them later"),
    Wrong("5_mixer values_of", "weight[:, j]", "weight[:, -1 - j]", "taps are in reverse"),
    Wrong("5_mixer values_of", "F.silu(y if bias is None else y + bias)", "y + bias", "SiLU after"),
    Wrong("5_mixer values_of", "(0, 0, width - 1, 0)", "(0, 0, 0, width - 1)", "it looks ahead"),
    Wrong("5_mixer window", "if state is None else torch.cat([state, x], dim=1)", "", "starts with zeros"),
    Wrong("5_mixer window", "(y, inputs[:, steps:])", "(y, y[:, 1 - width :])", "it holds outputs"),
    Wrong("5_mixer norm", "wide.square().mean(", "wide.square().sum(", "not of their sum"),
    Wrong("5_mixer norm", "return self.weight * (", "return (", "the weight is left out"),
    Wrong("5_mixer first", "    return delta + torch.log(-torch.expm1(-delta))", "    return 0 * delta", "0.69"),
    Wrong("5_mixer first", "10 ** torch.empty(c).uniform_(-3, -1)", "torch.empty(c).uniform_(0.001, 0.1)",
        "log-uniform are half of them"),
    Wrong("5_mixer the_mixer", NORMS, "pass", "the inner norms are missing"),
    Wrong("5_mixer the_mixer", "y * F.silu(z)", "y * z", "multiply by silu(z)"),
    Wrong("5_mixer the_mixer", "x, z = self", "z, x = self", "x and z are swapped"),
    Wrong("5_mixer the_mixer", "F.softplus(self.dt_proj(delta))", "self.dt_proj(delta)", "softplus of delta"),
    Wrong("5_mixer split", "state=state, return_state=True)\n        return", "return_state=True)\n        return",
        "the state of the scan is forgotten"),
    Wrong("5_mixer split", "state=window, ", "", "the window of the convolution is forgotten"),
    Wrong("5_mixer split", "cache or (None, None)", "(None, None)", "window and state of the earlier calls"),
    Wrong("6_block schedule", "if index % config", "if (index + 1) % config", "it should hold"),
    Wrong("6_block schedule", "if e > 1 and", "if e == 1 and", "it should have 5"),
    Wrong("6_block values", "self.pre_ff_layernorm(h))", "self.input_layernorm(h))", "one norm serves twice"),
    Wrong("6_block values", "h = h + y", "h = y", "not added to what the mixer gives"),
    Wrong("6_block values", "return h + self.feed_forward", "return self.feed_forward", "the feed-forward gives"),
    Wrong("6_block split", "input_layernorm(h), cache)", "input_layernorm(h))", "does not reach the mixer"),
    Wrong("7_checkpoint loaded", "        model.load_state_dict(weights)\n", "", "random ones are still there"),
    Wrong("7_checkpoint values_of", LAST, "self.lm_head(h)", "final_layernorm is left out"),
    Wrong("7_checkpoint split", "block(h, past)", "block(h)", "the caches are forgotten between calls"),
    Wrong("7_checkpoint writes", "model(chosen[-1], cache)", "model(torch.cat([tokens, *chosen], dim=1))",
        "with the cache it needs"),
    Wrong("7_checkpoint writes", "torch.cat(chosen, dim=1)", "torch.cat([tokens, *chosen], dim=1)",
        "return the new tokens alone"),
    Wrong("7_checkpoint own", "import json\n", "import json\nimport minijamba\n", "imports ['minijamba']"),
]  # fmt: skip


def told(folder, tests, test):
    """What a test of the judge says of the my_jamba in `folder`: "passed", or its failure."""
    part, word = test.split()
    with modules_of(folder, tests) as load:
        found = [run for name, run in vars(load(f"test_{part}")).items() if name.startswith("test_") and word in name]
        assert len(found) == 1, f"{test} is the name of {len(found)} tests"
        try:
            found[0]()
        except AssertionError as error:
            return str(error)
        return "passed"


@pytest.mark.parametrize("part", PARTS)
def test_wrong_answers_are_told_the_idea(part, solution, tmp_path):
    def check(case):
        folder = Path(mkdtemp(dir=tmp_path))  # a new one for each: Python keeps what it has read by name and time
        shutil.copytree(solution / "my_jamba", folder / "my_jamba")
        file = folder / "my_jamba" / f"{PARTS[part]}.py"
        text = _read(file)
        assert text.count(case.right) == 1, f"the solution has not got once what is to be changed: {case}"
        file.write_text(text.replace(case.right, case.wrong), encoding="utf-8")
        said = told(folder, solution / "tests", case.test)
        assert case.words in said, f"{case}\nis told: {said}"

    cases = [case for case in WRONG if case.test.startswith(part)]
    for case in cases:
        check(case)
    assert len({case.wrong for case in cases}) >= 2
    assert_rejects(check, cases[0]._replace(wrong=cases[0].right), cases[0]._replace(words="another idea"))
