"""A stub that nobody has touched is "not attempted", and the points stand at the end."""

from pathlib import Path

import pytest
import torch

from minijamba import testing

testing.__tracebackhide__ = True  # a failure shows the line of the test and the words, not how they were found
torch.set_num_threads(1)  # the tensors are tiny: a second thread would only wait for the first


def pytest_collection_modifyitems(items):
    for item in items:
        item.user_properties.append(("points", item.function.points))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except NotImplementedError as error:
        if error.args:  # not a stub's, but torch's, which says what it cannot do
            raise
        pytest.skip("not attempted")


def pytest_terminal_summary(terminalreporter):
    earned, possible, tried = {}, {}, set()
    for outcome in ("passed", "failed", "skipped", "error"):
        for report in terminalreporter.getreports(outcome):
            if not hasattr(report, "user_properties"):
                continue  # a file that could not be read
            part, points = Path(report.fspath).stem.removeprefix("test_"), dict(report.user_properties)["points"]
            possible[part] = possible.get(part, 0) + points
            earned[part] = earned.get(part, 0) + points * (outcome == "passed")
            tried |= {part} if outcome != "skipped" else set()
    if not possible:
        return
    terminalreporter.section("points")
    for part in sorted(possible):
        said = f"{earned[part]:3} of {possible[part]}" if part in tried else "not attempted"
        terminalreporter.write_line(f"{part.replace('_', ' '):<16}{said}")
    terminalreporter.write_line(f"{'together':<16}{sum(earned.values()):3} of {sum(possible.values())}")
