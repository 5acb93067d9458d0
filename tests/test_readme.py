"""The README says what is true: its example runs, its lines are the ones CI runs, its figures are the measured ones."""

import contextlib
import io
import json
import re
import subprocess
from pathlib import Path

from minijamba.testing import assert_rejects

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MEASUREMENTS = sorted((ROOT / "data" / "measurements").glob("scan_*.json"))


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


def scan_claim(measurement):
    """The sentence that a recorded scan measurement allows."""
    figures = {}
    for row in measurement["rows"]:
        sides = figures.setdefault((row["measure"], row["steps"]), {})
        sides[row["side"]] = row["bytes"] if "bytes" in row else row["milliseconds"]

    def against_the_best(*measure):
        ours = figures[measure]["minijamba parallel"]
        return ours, min(figure for side, figure in figures[measure].items() if "minijamba" not in side) / ours

    (milliseconds, speed), (_, memory) = against_the_best("forward", 2048), against_the_best("peak memory", 8192)
    return (
        f"{measurement['device']}, {measurement['threads']} threads: a scan over 2048 steps takes "
        f"{milliseconds:.1f} ms, the best of the others {speed:.1f} times that; over 8192 steps they need "
        f"at least {int(memory)} times the memory."
    )


def test_speeds_are_the_measured_ones():
    def check(text):
        claims = [scan_claim(json.loads(path.read_text(encoding="utf-8"))) for path in MEASUREMENTS]
        assert claims == re.findall(r"^- (.* ms, .*)$", text, flags=re.MULTILINE), claims

    check(README)
    assert_rejects(check, README + "- This CPU: a scan takes 1.0 ms, the others 99 times that.\n")


def test_every_notebook_and_module_is_listed():
    for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"):
        assert path.name in README
    for path in (ROOT / "minijamba").iterdir():
        if path.name[0] != "_":
            assert f"`{path.stem}`" in README or f"`{path.name}`" in README, f"{path.name} has no line"
