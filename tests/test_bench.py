import argparse
import json
from unittest.mock import patch

import pytest
import torch
from tqdm import tqdm

from minijamba import bench
from minijamba.scan import selective_scan
from minijamba.testing import assert_matches, assert_rejects

CPU = torch.device("cpu")
SIZES = {"batch": 2, "channels": 8, "states": 4}
TINY = "scan --device cpu --lengths 16 32 --backward 16 --memory --batch 2 --channels 8 --states 4 --repeats 2"
PEERS = ["mambapy", "transformers", "transformers, mambapy"]


def measure(words):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(words))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("measurements") / "scan.json"
    assert measure([*TINY.split(), "--no-compile", "--output", str(path)]) == 0
    return json.loads(path.read_text())


def test_the_record_says_how_it_was_made(measured):
    def check(measured):
        assert measured["name"] == "scan_cpu" and measured["dtype"] == "float32" and measured["repeats"] == 2
        assert measured["device"] and measured["threads"] == torch.get_num_threads()
        assert measured["versions"]["torch"] == torch.__version__
        assert {"transformers", "mambapy"} <= measured["versions"].keys()
        assert measured["command"].split()[0] == "minijamba" and measured["date"].endswith("UTC")
        assert "commit" in measured and SIZES.items() <= measured.items()

    check(measured)
    assert_rejects(check, measured | {"threads": 0}, measured | {"channels": 9}, measured | {"device": ""})


def test_every_side_is_measured_everywhere(measured):
    def check(rows):
        seen = {(row["measure"], row["steps"], row["side"]) for row in rows}
        sides = [bench.OURS, "minijamba naive", *PEERS]
        columns = [("forward", 16), ("forward", 32), ("forward + backward", 16)]
        assert seen == {(*column, side) for column in columns for side in sides} and len(rows) == len(seen)
        for row in rows:
            assert 0 < row["fastest"] <= row["milliseconds"] <= row["slowest"]

    check(measured["rows"])
    swapped = [row | {"fastest": row.get("slowest"), "slowest": row.get("fastest")} for row in measured["rows"]]
    assert_rejects(check, measured["rows"][1:], measured["rows"] + measured["rows"][:1], swapped)


def test_the_table_shows_times_ours():
    def row(measure, side, **figure):
        return {"measure": measure, "steps": 16, "side": side, **figure}

    measurement = {
        "device": "Abacus", "threads": 2, "dtype": "float32", **SIZES,
        "rows": [
            row("forward", bench.OURS, milliseconds=2.0),
            row("forward", "peer", milliseconds=9.0),
            row("peak memory", bench.OURS, bytes=2**20),
            row("peak memory", "peer", bytes=2**24),
        ],
    }  # fmt: skip

    def check(measurement):
        lines = bench.table(measurement).splitlines()
        assert "Abacus" in lines[0] and lines[2].split() == ["forward", "16", "peak", "memory", "16"]
        assert lines[4].split() == ["peer", "9.0", "(4.5x)", "16.0", "(16.0x)"]

    check(measurement)
    assert_rejects(check, measurement | {"rows": [r | {"milliseconds": 1.0} for r in measurement["rows"][:2]]})


def test_sides_do_the_same_work():
    arguments = bench._arguments(CPU, 20, **SIZES)
    *parameters, delta_bias = [argument.double() for argument in arguments]
    expected = selective_scan(*parameters, delta_bias=delta_bias, delta_softplus=True, rung="naive")

    def check(side):
        y = bench._forward(side.scan, bench._layout(side, arguments))
        assert_matches(y.mT if side.time_last else y, expected, 1e-5, side.name)

    sides = bench._available_sides(CPU, compiled=False)
    assert [side.name for side in sides] == [bench.OURS, "minijamba naive", *PEERS]
    for side in sides:
        check(side)
    assert_rejects(check, bench.Side("without z", lambda *a: sides[0].scan(*a[:6], torch.ones_like(a[6]), a[7])))


def test_a_side_that_computes_something_else_is_no_side(tmp_path):
    def halved(*arguments):
        return 0.5 * bench._ours("naive", *arguments)

    good, wrong = bench.Side("good", bench._ours.__get__("naive")), bench.Side("wrong", halved)
    with (
        patch.object(bench, "_available_sides", lambda *_: [good, wrong]),
        pytest.raises(RuntimeError, match=r"wrong differs from good by 5.0e-01"),
    ):
        bench.bench_scan("cpu", [16], [], [], channels=8, output=tmp_path / "scan.json")
    assert not list(tmp_path.iterdir())


def test_peers_that_are_not_installed_are_left_out(capsys):
    with patch.dict("sys.modules", {"mambapy": None, "mambapy.mamba": None}):
        names = [side.name for side in bench._available_sides(CPU, compiled=False)]
    assert names == [bench.OURS, "minijamba naive", "transformers"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("mambapy is left out: ")


def test_memory_is_the_highest_above_the_start():
    """A block of 64 MiB, written and freed again; blocks of that size go back to the system at once."""

    def check(numbers):
        with bench._PeakOfProcess() as peak:
            torch.ones(numbers).add_(1).sum()
        assert 0.8 * 2**26 < peak.bytes < 1.5 * 2**26

    check(2**24)
    assert_rejects(check, 2**20)


def test_memory_is_measured_in_a_process_of_its_own():
    """The naive scan keeps y of each step until the end: more than 2048 x 64 numbers of 4 bytes, twice."""
    (side,) = (side for side in bench._available_sides(CPU, compiled=False) if side.name == "minijamba naive")
    with tqdm(disable=True) as progress:
        peaks = bench._peaks([side], CPU, 2048, {"batch": 1, "channels": 64, "states": 2}, progress)
    assert peaks.keys() == {side.name} and 2**20 < peaks[side.name]["bytes"] < 2**27


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
    monkeypatch.setattr(bench, "REPOSITORY", tmp_path / "site-packages")
    path = bench.record("figures", [], device=CPU)
    assert path.resolve() == tmp_path / "data" / "measurements" / "figures.json" and path.is_file()
    assert json.loads(path.read_text())["commit"] is None
