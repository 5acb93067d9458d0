import argparse
import json
import os
import subprocess
import sys
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from minijamba import bench, cli
from minijamba.bench import measure, mixer, records, scan, train
from minijamba.bench.apart import apart
from minijamba.bench.measure import Run, Setting, Side
from minijamba.testing import assert_matches, assert_rejects

CPU = torch.device("cpu")
SIZES = {
    "scan": {"channels": 8, "states": 4},
    "conv": {"channels": 8, "width": 3},
    "mixer": {"hidden": 16, "states": 4, "rank": 3, "width": 4},
}
OURS = ["minijamba parallel", "minijamba naive"]
SIDES = {
    "scan": [*OURS, "mambapy", "transformers", "transformers, mambapy"],
    "conv": [*OURS, "torch"],
    "mixer": [*OURS, "transformers without kernels"],
}
CASES = {
    "scan": {"forward": [(2, 16), (1, 32)], "forward + backward": [(2, 16)]},
    "conv": {"forward": [(2, 16)], "forward in a row": [(2, 16)], "forward + backward": [(1, 2)]},
    "mixer": {"forward": [(2, 9)], "decode step": [(3, 2)], "decode step in a row": [(1, 5)]},
}


def setting(component):
    return Setting(CPU, torch.float32, SIZES[component])


def sides_of(component, names=None, at=None):
    at = at or setting(component)
    sides, left_out = measure.available(bench.COMPONENTS[component], names or SIDES[component], at)
    assert not left_out
    return sides


def run_of(component, sides=None, repeats=2):
    return Run(bench.COMPONENTS[component], setting(component), sides or sides_of(component), repeats, {}, {})


def measured_by(words):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(words))


@pytest.fixture(scope="module", params=bench.COMPONENTS)
def measured(request, tmp_path_factory):
    """The record of a tiny run, asked for as on the command line."""
    name, path = request.param, tmp_path_factory.mktemp("measurements") / "record.json"
    words = [name, "--device", "cpu", "--repeats", "2", "--output", str(path), "--sides", *SIDES[name]]
    for size, value in SIZES[name].items():
        words += [f"--{size}", str(value)]
    for kind, cases in CASES[name].items():
        words += ["--measure", kind, *(f"{batch}x{steps}" for batch, steps in cases)]
    assert measured_by(words) == 0
    return json.loads(path.read_text())


def component_of(measured):
    return measured["name"].removesuffix("_cpu")


def test_the_record_says_how_it_was_made(measured):
    def check(measured):
        assert measured["dtype"] == "float32" and measured["repeats"] == 2 and measured["left_out"] == {}
        assert measured["device"] and measured["threads"] == torch.get_num_threads()
        assert measured["versions"]["torch"] == version("torch")
        assert {"transformers", "mambapy"} <= measured["versions"].keys()
        assert measured["command"].split()[0] == "minijamba" and measured["date"].endswith("UTC")
        assert "commit" in measured and SIZES[component_of(measured)].items() <= measured.items()

    check(measured)
    assert_rejects(check, measured | {"threads": 0}, measured | {"states": 9, "width": 9}, measured | {"device": ""})


def test_every_side_is_measured_everywhere(measured):
    name = component_of(measured)

    def check(rows):
        seen = {(row["measure"], row["batch"], row["steps"], row["side"]) for row in rows}
        columns = [(kind, *case) for kind, cases in CASES[name].items() for case in cases]
        assert seen == {(*column, side) for column in columns for side in SIDES[name]} and len(rows) == len(seen)
        for row in rows:
            assert 0 < row["fastest"] <= row["milliseconds"] <= row["slowest"] and "ran" not in row

    check(measured["rows"])
    swapped = [row | {"fastest": row.get("slowest"), "slowest": row.get("fastest")} for row in measured["rows"]]
    assert_rejects(check, measured["rows"][1:], measured["rows"] + measured["rows"][:1], swapped)


