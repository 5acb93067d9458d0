"""The README says what is true: its example runs, its lines are the ones CI runs, its figures are the measured ones."""

import contextlib
import io
import json
import re
import subprocess
import tomllib
from pathlib import Path

from minijamba import plots, preset
from minijamba.bench.summary import jamba_table
from minijamba.conformance import table
from minijamba.testing import assert_rejects

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
MEASUREMENTS = ROOT / "data" / "measurements"


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


def test_ci_runs_the_lines_that_test():
    shown = subprocess.run([ROOT / ".ci" / "run", "--show"], capture_output=True, text=True, check=True)
    tour, tests, browser, oldest = blocks("bash")
    assert shown.stdout == browser + tests + oldest and "minijamba tour" in tour and "chromium" in browser
    assert "pytest" in tests and "--nbval " in tests and "skip" not in tests
    needed = next(need for need in tomllib.loads(PYPROJECT)["project"]["dependencies"] if need.startswith("torch"))
    assert re.search(r"torch>=([\d.]+)", needed)[1] == re.search(r"torch==([\d.]+)\.\*", oldest)[1]


def figures(measurement):
    """(measure, batch, steps) -> side -> milliseconds or bytes."""
    found = {}
    for row in measurement["rows"]:
        case = row["measure"], row.get("batch", measurement.get("batch")), row["steps"]
        found.setdefault(case, {})[row["side"]] = row.get("milliseconds", row.get("bytes"))
    return found


def claim_about_scan_cpu(measurement):
    def against_the_best(*case):
        ours = sides[case]["minijamba parallel"]
        return ours, min(figure for side, figure in sides[case].items() if "minijamba" not in side) / ours

    sides = figures(measurement)
    (milliseconds, speed), (_, memory) = against_the_best("forward", 1, 2048), against_the_best("peak memory", 1, 8192)
    return (
        f"{measurement['device']}, {measurement['threads']} threads: a scan over 2048 steps takes "
        f"{milliseconds:.1f} ms, the best of the others {speed:.1f} times that; over 8192 steps they need "
        f"at least {int(memory)} times the memory."
    )


def claim_about_scan_cuda(measurement):
    ours, times = beside(measurement, "mamba-ssm")
    training = "forward + backward in a row"
    return (
        f"{measurement['device']}: a scan over 262144 steps takes {ours('forward', 1, 262144):.1f} ms, mamba-ssm's "
        f"kernel {times('forward', 1, 262144)} times that. In calls one after the other, as a model makes them, it "
        f"takes {times('forward in a row', 1, 2048)} times as long over 2048 steps, and with gradients "
        f"{times(training, 1, 32768)} times over 32768 and {times(training, 1, 2048)} times over 2048; in a single "
        f"call on an idle GPU {times('forward', 1, 2048)} times over 2048. With gradients over 32768 steps it needs "
        f"{times('peak memory of forward + backward', 1, 32768)} times our memory."
    )


def claim_about_conv_cuda(measurement):
    ours, times = beside(measurement, "causal-conv1d, channel last")
    return (
        f"{measurement['device']}: a convolution over 32768 steps takes {ours('forward', 1, 32768):.2f} ms, "
        f"causal-conv1d's kernel for the same layout {times('forward', 1, 32768)} times that; with gradients "
        f"{times('forward + backward', 1, 32768)} times."
    )


def claim_about_mixer_cuda(measurement):
    ours, times = beside(measurement, "transformers, mamba-ssm, causal-conv1d")
    step = "decode step in a row"
    return (
        f"{measurement['device']}: a Mamba mixer over 8192 tokens takes {ours('forward', 1, 8192):.1f} ms, "
        f"transformers' with mamba-ssm and causal-conv1d {times('forward', 1, 8192)} times that; one more token "
        f"{times(step, 1, 64)} times, in a batch of 64 {times(step, 64, 64)} times."
    )


