"""What nbval does not look at: that notebooks are stored as executed, that links between them lead somewhere, that each
exercise is whole, and that a name means the same in a notebook and in the package.

An exercise is a markdown cell with a heading "Exercise 1 · by hand · easy · 10 minutes" and a folded hint, a folded
cell with the check, a cell with the learner's turn that ends in `attempt`, and a folded solution. The notebook of the
same name in solutions/ runs all this: it holds the same solution, and at least two wrong answers with the words that
the check has for them.
"""

import ast
import copy
import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

import minijamba
from minijamba.testing import assert_rejects

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SOLVED = sorted((FOLDER / "solutions").glob("*.ipynb"))
PACKAGE = Path(minijamba.__file__).parent
HEADING = re.compile(
    r"^##+ Exercise (\d+) · (by hand|implement|find the bug) · (easy|medium|hard) · (\d+) minutes$", re.M
)
SOLUTION = re.compile(r"<details><summary>Solution</summary>\n\n.+```python\n(.*?)\n```\n\n</details>", re.DOTALL)
TIME = re.compile(
    r"\*\*Time\*\* \d+ minutes to read and run, (\d+) more for the exercises\. "
    r"\*\*Hardware\*\* any CPU, under a minute.*\. \*\*Before this\*\* .+"
)

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
each_page = pytest.mark.parametrize("path", NOTEBOOKS + SOLVED, ids=lambda path: "/".join(path.parts[-2:]))


def read(path) -> NotebookNode:
    return nbformat.read(path, 4)


def code_cells(notebook) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text(notebook) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def changed(notebook, change) -> NotebookNode:
    """A copy that `change` has spoiled."""
    spoiled = copy.deepcopy(notebook)
    change(spoiled)
    return spoiled


def check_stored(notebook):
    code = code_cells(notebook)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it from top to bottom"
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert max(len(cell.source.splitlines()) for cell in code) <= 35
    for output in outputs:
        if "image/png" in output.get("data", {}):
            described = output.metadata.get("image/png", {}).get("alt", "")
            assert len(described.split()) >= 8, f"a figure without a description: {output.data.get('text/plain')}"


@each_page
def test_is_stored_as_executed(path):
    notebook = read(path)
    check_stored(notebook)
    assert path.stat().st_size < 600_000
    assert_rejects(
        check_stored,
        changed(notebook, lambda spoiled: code_cells(spoiled)[0].update(execution_count=None)),
        changed(notebook, lambda spoiled: code_cells(spoiled)[-1].update(source="\n" * 36)),
    )


def test_a_figure_without_a_description_is_refused():
    picture = nbformat.v4.new_output("display_data", {"image/png": ""}, metadata={"image/png": {"alt": "A bar. " * 4}})
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("", outputs=[picture], execution_count=1)])
    check_stored(notebook)
    assert_rejects(check_stored, changed(notebook, lambda spoiled: spoiled.cells[0].outputs[0].metadata.clear()))


@each_page
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#:]+)\)", text(read(path)))
    assert links and all((path.parent / link).exists() for link in links), links


@each_notebook
def test_the_head_says_what_one_needs_to_know(path):
    def check(notebook):
        head, number = notebook.cells[0].source, path.stem[:2]
        assert re.match(rf"# {number} · .+\?\n", head), "the title is the number and the question"
        minutes = sum(int(found[3]) for found in HEADING.findall(text(notebook)))
        assert int(TIME.search(head)[1]) == minutes, f"the exercises take {minutes} minutes"
        place = NOTEBOOKS.index(path)
        around = NOTEBOOKS[max(0, place - 1) : place] + NOTEBOOKS[place + 1 : place + 2]
        way = head.strip().splitlines()[-1]
        found = re.findall(r"\]\(([^)]+)\)", way)
        assert set(found) == {"README.md", "../docs/glossary.md"} | {near.name for near in around}, way
        assert "<summary>Symbols: the paper's and the code's</summary>" in text(notebook)

    notebook = read(path)
    check(notebook)
    head = notebook.cells[0].source
    wrong = [head.replace(" more for", "1 more for"), head.replace("?", "", 1), head.rsplit("\n", 1)[0]]
    for source in wrong:
        assert_rejects(check, changed(notebook, lambda spoiled, source=source: spoiled.cells[0].update(source=source)))


def test_the_syllabus_says_what_the_heads_say():
    def check(syllabus):
        for path in NOTEBOOKS:
            head, number = read(path).cells[0].source, path.stem[:2]
            question = head.split("\n")[0].removeprefix(f"# {number} · ")
            minutes = re.search(r"\*\*Time\*\* (\d+) .*? (\d+) more", head)
            (row,) = [line for line in syllabus.splitlines() if line.startswith(f"| [{number}]({path.name}) |")]
            assert f"| {question} |" in row and f"| {minutes[1]} + {minutes[2]} |" in row, row

    syllabus = (FOLDER / "README.md").read_text(encoding="utf-8")
    check(syllabus)
    assert_rejects(check, syllabus.replace("40 + 25", "40 + 20"), syllabus.replace("in a Jamba?", "in a jamba?"))


def exercises(notebook) -> list[dict[str, str]]:
    """Heading, check, turn and solution of each exercise: four cells in a row."""
    found = []
    for i, cell in enumerate(notebook.cells):
        heading = HEADING.search(cell.source) if cell.cell_type == "markdown" else None
        if heading is None:
            continue
        statement, check, turn, solution = notebook.cells[i : i + 4]
        assert "<summary>Hint</summary>" in statement.source, f"{heading[0]}: no hint"
        assert check.metadata.get("tags") == ["hide-input"] and check.metadata.jupyter.source_hidden, heading[0]
        assert turn.metadata.get("tags") == ["exercise"] and turn.source.startswith("# Your turn\n"), heading[0]
        assert SOLUTION.search(solution.source), f"{heading[0]}: no folded solution"
        assert [output.text for output in turn.outputs][-1].endswith(f"Exercise {heading[1]}: not attempted yet\n")
        found.append(
            {
                "heading": heading[0].lstrip("# "),
                "kind": heading[2],
                "attempt": turn.source.splitlines()[-1],
                "solution": SOLUTION.search(solution.source)[1],
            }
        )
    return found