@pytest.mark.parametrize("component", bench.COMPONENTS)
def test_sides_do_the_same_work(component):
    """Results and gradients against the definition in float64; float32 rounds some tens of terms."""

    def check(sides):
        rows = list(measure.errors(measure.forward_backward, run_of(component, sides), 2, 20))
        names = ["y", *(f"the gradient of {name}" for name in run_of(component, sides).arguments(1, 1))]
        assert [row["measure"] for row in rows] == [f"error of {name}" for name in names] * len(sides)
        for row in rows:
            assert 0 < row["error"] < 2e-6, row

    sides = sides_of(component)
    check(sides)
    assert_rejects(check, [Side("wrong", lambda x, *rest: sides[0].run(1.001 * x, *rest))])


def test_the_mixers_hold_equal_numbers_in_every_dtype():
    def check(weights):
        for weight in weights:
            assert torch.equal(weight, weight.bfloat16().float())

    rounded = Setting(CPU, torch.bfloat16, SIZES["mixer"])
    check(mixer.mamba(rounded).parameters())
    assert_rejects(check, mixer.mamba(setting("mixer")).parameters())
    run = Run(bench.COMPONENTS["mixer"], rounded, sides_of("mixer", [OURS[0], mixer.LOOP], rounded), 1, {}, {})
    for name, weight in run.sides[1].run.named_parameters():
        assert torch.equal(weight.float(), mixer.mamba(rounded).get_parameter(name))
    assert [row["side"] for row in measure.times(measure.decode, measure.alone, run, 2, 7)] == [OURS[0], mixer.LOOP]


def test_decoding_continues_the_prompt():
    def check(forget):
        for side in sides_of("mixer"):
            x = run_of("mixer").arguments(2, 6)["x"]
            whole = side.run(torch.cat([x, x[:, :1]], dim=1))[:, -1:]
            step = measure.decode(side, [x[:, 2:] if forget else x])
            assert_matches(step()[0], whole, 1e-5, side.name)

    check(forget=False)
    assert_rejects(check, True)


def test_a_side_that_computes_something_else_is_no_side(tmp_path):
    (good,) = sides_of("scan", OURS[:1])
    halved = Side("wrong", lambda *arguments: 0.5 * good.run(*arguments))

    def gradient_halved(x, *rest):
        return good.run(0.5 * x + 0.5 * x.detach(), *rest)

    def gradient_nan(x, delta, A, B, C, D, *rest):
        return good.run(x, delta, A, B, C, torch.where(D == 1, D, (D - 1).sqrt()), *rest)

    work = measure.forward_backward
    wrong = [(halved, "5.0e-01"), (Side("wrong", gradient_halved), "5.0e-01"), (Side("wrong", gradient_nan), "nan")]
    for side, error in wrong:
        with pytest.raises(RuntimeError, match=rf"wrong differs from minijamba parallel by {error}"):
            measure.ready(run_of("scan", [good, side]), work, list(run_of("scan").arguments(1, 16).values()))
    with (
        patch.object(bench, "available", lambda *_: ([good, halved], {})),
        pytest.raises(RuntimeError, match="the times would mean nothing"),
    ):
        bench.bench("scan", "cpu", measure={"forward": [(1, 16)]}, output=tmp_path / "scan.json")
    assert not list(tmp_path.iterdir())


def test_peers_that_are_not_installed_are_left_out_and_the_record_says_so(tmp_path, capsys):
    names = ["minijamba parallel", "minijamba fused", "mambapy", "mamba-ssm"]
    missing = dict.fromkeys(["mambapy", "mambapy.mamba", "mamba_ssm"])
    with (
        patch.dict("sys.modules", missing),
        patch.object(scan, "why_no_kernels", lambda device: f"no kernels on a {device}"),
    ):
        path = bench.bench(
            "scan", "cpu", sides=names, measure={"forward": [(1, 4)]}, repeats=1, output=tmp_path / "a", **SIZES["scan"]
        )
    measured = json.loads(path.read_text())
    assert {row["side"] for row in measured["rows"]} == {"minijamba parallel"}
    assert measured["left_out"].keys() == set(names[1:])
    assert measured["left_out"]["minijamba fused"] == "no kernels on a cpu"
    assert "left out: minijamba fused: no kernels on a cpu" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("scan --device cpu --sides nobody", "no side 'nobody'"),
        ("scan --device cpu --measure forwards 1x2", "no measure 'forwards'"),
        ("scan --device cpu --measure forward 2048", "'2048' is no case"),
        ("conv --device cpu --measure decode 1x2", "no measure 'decode'"),
        ("mixer --device meta", "no device 'meta'"),
    ],
)
def test_what_does_not_exist_is_refused(words, reason):
    with pytest.raises(ValueError, match=reason):
        measured_by(words.split())


