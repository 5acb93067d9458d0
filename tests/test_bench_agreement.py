"""One checkpoint in transformers and here: a tiny one on a CPU, and every figure by hand."""

import argparse
import json
import math
import os
from dataclasses import replace

import pytest
import torch

import minijamba as mj
from minijamba import bench
from minijamba.bench import agreement, apart
from minijamba.bench.agreement import Side, Task
from minijamba.bench.programs import OURS, TRANSFORMERS
from minijamba.checkpoint import write_random
from minijamba.testing import assert_rejects

CPU = torch.device("cpu")
FLOAT32 = "agreement with transformers float32"
BFLOAT16 = "agreement with transformers bfloat16"
# Float32 in another order: a few units in the last place (6e-8) for each of some twenty operations a layer.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """In bfloat16, so that every side has the same weights."""
    folder = tmp_path_factory.mktemp("agreement") / "tiny"
    write_random(mj.preset("tiny", dtype="bfloat16"), folder, device="cpu")
    return folder


@pytest.fixture(scope="module")
def measure(checkpoint, tmp_path_factory):
    """Run the verb; answers are kept, so that no side is asked twice."""
    kept = tmp_path_factory.mktemp("kept")

    def run(words, path):
        parser = argparse.ArgumentParser()
        bench.add_arguments(parser)
        asked = f"agreement --device cpu --batch 2 --context 30 --new 6 --commit abc {words}".split()
        options = [*asked, "--model", str(checkpoint), "--keep", str(kept), "--output", str(path)]
        assert bench.run(parser.parse_args(options)) == 0
        return json.loads(path.read_text())

    return run


@pytest.fixture(scope="module")
def measured(measure, tmp_path_factory):
    return measure("--schemes none int8 int4", tmp_path_factory.mktemp("record") / "record.json")


def rows_of(measured, name):
    return {(row["side"], row["quantize"]): row for row in measured["rows"] if row["measure"] == name}


# Whole runs.


def test_the_record_says_how_it_was_made(measured):
    def check(measured):
        assert measured["name"] == "agreement_cpu" and measured["device"] and measured["threads"] == 1
        assert measured["versions"].keys() >= {"torch", "transformers"} and measured["commit"] == "abc"
        assert measured["command"].startswith("minijamba") and measured["date"].endswith("UTC")
        assert measured["dtype"] == "bfloat16" and measured["new"] == 6 and measured["left_out"] == {}
        reference = measured["reference"]
        assert (reference["side"], reference["dtype"]) == (TRANSFORMERS, "float32")
        assert reference["functions"] == [] and reference["experts"] == "eager" and reference["loading_seconds"] > 0

    check(measured)
    assert_rejects(check, measured | {"dtype": "float32"}, measured | {"versions": {}}, measured | {"device": ""})


def test_there_is_a_row_for_every_side_and_ours_are_judged_beside_transformers_too(measured):
    def check(measured):
        cases = [(row["measure"], row["side"], row["quantize"]) for row in measured["rows"]]
        ours = [(name, OURS, scheme) for scheme in (None, "int8", "int4") for name in (FLOAT32, BFLOAT16)]
        assert cases == [(FLOAT32, TRANSFORMERS, None), *ours]
        for row in measured["rows"]:
            assert (row["model"], row["dtype"], row["batch"], row["context"]) == ("tiny", "bfloat16", 2, 30)
            assert 0 < row["median_error"] < row["worst_error"] < 1 and 0 < row["divergence"] < 0.1
            assert 0.5 < row["same_choice"] <= row["in_top_5"] <= 1 and 0.8 < row["same_experts"] <= 1
            # Logits in bfloat16 can be equal, so that a flip need not be wide.
            assert 0 <= row["same_new"] <= 6 and row["widest_flip"] >= 0
            assert row["widest_flip"] == 0 or row["same_choice"] < 1
            assert ("loading_seconds" in row) == ("peak_bytes" in row) == (row["measure"] == FLOAT32)

    check(measured)
    assert_rejects(check, measured | {"rows": measured["rows"][1:]}, measured | {"rows": measured["rows"][::-1]})