def claim_about_train_cuda(measurement):
    def claim(name):
        ours, theirs = (row for row in measurement["rows"] if row["measure"].endswith(name))
        assert (ours["side"], theirs["side"]) == ("minijamba", "transformers, mamba-ssm, causal-conv1d")
        speed, memory = theirs["milliseconds"] / ours["milliseconds"], theirs["bytes"] / ours["bytes"]
        return (
            f"{ours['sizes']['num_hidden_layers']} layers of width {ours['sizes']['hidden_size']}, {ours['batch']} x "
            f"{ours['steps']} tokens) takes {ours['milliseconds']:.1f} ms, which is {ours['tokens_per_second']:,.0f} "
            f"tokens a second, and transformers' with mamba-ssm and causal-conv1d {speed:.1f} times as long with "
            f"{memory:.1f} times our memory"
        )

    experts = measurement["rows"][-1]["sizes"]["num_experts"]
    return (
        f"{measurement['device']}: a training step of a hybrid without experts ({claim('dense hybrid')}; a step of a "
        f"hybrid with {experts} experts ({claim('MoE hybrid')}."
    )


def beside(measurement, peer):
    """Our figure of a case, and how many times that the peer's is, as text."""
    sides = figures(measurement)

    def ours(*case):
        return sides[case]["minijamba fused"]

    return ours, lambda *case: f"{sides[case][peer] / ours(*case):.1f}"


CLAIMS = {
    "scan_cuda": claim_about_scan_cuda,
    "conv_cuda": claim_about_conv_cuda,
    "mixer_cuda": claim_about_mixer_cuda,
    "train_cuda": claim_about_train_cuda,
    "scan_cpu": claim_about_scan_cpu,
}


def test_speeds_are_the_measured_ones():
    def check(text):
        records = {name: MEASUREMENTS / f"{name}.json" for name in CLAIMS}
        claims = [
            CLAIMS[name](json.loads(path.read_text(encoding="utf-8")))
            for name, path in records.items()
            if path.exists()
        ]
        assert claims == re.findall(r"^- (.* ms, .*)$", text, flags=re.MULTILINE), claims

    check(README)
    assert_rejects(check, README + "- This CPU: a scan takes 1.0 ms, the others 99 times that.\n")


def test_the_table_of_the_large_model_is_the_recorded_one():
    def check(text):
        shown = re.search(r"<!-- summary -->\n(.*?)\n<!-- end -->", text, flags=re.DOTALL)[1]
        assert shown == jamba_table(), jamba_table()

    check(README)
    assert_rejects(check, re.sub(r"(written a second, batch 1, .*? \| )(\d)", r"\g<1>9\2", README))


def test_the_report_on_three_implementations_is_the_recorded_one():
    def check(text):
        shown = re.search(r"<!-- conformance -->\n(.*?)\n<!-- end conformance -->", text, flags=re.DOTALL)[1]
        assert shown == table(json.loads((MEASUREMENTS / "conformance_cpu.json").read_text(encoding="utf-8")))

    check(README)
    assert_rejects(check, README.replace("**fails**", "holds", 1))


def test_the_figure_is_in_words_too():
    (alt, file) = re.search(r"^!\[(.*)\]\((.*)\)$", README, flags=re.MULTILINE).groups()
    assert (ROOT / file).is_file()
    assert alt == plots.schedule_strip(preset("jamba-v0.1")).alt != plots.schedule_strip(preset("tiny")).alt


def test_a_claim_compares_ours_with_the_peer():
    def row(measure, batch, steps, side, milliseconds):
        return {"measure": measure, "batch": batch, "steps": steps, "side": side, "milliseconds": milliseconds}

    cases = [("forward", 1, 32768), ("forward + backward", 1, 32768)]
    rows = [row(*case, "minijamba fused", 0.5) for case in cases]
    rows += [row(*case, "causal-conv1d, channel last", 1.2) for case in cases]

    def check(rows):
        assert claim_about_conv_cuda({"device": "Abacus", "rows": rows}) == (
            "Abacus: a convolution over 32768 steps takes 0.50 ms, causal-conv1d's kernel for the same layout "
            "2.4 times that; with gradients 2.4 times."
        )

    check(rows)
    assert_rejects(check, [{**row, "milliseconds": 1 / row["milliseconds"]} for row in rows])


def test_every_notebook_and_module_is_listed():
    for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"):
        assert path.name in README
    for path in (ROOT / "minijamba").iterdir():
        if path.name[0] != "_":
            assert f"`{path.stem}`" in README or f"`{path.name}`" in README, f"{path.name} has no line"