def test_every_plan_can_be_asked_for():
    for component in bench.COMPONENTS.values():
        for plan in component.plans.values():
            assert set(plan.sides) <= component.sides.keys() and plan.cases.keys() <= set(component.measures)
    assert "decode step" not in bench.COMPONENTS["scan"].measures
    assert "floor of forward" not in bench.COMPONENTS["mixer"].measures


# A peer's kernels must run where the name says so, and nowhere else.

KERNELS = {
    "mamba_ssm/__init__.py": "",
    "mamba_ssm/ops/__init__.py": "",
    "mamba_ssm/ops/selective_scan_interface.py": """
from minijamba import scan
def selective_scan_fn(u, dt, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    return scan.selective_scan_fn(u, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
""",
    "mamba_ssm/ops/triton/__init__.py": "",
    "mamba_ssm/ops/triton/selective_state_update.py": """
from minijamba import scan
def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    return scan.selective_step(state, x, dt, A, B, C, D, z, delta_bias=dt_bias, delta_softplus=dt_softplus)
""",
    "causal_conv1d/__init__.py": """
import torch, minijamba.conv
def causal_conv1d_fn(x, weight, bias=None, activation=None):
    return minijamba.conv.causal_conv(x.mT, weight, bias).mT
def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None):
    window = torch.cat([conv_state, x], dim=2)
    conv_state.copy_(window[:, :, 1:])
    return causal_conv1d_fn(window, weight, bias)[:, :, -1:]
""",
}