def test_ours_in_bfloat16_errs_as_much_as_transformers_and_fewer_bits_more(measured):
    def check(rows):
        theirs, ours, int8, int4 = rows.values()
        assert ours["ratio"] == pytest.approx(ours["error"] / theirs["error"]) and 0.5 < ours["ratio"] < 1.5
        assert int8["error"] < 0.5 * int4["error"] and int8["divergence"] < 0.2 * int4["divergence"]
        assert ours["error"] < 1.2 * int8["error"] and ours["error"] < 0.05 < int4["error"] < 0.5

    rows = rows_of(measured, FLOAT32)
    check(rows)
    wrong = [dict(rows) for _ in range(2)]
    wrong[0][OURS, None] = rows[OURS, "int4"]
    wrong[1][OURS, "int8"] = rows[OURS, "int4"]
    assert_rejects(check, *wrong)


def test_ours_in_float32_equals_the_reference(measure, tmp_path):
    measured = measure("--dtype float32 --schemes none", tmp_path / "record.json")

    def check(row):
        assert row["dtype"] == "float32" and row["worst_error"] < ROUNDING and row["divergence"] < ROUNDING**2
        assert row["same_choice"] == row["in_top_5"] == row["same_experts"] == 1 and row["same_new"] == 6
        assert row["widest_flip"] == 0 and row["router_difference"] < ROUNDING and "ratio" not in row

    (row,) = measured["rows"]
    check(row)
    coarse = rows_of(measure("--schemes none", tmp_path / "coarse.json"), FLOAT32)[OURS, None]
    assert_rejects(check, coarse | {"dtype": "float32"}, row | {"worst_error": 2 * ROUNDING})


def test_the_table_and_the_verdict_say_it(measured):
    shown = bench.table(measured)
    assert "tiny, agreement with transformers float32: error of the logits, 2 x 30" in shown
    assert "tiny, agreement with transformers bfloat16: same experts in %, 2 x 30" in shown
    ratio = rows_of(measured, FLOAT32)[OURS, None]["ratio"]

    def check(measured):
        first, routing, tokens = agreement.verdict(measured)
        assert first.startswith(f"against transformers float32, minijamba in bfloat16 errs {ratio:.2f} times as much")
        gaps = measured["gaps"]
        assert f"by {gaps['router']:.2g} in the middle" in routing and gaps["router"] > 20 * gaps["rounding_step"]
        assert gaps["within_step"] < 0.05
        assert f"are {gaps['next_token']:.2g} logits apart" in tokens and "minijamba int4" in tokens

    check(measured)
    assert_rejects(check, measured | {"gaps": measured["gaps"] | {"router": measured["gaps"]["rounding_step"]}})


def test_answers_that_were_kept_are_not_asked_again(measure, measured, checkpoint, tmp_path, monkeypatch):
    def only_the_machine(work, *arguments):
        assert work is agreement.machine, "a side was asked again"
        return iter([{}])

    monkeypatch.setattr(agreement, "apart", only_the_machine)
    again = measure("--schemes none int8 int4", tmp_path / "record.json")
    assert again["rows"] == measured["rows"]

    def check(commit):
        task = Task(checkpoint, CPU, 2, 30, 6, commit)
        agreement.answers_of(Side(OURS, "bfloat16"), task, next(checkpoint.parent.parent.glob("kept*")))

    check("abc")
    assert_rejects(check, "abd")


def test_added_rows_stay(measure, measured, tmp_path):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(measured))
    added = measure("--schemes int8 --add", path)
    assert len(added["rows"]) == len(measured["rows"]) and added["earlier"][0]["commit"] == "abc"
    assert [row.get("run") for row in added["rows"]] == [0, 0, 0, 0, None, None, None]
    assert {row["quantize"] for row in added["rows"][4:]} == {None, "int8"}


# Failures.


