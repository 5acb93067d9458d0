"""What nbval does not look at: that notebooks are stored as executed, that the links between them lead somewhere, and
that every exercise accepts its folded solution and rejects a typical wrong answer.

An exercise is a code cell that ends in a call of `attempt`. Its solution is the python block folded in a markdown cell
beside it, in the same order. Wrong answers stand in the cell, under `assert_rejects`, or in its metadata, as sources
under "wrong_answers".
"""

import contextlib
import io
import linecache
import re
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest
import torch

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SOLUTION = re.compile(r"<summary>Solution</summary>.*?```python\n(.*?)```", re.DOTALL)

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture
def torch_as_it_was():
    """Notebooks set torch's defaults, which other tests in this process must not see."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    with torch.enable_grad(), torch.random.fork_rng():
        yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    plt.close("all")


def cells(path, kind):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == kind]


def test_is_stored_as_executed(path):
    code = cells(path, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it from top to bottom"
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert max(len(cell.source.splitlines()) for cell in code) <= 35
    assert path.stat().st_size < 600_000


def test_links_lead_somewhere(path):
    text = "\n".join(cell.source for cell in cells(path, "markdown"))
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert links and all((FOLDER / link).exists() for link in links), links


def test_solutions_pass_and_wrong_answers_fail(path, monkeypatch, torch_as_it_was):
    matplotlib.use("agg")
    monkeypatch.chdir(FOLDER)
    solutions = SOLUTION.findall("\n".join(cell.source for cell in cells(path, "markdown")))
    scope, found = {"display": print}, 0
    for cell in cells(path, "code"):
        run(cell.source, scope)
        *_, attempt = cell.source.splitlines()
        if "attempt(" not in attempt:
            continue
        assert run(f"{solutions[found]}\n{attempt}", dict(scope)).endswith(": correct\n"), attempt
        wrong_answers = cell.metadata.get("wrong_answers", [])
        assert wrong_answers or "assert_rejects(" in cell.source, f"{attempt}: no wrong answer to reject"
        for wrong in wrong_answers:
            with pytest.raises(AssertionError):
                run(f"{wrong}\n{attempt}", dict(scope))
        found += 1
    assert found == len(solutions) >= 3


def run(source, scope) -> str:
    """Run a cell's source in the scope; return what it printed."""
    name = f"cell {hash(source)}"
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name  # Triton compiles from the source
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(source, name, "exec"), scope)
    return printed.getvalue()