def test_transformers_takes_the_kernels_and_the_record_shows_it(tmp_path):
    """With stand-ins for both packages, in a process of its own: transformers chooses when it is imported."""
    for name, code in KERNELS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code)
    path = tmp_path / "record.json"
    code = f"""
from pathlib import Path
from minijamba.bench import bench
cases = {{"forward": [(2, 9)], "decode step": [(2, 3)]}}
for peer in {mixer.KERNELS!r}, {mixer.LOOP!r}:
    bench(
        "mixer", "cpu", sides=[{OURS[0]!r}, peer], measure=cases, repeats=1, output=Path({str(path)!r}),
        **{SIZES["mixer"]},
    )
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    found = f"{mixer.LOOP} should run functions of no peer's package and ran those of causal_conv1d, mamba_ssm"
    assert found in done.stderr, done.stderr
    ran = {(row["side"], row["measure"]): row.get("ran") for row in json.loads(path.read_text())["rows"]}
    prefill = ["causal_conv1d.causal_conv1d_fn", "mamba_ssm.selective_scan_fn"]
    step = ["causal_conv1d.causal_conv1d_update", "mamba_ssm.selective_state_update"]
    assert ran == {
        (OURS[0], "forward"): None,
        (OURS[0], "decode step"): None,
        (mixer.KERNELS, "forward"): prefill,
        (mixer.KERNELS, "decode step"): sorted(prefill + step),
    }


def test_a_side_must_run_the_package_that_it_names():
    (own,) = sides_of("scan", OURS[:1])
    scope = {"__name__": "mamba_ssm.ops", "own": own}
    exec("def selective_scan_fn(*arguments):\n    return own.run(*arguments)", scope)
    arguments = list(run_of("scan").arguments(1, 3).values())

    def check(side):
        with patch.dict("sys.modules", mamba_ssm=sys):
            return measure._first_call(side, measure.forward, arguments)[2]

    peer = Side("peer", scope["selective_scan_fn"], packages=frozenset({"mamba_ssm"}))
    assert check(peer) == ["mamba_ssm.selective_scan_fn"] and check(own) == []
    assert sys.getprofile() is None
    for wrong in Side("peer", own.run, packages=peer.packages), Side("ours", peer.run):
        with pytest.raises(RuntimeError, match="should run functions of"):
            check(wrong)


# What needs a GPU, as far as it can be seen without.


def test_floors_are_amounts_over_rates():
    """At the widths and lengths of Jamba, on an H200: 4.0 ms for the bytes and 8.2 ms for the exponentials."""
    wide = Setting(CPU, torch.bfloat16, {"channels": 8192, "states": 16})
    rates = {"bytes_per_second": 4.3e12, "exponentials_per_second": 132 * 16 * 1.98e9}

    def check(rates):
        run = Run(bench.COMPONENTS["scan"], wide, [], 1, rates, {})
        floors = {row["side"]: row["milliseconds"] for row in measure.floors(run, 1, 262144)}
        assert floors == {"floor of bytes": pytest.approx(4.0, 0.01), "floor of exponentials": pytest.approx(8.2, 0.01)}

    check(rates)
    assert_rejects(check, rates | {"bytes_per_second": 2e12}, {"bytes_per_second": 4.3e12})


def test_the_card_is_asked_for_its_rates(tmp_path, capsys):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 1755\necho 1980\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    properties = SimpleNamespace(multi_processor_count=132)
    with (
        patch("torch.cuda.get_device_properties", lambda device: properties),
        patch.dict(os.environ, {"PATH": f"{tmp_path}:{os.environ['PATH']}"}),
    ):
        card = measure.card(CPU, numbers=1000)
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
        assert measure.card(CPU, numbers=1000).keys() == {"bytes_per_second", "multiprocessors"}
    assert card["exponentials_per_second"] == 132 * 16 * 1.98e9 and card["bytes_per_second"] > 0
    assert "floor of exponentials is left out" in capsys.readouterr().out


def test_calls_in_a_row_go_round_the_sets_of_arguments():
    """Sets of arguments are made until they fill the cache's bytes."""
    counts, run = [0, 0, 0], run_of("scan", sides_of("scan", OURS[:1]))

    def count(i):
        counts[i] += 1

    seconds = measure.in_a_row([partial(count, i) for i in range(3)], CPU)
    assert counts == [7, 7, 6] and seconds > 0
    size = sum(argument.nbytes for argument in run.arguments(1, 4).values())
    sets = []
    with (
        patch.object(measure, "_flush_bytes", lambda device: 5 * size),
        patch.object(measure, "in_a_row", lambda calls, device: sets.append(len(calls)) or 1.0),
    ):
        list(measure.times(measure.forward, measure.in_a_row, run, 1, 4))
    assert sets == [6, 6]


def test_a_step_that_cannot_be_captured_is_left_out_with_the_reason():
    run = run_of("mixer", sides_of("mixer", OURS[:1]))
    assert list(measure.MEASURES["decode step in a CUDA graph"](run, 1, 3)) == []
    assert run.left_out == {"minijamba parallel, decode_in_graph": "CUDA graphs need a GPU"}


# Training.

TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "attn_layer_period": 2, "attn_layer_offset": 1}  # fmt: skip
TRAINING = ["training step, dense hybrid", "training step, MoE hybrid"]


@pytest.fixture
def small_training(monkeypatch):
    """Two layers of width 16 and sequences of 16 tokens."""
    hybrids = {"dense hybrid": (TINY | {"num_experts": 1}, 2), "MoE hybrid": (TINY | {"num_experts": 4}, 3)}
    monkeypatch.setattr(train, "HYBRIDS", {"cpu": hybrids})
    monkeypatch.setattr(train, "LENGTH", {"cpu": 16})
    monkeypatch.setattr(train, "STEPS", 2)
    monkeypatch.setattr(train, "VOCABULARY", 512)
    monkeypatch.setattr(train, "matrix_rate", lambda device, dtype: 1e9)