def task_of(checkpoint, **changes):
    return replace(Task(checkpoint, CPU, 1, 5, 2), **changes)


def answering(broken):
    """A stand-in for `answers_of`, in which some sides do not come to their end."""

    def answers_of(side, task, folder):
        if side.name in broken:
            raise broken[side.name]
        logits = torch.arange(10.0).reshape(1, 2, 5) % 4
        logits[0, 0, 0] += {"int4": 0.1, None: 0.01}.get(side.quantize, 0.0) if side.dtype == "bfloat16" else 0.0
        new = torch.zeros(1, 2, dtype=torch.long)
        return {"logits": logits, "router": None, "experts": None, "new": new, "facts": {"loading_seconds": 1.0}}

    return answers_of


def run_of(monkeypatch, checkpoint, broken):
    monkeypatch.setattr(agreement, "answers_of", answering(broken))
    left_out, facts = {}, {}
    sides = agreement._sides(agreement.ALL, [None, "int4"], "bfloat16")
    return list(agreement._rows(sides, task_of(checkpoint), checkpoint, left_out, facts)), left_out, facts


def test_a_side_that_fails_is_a_row_and_the_others_are_measured(monkeypatch, checkpoint, capsys):
    rows, left_out, facts = run_of(monkeypatch, checkpoint, {"minijamba bfloat16": apart.Broke("out of memory")})

    def check(rows):
        assert [(row["side"], row["quantize"], row.get("failed")) for row in rows] == [
            (TRANSFORMERS, None, None), (OURS, None, "out of memory"), (OURS, "int4", None), (OURS, "int4", None),
        ]  # fmt: skip
        assert "error" not in rows[1] and rows[2]["ratio"] > 1

    check(rows)
    assert_rejects(check, rows[1:], [rows[0], rows[2], rows[1], rows[3]])
    assert not left_out and facts["gaps"].keys() == {"next_token"}
    shown = bench.table(facts | {"name": "agreement_cpu", "device": "here", "threads": 1, "dtype": "", "rows": rows})
    assert "out of memory" in shown and "failed: minijamba bfloat16" in shown


def test_a_reference_that_does_not_fit_is_left_out_for_the_next(monkeypatch, checkpoint):
    no_room = {"transformers float32": apart.Broke(apart.NO_ROOM)}
    rows, left_out, facts = run_of(monkeypatch, checkpoint, no_room)
    assert left_out == {"transformers float32": "out of memory"} and facts["reference"]["dtype"] == "bfloat16"
    assert [(row["measure"], row["side"]) for row in rows] == [(BFLOAT16, OURS)] * 2
    absent = {side.name: ImportError("no transformers") for side in agreement.REFERENCES}
    with pytest.raises(ValueError, match="nothing to compare with: transformers float32: no transformers; "):
        run_of(monkeypatch, checkpoint, absent)


def test_a_side_that_is_not_installed_is_left_out(monkeypatch, checkpoint):
    rows, left_out, _ = run_of(monkeypatch, checkpoint, {"transformers bfloat16": ImportError("no accelerate")})
    assert left_out == {"transformers bfloat16": "no accelerate"}
    assert [(row["side"], row["quantize"], "ratio" in row) for row in rows] == [
        (OURS, s, False) for s in (None, "int4")
    ]


def test_a_checkpoint_that_does_not_load_fails_in_its_own_process(checkpoint, tmp_path):
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(apart.Broke, match="^ValueError: "):
        agreement.answers_of(Side(OURS, "bfloat16"), task_of(tmp_path), tmp_path / "answers")
    assert not os.listdir(tmp_path / "answers")


def asked(logits, new):
    def read(tokens):
        return logits, [], []

    return agreement.Program(read, lambda tokens, n: new, [CPU], {})