@each_notebook
def test_exercises_are_whole_and_solved(path):
    def check(notebook, solved):
        wanted = exercises(notebook)
        assert {"by hand", "implement", "find the bug"} <= {one["kind"] for one in wanted}
        numbers = [int(re.search(r"\d+", one["heading"])[0]) for one in wanted]
        assert numbers == list(range(1, len(wanted) + 1))
        parts = re.split(r"^## (?=Exercise)", "\n".join(cell.source for cell in solved.cells), flags=re.M)[1:]
        assert len(parts) == len(wanted)
        for one, part in zip(wanted, parts, strict=True):
            assert part.startswith(one["heading"] + "\n\n**Teaches:** "), one["heading"]
            assert f"{one['solution']}\n\n\n{one['attempt']}" in part, f"{one['heading']}: another solution"
            judge = re.search(r"(\w+)\)$", one["attempt"])[1]
            judges = explained(code_of(solved, one["heading"]))
            assert judges.keys() == {judge}, f"{one['heading']}: no wrong answers for {judge}"
            assert len(judges[judge]) >= 2 and all(len(words) >= 12 for words in judges[judge]), "say what is wrong"
        said = [output.text for cell in code_cells(solved) for output in cell.outputs if "text" in output]
        assert sum(line.endswith(": correct\n") for line in said) == len(wanted)

    notebook, solved = read(path), read(path.parent / "solutions" / path.name)
    check(notebook, solved)

    def without_its_last_exercise(spoiled):
        del spoiled.cells[-2:]

    def without_a_hint(spoiled):
        cell = next(cell for cell in spoiled.cells if HEADING.search(cell.source))
        cell.source = cell.source.replace("Hint", "Aside")

    assert_rejects(lambda spoiled: check(notebook, spoiled), changed(solved, without_its_last_exercise))
    assert_rejects(lambda spoiled: check(spoiled, solved), changed(notebook, without_a_hint))


def explained(sources) -> dict[str, list[str]]:
    """Check -> the words for wrong answers, of the calls of `assert_explains`."""
    calls = [call for source in sources for call in ast.walk(ast.parse(source)) if isinstance(call, ast.Call)]
    calls = [call.args for call in calls if getattr(call.func, "attr", "") == "assert_explains"]
    return {check.id: [words.value for words in wrong.values] for check, wrong in calls}


def code_of(solved, heading) -> list[str]:
    """The sources of the code cells under a heading of a solutions notebook."""
    sources, here = [], False
    for cell in solved.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            here = heading in cell.source
        elif cell.cell_type == "code" and here:
            sources.append(cell.source)
    return sources


def names(source, context) -> set[str]:
    """Names that a cell binds (ast.Store) or reads (ast.Load)."""
    source = "\n".join(line for line in source.splitlines() if line[:1] not in "%!")
    tree = ast.parse(source)
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, context)}
    if context is ast.Store:
        defined = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef))
        found |= {node.name for node in defined}
    return found


@each_notebook
def test_no_cell_needs_one_that_needs_a_gpu(path):
    def check(notebook):
        only_there = set()
        for cell in code_cells(notebook):
            if "gpu" in cell.metadata.get("tags", []):
                only_there |= names(cell.source, ast.Store)
            else:
                missing = names(cell.source, ast.Load) & only_there - names(cell.source, ast.Store)
                assert not missing, f"{missing} come from a cell that runs on a GPU only"
                only_there -= names(cell.source, ast.Store)

    notebook = read(path)
    check(notebook)
    used = next(cell for cell in code_cells(notebook)[1:] if names(cell.source, ast.Load))
    needs = sorted(names(used.source, ast.Load) - names(used.source, ast.Store))[0]
    gpu = nbformat.v4.new_code_cell(f"{needs} = 1", metadata={"tags": ["gpu"]})
    place = notebook.cells.index(used)
    assert_rejects(check, changed(notebook, lambda spoiled: spoiled.cells.insert(place, gpu)))


def definitions(source) -> dict[str, str]:
    """Function or class -> its code, without docstring, annotations and decorators' line breaks."""
    source = "\n".join(line for line in source.splitlines() if line[:1] not in "%!")
    return {
        node.name: bare(node) for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


def bare(node) -> str:
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef):
            part.returns = None
        if isinstance(part, ast.arg):
            part.annotation = None
        if isinstance(part, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(part) is not None:
            part.body = part.body[1:] or [ast.Pass()]
    return ast.unparse(node)


def of_the_package() -> dict[str, set[str]]:
    """Without what stands in for other programs: the student's package, and adapters."""
    found = {}
    for path in [path for path in PACKAGE.rglob("*.py") if not {"template", "adapters"} & {*path.parts}]:
        for name, code in definitions(path.read_text(encoding="utf-8")).items():
            found.setdefault(name, set()).add(code)
    return found


@each_page
def test_no_name_means_one_thing_here_and_another_in_the_package(path):
    ours = of_the_package()

    def check(sources):
        for source in sources:
            for name, code in definitions(source).items():
                assert code in ours.get(name, {code}), f"{name} is another function in the package: rename it here"

    check([cell.source for cell in code_cells(read(path))])
    assert_rejects(check, ["def selective_scan(x):\n    return x"])