@pytest.fixture
def trained(small_training, tmp_path):
    def run(*words):
        assert measured_by(["train", "--device", "cpu", "--repeats", "3", "--output", str(tmp_path / "a"), *words]) == 0
        return json.loads((tmp_path / "a").read_text())

    return run


def test_training_is_measured_on_both_sides(trained, capsys):
    measured = trained("--commit", "abc")

    def check(measured):
        assert measured["name"] == "train_cpu" and measured["dtype"] == "float32" and measured["repeats"] == 3
        assert measured["matrix_rate"] == 1e9 and measured["left_out"] == {} and measured["commit"] == "abc"
        cases = [(row["measure"], row["batch"], row["steps"], row["side"]) for row in measured["rows"]]
        assert cases == [
            (name, batch, 16, side)
            for name, batch in zip(TRAINING, (2, 3), strict=True)
            for side in (train.OURS, train.LOOP)
        ]
        for row in measured["rows"]:
            assert 0 < row["fastest"] <= row["milliseconds"] <= row["slowest"]
            assert row["tokens_per_second"] == pytest.approx(1e3 * row["batch"] * 16 / row["milliseconds"])
            assert row["bytes"] >= 0 and row["functions"] == []
            assert row["sizes"] == train.HYBRIDS["cpu"][row["measure"].removeprefix("training step, ")][0]

    check(measured)
    other_sizes = [row | {"sizes": {}} for row in measured["rows"]]
    other_batch = [row | {"batch": 4} for row in measured["rows"]]
    other_speed = [row | {"tokens_per_second": row["milliseconds"]} for row in measured["rows"]]
    wrong = other_batch, other_speed, other_sizes, measured["rows"][:3]
    assert_rejects(check, *(measured | {"rows": rows} for rows in wrong), measured | {"dtype": "bfloat16"})
    shown = capsys.readouterr().out
    assert bench.table(measured) in shown and "MoE hybrid, minijamba: " in shown


def test_training_starts_from_the_same_loss_or_is_not_recorded(trained, monkeypatch, tmp_path):
    """Another new model must not be taken for the same one, although both know nothing yet."""
    reference = train.transformers

    def check(wrong):
        monkeypatch.setitem(train.PREPARE, train.LOOP, lambda folder, batch: wrong(folder, batch))
        trained()

    def other_weights(folder, batch):
        torch.manual_seed(1)
        model = train.Jamba(train.load(folder, device="cpu").config)
        train.save(model, folder, dtype=torch.float32)
        return reference((), folder, batch)

    def without_a_mixer(folder, batch):
        model = train.load(folder, device="cpu")
        torch.nn.init.zeros_(model.model.layers[0].mixer.out_proj.weight)
        train.save(model, folder, dtype=torch.float32)
        return reference((), folder, batch)

    def of_other_targets(folder, batch):
        return reference((), folder, batch._replace(targets=batch.targets.roll(-1, dims=1)))

    check(lambda folder, batch: reference((), folder, batch))
    (tmp_path / "a").unlink()
    assert_rejects(check, other_weights, without_a_mixer, of_other_targets)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_imported_does_not_train_and_is_named(trained, capsys):
    with patch.dict("sys.modules", mamba_ssm=None):
        measured = trained("--sides", train.OURS, train.KERNELS)
        alone = trained("--sides", train.KERNELS)

    def check(measured):
        assert [row["side"] for row in measured["rows"]] == [train.OURS] * 2
        assert measured["left_out"].keys() == {train.KERNELS} and "mamba_ssm" in measured["left_out"][train.KERNELS]

    check(measured)
    assert_rejects(check, alone, measured | {"left_out": {}})
    assert alone["rows"] == []
    assert f"left out: {train.KERNELS}: " in capsys.readouterr().out