def test_what_is_no_answer_is_refused(checkpoint):
    task, new = task_of(checkpoint), torch.zeros(1, 2, dtype=torch.long)
    agreement._asked(asked(torch.zeros(1, 5, 3), new), task)
    with pytest.raises(ValueError, match="not all finite"):
        agreement._asked(asked(torch.full((1, 5, 3), torch.nan), new), task)
    with pytest.raises(ValueError, match=r"it wrote \(1, 1\) tokens, not \(1, 2\)"):
        agreement._asked(asked(torch.zeros(1, 5, 3), new[:, :1]), task)


def test_transformers_is_not_begun_where_its_weights_do_not_fit(checkpoint, monkeypatch):
    need = {dtype: mj.budget(mj.preset("tiny"), dtype=dtype).weight_bytes for dtype in ("float32", "bfloat16")}
    monkeypatch.setattr(agreement, "available_memory", lambda device: need["float32"])
    with pytest.raises(MemoryError):
        agreement.transformers(Side(TRANSFORMERS, "float32"), task_of(checkpoint))


def test_what_does_not_exist_is_refused(checkpoint):
    for options, said in (
        ({"sides": ["vllm"]}, "no side 'vllm'"),
        ({"schemes": ["int3"]}, "int3"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"context": 0}, "context is 0"),
        ({"new": 0}, "new is 0"),
        ({"model": checkpoint.parent}, "holds no model"),
    ):
        with pytest.raises(ValueError, match=said):
            agreement.bench_agreement(**{"model": checkpoint, "device": "cpu", **options})


# The figures.


def test_the_last_of_every_four_positions_is_compared(checkpoint):
    def check(context):
        logits = torch.arange(float(context)).reshape(1, -1, 1).expand(1, -1, 3)
        new = torch.zeros(1, 2, dtype=torch.long)
        kept = agreement._asked(asked(logits, new), task_of(checkpoint, context=context))["logits"]
        assert kept[0, :, 0].tolist() == [1, 5, 9]

    check(10)
    assert_rejects(check, 9, 12)


def test_distance_by_hand():
    """(1, -1) and (6, -6) against (2, -2) and (4, -4), with other constants added to each position."""
    a = torch.tensor([[[1.0, -1.0], [6.0, -6.0]]]) + torch.tensor([[[5.0], [-7.0]]])
    b = torch.tensor([[[2.0, -2.0], [4.0, -4.0]]]) + torch.tensor([[[3.0], [0.0]]])

    def check(distance):
        found = distance(a, b)
        assert found["error"] == pytest.approx(math.sqrt(2 * (1 + 4) / (2 * (4 + 16))))
        assert found["difference"] == pytest.approx(math.sqrt(2 * (1 + 4) / 4))
        assert found["median_error"] == found["worst_error"] == pytest.approx(0.5)

    def right(a, b):
        return agreement.distance(agreement.centred(a), agreement.centred(b))

    def swapped(a, b):
        return right(b, a)

    def centred_over_positions(a, b):
        return agreement.distance(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True))

    check(right)
    assert_rejects(check, agreement.distance, swapped, centred_over_positions)


def test_the_error_is_of_the_whole_tensor_and_not_a_mean_of_positions():
    b = torch.tensor([[[1.0, -1.0], [10.0, -10.0], [10.0, -10.0]]]).double()
    a = b + torch.tensor([[[1.0, -1.0], [1.0, -1.0], [0.0, 0.0]]])

    def check(distance):
        found = distance(a, b)
        assert found["error"] == pytest.approx(math.sqrt(2 / 201))
        assert found["median_error"] == pytest.approx(0.1) and found["worst_error"] == pytest.approx(1.0)

    def mean_of_positions(a, b):
        each = (a - b).norm(dim=-1) / b.norm(dim=-1)
        return agreement.distance(a, b) | {"error": each.mean().item()}

    def worst_token(a, b):
        return agreement.distance(a, b) | {"worst_error": ((a - b).abs().max() / b.abs().max()).item()}

    check(agreement.distance)
    assert_rejects(check, mean_of_positions, worst_token)


