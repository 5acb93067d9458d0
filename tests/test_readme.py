"""The README says what is true: its example runs, its lines are the ones CI runs, its figures are the measured ones."""

import contextlib
import io
import re
import subprocess
from pathlib import Path

from minijamba.testing import assert_rejects

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_the_example_prints_what_the_readme_shows():
    def check(code):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, {})
        assert printed.getvalue() == shown

    (code,), (shown,) = blocks("python"), blocks("text")
    check(code)
    assert_rejects(check, code + "print()\n", "")


def test_ci_runs_the_second_line():
    shown = subprocess.run([ROOT / ".ci" / "run", "--show"], capture_output=True, text=True, check=True)
    tour, tests = blocks("bash")
    assert shown.stdout == tests and "minijamba tour" in tour
    assert "pytest" in tests and "--nbval " in tests and "skip" not in tests


def test_every_notebook_and_module_is_listed():
    for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"):
        assert path.name in README
    for path in (ROOT / "minijamba").iterdir():
        if path.name[0] != "_":
            assert f"`{path.stem}`" in README or f"`{path.name}`" in README, f"{path.name} has no line"