def test_the_record_of_training_names_the_kernels_that_ran(trained, monkeypatch):
    """The functions of peers that a first step ran stand in its row; a side that did not run them all is left out."""
    step_of = train.PREPARE[train.OURS]

    def with_kernels_of(*packages):
        scopes = [{"__name__": package} for package in packages]
        for scope in scopes:
            exec("def kernel(step):\n    return step()", scope)

        def prepare(folder, batch):
            step = step_of(folder, batch)
            for scope in scopes:
                step = partial(scope["kernel"], step)
            return step

        return prepare

    def check(*packages):
        monkeypatch.setitem(train.PREPARE, train.KERNELS, with_kernels_of(*packages))
        with patch.dict("sys.modules", dict.fromkeys(packages, sys)):
            measured = trained("--sides", train.OURS, train.KERNELS)
        functions = [f"{package}.kernel" for package in sorted(packages)]
        assert [row["functions"] for row in measured["rows"]] == [[], functions] * 2
        assert not measured["left_out"]

    check("mamba_ssm", "causal_conv1d")
    assert_rejects(lambda package: check(package), "causal_conv1d", "mamba_ssm")


def test_training_refuses_sides_that_do_not_exist(small_training, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "train", "--device", "cpu", "--sides", "nobody"]) == 2
    error = capsys.readouterr().err
    assert "there is no side 'nobody' here: choose of 'minijamba', 'transformers, mamba-ssm" in error
    assert error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_matrix_rate_counts_multiplications_and_additions(monkeypatch):
    """2 n^3 of them for a product of n x n matrices, over the median of ten times after two to warm up."""
    times, shapes = iter([100.0, 100.0, *range(1, 11)]), []

    def clock(calls, device):
        shapes.append(calls[0]().shape)
        return next(times)

    def check(seconds):
        assert rate == 2 * 1024**3 / seconds

    monkeypatch.setattr(measure, "alone", clock)
    rate = measure.matrix_rate(CPU, torch.float32)
    check(5.5)
    assert_rejects(check, 11.0, 2.75, 6.5)
    assert shapes == [(1024, 1024)] * 12


# Memory.


def peak_of_a_block(numbers):
    with measure.PeakOfProcess() as peak:
        block = torch.ones(numbers)
        for _ in range(20):
            block.add_(1)
        del block
    yield peak.bytes


def test_memory_is_the_highest_above_the_start():
    """A block of 64 MiB, written again and again, so that a busy machine sees it, and freed; in a new process, which
    has no memory left over for it from earlier tests."""

    def check(numbers):
        (nbytes,) = apart(peak_of_a_block, numbers)
        assert 0.8 * 2**26 < nbytes < 1.5 * 2**26

    check(2**24)
    assert_rejects(check, 2**20)


def test_memory_is_measured_in_a_process_of_its_own():
    """The naive scan keeps y of each step until the end: more than 2048 x 64 numbers of 4 bytes, twice."""
    run = Run(bench.COMPONENTS["scan"], Setting(CPU, torch.float32, {"channels": 64, "states": 2}), [], 1, {}, {})
    run.sides.append(sides_of("scan", ["minijamba naive"])[0])
    (peak,) = measure.MEASURES["peak memory"](run, 1, 2048)
    assert peak["side"] == "minijamba naive" and 2**20 < peak["bytes"] < 2**27


# The record and its table.


def test_the_table_shows_times_the_first_side():
    def row(side, **figure):
        return {"measure": "forward", "batch": 1, "steps": 16, "side": side, **figure}

    measurement = {
        "name": "conv_cuda", "device": "Abacus", "threads": 2, "dtype": "bfloat16", "channels": 8, "width": 4,
        "left_out": {"nobody": "was not there"},
        "rows": [
            row("ours", milliseconds=2.0),
            row("peer", milliseconds=9.0),
            row("ours", bytes=2**20) | {"measure": "peak memory"},
            row("peer", bytes=2**24) | {"measure": "peak memory"},
            row("ours", error=1e-3) | {"measure": "error of y"},
        ],
    }  # fmt: skip

    def check(measurement):
        title, _, head, *lines = bench.table(measurement).splitlines()
        assert title == "causal convolution on Abacus, 2 threads, bfloat16, channels 8, width 4"
        assert head.split() == ["ours", "peer"] and lines == [
            "forward in ms, 1 x 16                  2.000      9.000 (4.5x)",
            "peak memory in MiB, 1 x 16               1.0      16.0 (16.0x)",
            "error of y, 1 x 16                   1.0e-03                 -",
            "left out: nobody: was not there",
        ]

    check(measurement)
    assert_rejects(check, measurement | {"rows": [r | {"milliseconds": 1.0} for r in measurement["rows"]]})