def test_divergence_by_hand():
    """From (3/4, 1/4) to (1/2, 1/2) at one position, none at the other."""
    b = torch.tensor([[[3.0, 1.0], [1.0, 2.0]]]).double().log()
    a = torch.tensor([[[5.0, 5.0], [2.0, 4.0]]]).double().log()

    def check(distance):
        kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
        assert distance(a, b)["divergence"] == pytest.approx(kl / 2)

    check(agreement.distance)

    def the_other_way(a, b):
        return agreement.distance(b, a)

    def sum_of_positions(a, b):
        return {"divergence": 2 * agreement.distance(a, b)["divergence"]}

    def in_bits(a, b):
        return {"divergence": agreement.distance(a, b)["divergence"] / math.log(2)}

    assert_rejects(check, the_other_way, sum_of_positions, in_bits)


def test_choices_by_hand():
    """Of four positions of seven tokens one has the same choice, one another of the first five, two a later one."""
    b = torch.arange(7.0).expand(1, 4, 7)
    a = b.clone()
    a[0, 1, 2] = 9  # then 6, 5, 4, 3
    a[0, 2:, 6] = -1

    def check(choices):
        found = choices(a, b)
        assert found == {"same_choice": 0.25, "in_top_5": 0.5, "widest_flip": 4.0}

    def over_positions(a, b):
        return agreement.choices(a.transpose(1, 2), b.transpose(1, 2))

    def of_the_other(a, b):
        return agreement.choices(b, a)

    check(agreement.choices)
    assert_rejects(check, over_positions, of_the_other)


def test_the_same_experts_in_another_order_are_the_same():
    a = torch.tensor([[[0, 1], [2, 3], [1, 2]]])
    b = torch.tensor([[[1, 0], [2, 0], [0, 3]]])

    def check(same):
        assert same(a, b) == pytest.approx(3 / 6)

    check(agreement.same_experts)

    def in_order(a, b):
        return (a == b).double().mean().item()

    def all_of_a_token(a, b):
        return (a.sort(-1).values == b.sort(-1).values).all(-1).double().mean().item()

    assert_rejects(check, in_order, all_of_a_token)


def test_tokens_count_until_the_first_difference():
    a = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    b = torch.tensor([[1, 2, 3, 4], [1, 9, 3, 4], [9, 2, 3, 4]])

    def check(same):
        assert same(a, b) == pytest.approx((4 + 1 + 0) / 3)

    check(agreement.same_start)

    def wherever(a, b):
        return (a == b).sum(-1).double().mean().item()

    def columns_alike(a, b):
        return agreement.same_start(a.T, b.T)

    assert_rejects(check, wherever, columns_alike)


def test_the_rounding_step_is_that_of_bfloat16():
    x = torch.tensor([1.0, 1.5, 2.0, -3.0, 0.3, 1000.0])

    def check(step):
        bits = x.bfloat16().abs().view(torch.int16)  # the next number has the next bits
        after = (bits + 1).view(torch.bfloat16).float()
        assert torch.equal(step(x), after - bits.view(torch.bfloat16).float())

    check(agreement.rounding_step)
    assert_rejects(check, lambda x: agreement.rounding_step(x) / 2, lambda x: x.abs() / 128)


def test_gaps_by_hand():
    """Two of three experts: the gap is that between the second and the third."""
    router = torch.tensor([[[0.5, 3.0, 1.0], [2.0, 1.0, 1.001], [0.0, 1.5, 4.0]]])
    logits = torch.tensor([[[1.0, 4.0, 2.0], [0.0, 0.5, 0.0], [7.0, 0.0, 6.0]]])
    reference = {"router": router, "logits": logits}

    def check(chosen):
        found = agreement.gaps(reference, chosen)
        assert found["next_token"] == 1 and found["router"] == pytest.approx(0.5)
        assert found["rounding_step"] == 1 / 128 and found["within_step"] == pytest.approx(1 / 3)

    check(2)
    assert_rejects(check, 1)
    assert agreement.gaps(reference, 3) == agreement.gaps(reference | {"router": None}, 2) == {"next_token": 1.0}