def test_the_table_of_training_shows_time_speed_and_memory():
    def row(side, milliseconds, speed, size):
        facts = {"fastest": 1.0, "slowest": 9.0, "first_loss": 9.1, "functions": []}
        figures = {"milliseconds": milliseconds, "tokens_per_second": speed, "bytes": size}
        return {"measure": TRAINING[0], "batch": 2, "steps": 128, "side": side, **figures, **facts}

    measurement = {
        "name": "train_cpu", "device": "Abacus", "threads": 2, "dtype": "float32", "matrix_rate": 1e9, "left_out": {},
        "rows": [row("minijamba", 20.0, 12800.0, 2**21), row("peer", 50.0, 5120.0, 2**20)],
    }  # fmt: skip

    def check(measurement):
        title, _, head, *lines = bench.table(measurement).splitlines()
        assert title == "training on Abacus, 2 threads, float32" and head.split() == ["minijamba", "peer"]
        assert lines == [
            "training step, dense hybrid in ms, 2 x 128                    20.0       50.0 (2.5x)",
            "training step, dense hybrid in tokens/s, 2 x 128            12,800      5,120 (0.4x)",
            "training step, dense hybrid in MiB, 2 x 128                    2.0        1.0 (0.5x)",
        ]

    check(measurement)
    assert_rejects(check, measurement | {"rows": [r | {"milliseconds": 1.0} for r in measurement["rows"]]})


def test_the_command_is_recorded_without_where_the_record_went():
    def check(arguments):
        assert records._command(arguments) == "minijamba bench train --sides minijamba 'transformers, mamba-ssm'"

    words = ["bench", "train", "--sides", "minijamba", "transformers, mamba-ssm"]
    check(words)
    for option in "--output", "--record", "--commit":
        check([*words, option, "there"])
        check([*words[:2], option, "there", *words[2:]])
        check([*words[:2], f"{option}=there", *words[2:]])
    check([*words, "--output", "a", "--commit", "b"])
    assert_rejects(check, [*words, "--device", "cpu"], ["--output", *words], words[1:])
    for model in (["--model", "here/or/there"], ["--model=here/or/there"]):
        assert records._command(["bench", "load", *model]) == "minijamba bench load --model there"


def test_the_records_of_components_in_the_repository_can_be_shown():
    """Those of studies and of the shipped model are read by the notebooks."""
    for path in (records.REPOSITORY / "data" / "measurements").glob("*.json"):
        measured = json.loads(path.read_text(encoding="utf-8"))
        if measured["name"].split("_")[0] not in records.TITLES:
            continue
        shown = bench.table(measured)
        assert measured["device"] in shown and all(row["side"] in shown for row in measured["rows"])


def test_record_is_written_whole(tmp_path):
    path = tmp_path / "deeper" / "figures.json"
    assert bench.record("figures", [{"side": "a", "value": 1}], device=CPU, output=path, width=3) == path
    assert [file.name for file in path.parent.iterdir()] == ["figures.json"]
    measured = json.loads(path.read_text())
    assert measured["width"] == 3 and measured["rows"] == [{"side": "a", "value": 1}]

    with pytest.raises(TypeError):
        bench.record("figures", [{"value": object()}], device=CPU, output=path)
    assert json.loads(path.read_text()) == measured


def test_without_a_repository_the_record_goes_to_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(records, "REPOSITORY", tmp_path / "site-packages")
    path = bench.record("figures", [], device=CPU)
    assert path.resolve() == tmp_path / "data" / "measurements" / "figures.json" and path.is_file()
    assert json.loads(path.read_text())["commit"] is None
    bench.record("figures", [], device=CPU, commit="abc")
    assert json.loads(path.read_text())["commit"] == "abc"
