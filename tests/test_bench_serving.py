"""Whole models side by side: tiny ones on a CPU, through the same processes as large ones on a GPU."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import minijamba as mj
from minijamba import bench
from minijamba.bench import apart, decode, load, prefill, programs, records, serving, summary, throughput
from minijamba.bench.programs import OURS, TRANSFORMERS, VLLM, Job
from minijamba.checkpoint import write_random
from minijamba.generate import CHUNK
from minijamba.packed_files import in_memory
from minijamba.quantize import SCHEMES
from minijamba.testing import assert_rejects

CPU = torch.device("cpu")


def measured_by(words):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    assert bench.run(parser.parse_args(words)) == 0


def of_file(words, path):
    measured_by([*words.split(), "--device", "cpu", "--output", str(path)])
    return json.loads(path.read_text())


def job(**changes):
    blank = Job(
        "decode", decode.figures, "tiny", OURS, "int8-all", ((1, 4),), CPU, None, repeats=1, new=2, longest=5,
        card={"read_bytes_per_second": 1e9, "matrix_flops_per_second": 1e9},
    )  # fmt: skip
    return replace(blank, **changes)


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    words = "decode --schemes int8-all none --cases 1x9 2x9 --repeats 2 --new 8 --commit abc"
    return of_file(words, tmp_path_factory.mktemp("decode") / "record.json")


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    words = "prefill --schemes int8-all --sides minijamba vllm --cases 1x16 --memory 0.002 --longest --tries 1"
    return of_file(words, tmp_path_factory.mktemp("prefill") / "record.json")


@pytest.fixture(scope="module")
def through(tmp_path_factory):
    words = "throughput --models tiny --cases 2x8 --new 6 --memory 79"
    return of_file(words, tmp_path_factory.mktemp("throughput") / "record.json")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("load") / "tiny"
    write_random(mj.preset("tiny"), folder)
    return folder


# Random models.


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_a_random_model_is_what_loading_a_random_checkpoint_gives(tmp_path, scheme):
    """Bit for bit; in bfloat16, in which numbers are rounded before they are packed."""
    config = mj.preset("tiny", dtype="bfloat16")
    write_random(config, tmp_path / "model", seed=3, device="cpu")
    loaded = in_memory(mj.load(tmp_path / "model", device="cpu", quantize=scheme))

    def check(seed):
        made = in_memory(programs.random_model(config, scheme, CPU, seed))
        assert made.keys() == loaded.keys()
        for name, tensor in loaded.items():
            assert made[name].dtype == tensor.dtype and torch.equal(made[name], tensor), name

    check(3)
    assert_rejects(check, 0)


def test_a_tied_model_is_made_too():
    model = programs.random_model(mj.preset("tiny", tie_word_embeddings=True), None, CPU)
    assert model.lm_head.weight is model.model.embed_tokens.weight and not model.training


def test_all_sides_get_the_same_tokens_and_no_special_ones():
    config = mj.preset("tiny", bos_token_id=5, eos_token_id=(7, 9), pad_token_id=11)

    def check(config):
        tokens = programs.random_tokens(config, 4, 5000)
        assert torch.equal(tokens, programs.random_tokens(config, 4, 5000))
        assert tokens.dtype == torch.int64 and set(range(128)) - set(tokens.unique().tolist()) == {5, 7, 9, 11}

    check(config)
    assert_rejects(check, mj.preset("tiny"), replace(config, pad_token_id=12))


def test_a_batch_is_read_in_shorter_pieces():
    gpu = torch.device("cuda")
    assert [programs.chunk_of(gpu, batch) for batch in (1, 2, 16, 64)] == [None, 8192, 1024, 512]
    assert programs.chunk_of(CPU, 64) is None


# Decoding.


def test_the_record_of_decoding_says_how_it_was_made(decoded):
    def check(measured):
        assert measured["name"] == "decode_cpu" and measured["device"] and measured["threads"] == 1
        assert measured["versions"]["torch"] == version("torch") and measured["commit"] == "abc"
        assert measured["command"].startswith("minijamba") and measured["date"].endswith("UTC")
        assert measured["weights"] == "random" and measured["new"] == 8 and measured["left_out"] == {}
        assert measured["card"]["read_bytes_per_second"] > 1e8 and measured["card"]["matrix_flops_per_second"] > 1e8
        assert measured["dtype"] == "float32"

    check(decoded)
    assert_rejects(check, decoded | {"weights": "trained"}, decoded | {"device": ""}, decoded | {"dtype": "int8"})


def test_decoding_has_a_row_for_every_case_and_side(decoded):
    def check(rows):
        cases = [(row["side"], row["quantize"], row["batch"], row["context"]) for row in rows]
        sides = [(OURS, "int8-all"), (OURS, None), (TRANSFORMERS, None)]
        assert cases == [(*side, batch, 9) for side in sides for batch in (1, 2)]
        for row in rows:
            assert "failed" not in row and row["model"] == "tiny" and row["memory"] is None
            assert row["fastest"] <= row["seconds"] <= row["slowest"] and row["calls"] == 2
            assert row["tokens_per_second"] == pytest.approx(row["batch"] / row["seconds"])
            assert 2**26 < row["peak_bytes"] < 2**33
            assert ("bytes" in row) == ("roofline" in row) == (row["side"] == OURS)

    rows = decoded["rows"]
    check(rows)
    assert_rejects(check, rows[1:], [row | {"tokens_per_second": 1 / row["seconds"]} for row in rows])


def test_the_roofline_is_the_time_of_reading_over_the_time_of_a_step(decoded):
    def check(rate):
        for row in decoded["rows"]:
            if row["side"] == OURS:
                assert row["roofline"] == pytest.approx(row["bytes"] / rate / row["seconds"])

    rate = decoded["card"]["read_bytes_per_second"]
    check(rate)
    assert_rejects(check, 2 * rate)


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_the_bytes_of_a_step_by_hand(scheme):
    """Two layers, "mE A+", of d = 8, f = 6, c = 16, n = 2, w = 4, r = 1, v = 10, 4 experts; one head of 8."""
    config = mj.JambaConfig(
        vocab_size=10, hidden_size=8, intermediate_size=6, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, pattern="mE A+", num_experts=4, mamba_d_state=2, mamba_dt_rank=1, dtype="float32",
    )  # fmt: skip
    matrix, scales = (4, 0) if scheme is None else (1, 4)
    expert = matrix * 3 * 6 * 8 + scales * (6 + 6 + 8)
    mlp = expert
    mamba = 16 * 2 + 16 + 32 * 8 + 16 * 4 + 16 + 5 * 16 + 16 + 16 + 8 * 16 + 1 + 2 + 2
    attention, norms, router, head = 4 * 8 * 8, 5 * 8, 4 * 8, 10 * 8
    batch, context, distinct = 3, 7, 2.5
    rows_of_embedding = 4 * batch * 8
    keys_and_values = 4 * batch * 2 * 8 * context
    state = 2 * 4 * batch * (16 * 2 + 3 * 16)
    rest = 4 * (mamba + attention + norms + router + head) + mlp + rows_of_embedding + keys_and_values + state
    model = programs.random_model(config, scheme, CPU)

    def check(distinct):
        assert decode.step_bytes(model, batch, context, [distinct]) == rest + 2.5 * expert

    check(distinct)
    assert_rejects(check, 2.0, 4.0)


def test_a_tied_head_is_read_in_full_and_a_window_bounds_the_keys():
    tied = mj.preset("tiny", tie_word_embeddings=True)
    own, shared = (programs.random_model(config, None, CPU) for config in (mj.preset("tiny"), tied))
    experts = [2.0] * 4
    assert decode.step_bytes(own, 1, 9, experts) == decode.step_bytes(shared, 1, 9, experts) + 4 * 32
    window = programs.random_model(mj.preset("tiny", pattern="A+", sliding_window=4), None, CPU)
    assert decode.step_bytes(window, 1, 9, []) == decode.step_bytes(window, 1, 4, [])
    assert decode.step_bytes(window, 1, 4, []) > decode.step_bytes(window, 1, 3, [])


def test_experts_are_counted_where_the_router_sends_the_tokens():
    """A router that scores all alike but for a bias towards two experts sends every token there."""
    model = programs.random_model(mj.preset("tiny"), "int8", CPU)
    tokens = programs.random_tokens(model.config, 6, 5)
    assert decode.distinct_experts(model, tokens[:1]) == [2.0] * 4

    def check(model):
        assert decode.distinct_experts(model, tokens) == [2.0] * 4

    free = decode.distinct_experts(model, tokens)
    assert all(2 < count <= 4 for count in free)
    assert_rejects(check, model)
    biased = programs.random_model(mj.preset("tiny", router_bias=True), "int8", CPU)
    for block in biased.model.layers:
        if hasattr(block.feed_forward, "router"):
            block.feed_forward.router.bias.data[1:3] = 100.0
    check(biased)


def test_seconds_a_token_leave_the_prompt_out():
    """A program whose prompt takes 50 ms and each token 5 ms."""
    clock = [0.0]

    def write(tokens, new):
        clock[0] += 0.05 + 0.005 * new

    def moments(tokens, new):
        write(tokens, new)
        return [clock[0] - 0.005 * (new - i) for i in range(1, 1 + new)]

    def check(step):
        for program in (programs.Program(write), programs.Program(write, moments)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(serving, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
                row = decode.figures(program, job(new=4, repeats=3), torch.zeros(2, 4))
            assert row["seconds"] == pytest.approx(step) and row["tokens_per_second"] == pytest.approx(2 / step)
            assert row["calls"] == 3 and "roofline" not in row

    check(0.005)
    assert_rejects(check, 0.05, 0.0175)


def test_keys_of_eight_bits_and_the_plain_loop_have_rows_of_their_own(tmp_path):
    words = "decode --models tiny --sides minijamba --schemes int8-all --cases 1x40 --new 4 --repeats 1"
    of_file(words, tmp_path / "record.json")
    both = of_file(f"{words} --kv int8 --loop --add", tmp_path / "record.json")["rows"]

    def check(rows):
        plain, packed = rows
        assert "kv" not in plain and "loop" not in plain and packed["kv"] == "int8"
        assert packed["bytes"] < plain["bytes"]
        assert packed["loop"]["new"] == packed["loop"]["same"] == decode.LOOPED and packed["loop"]["seconds"] > 0

    check(both)
    assert_rejects(check, both[::-1], [both[0], both[0] | {"kv": "int8"}])


def test_a_text_that_parts_from_the_loop_is_counted_to_there():
    program = programs.ours(job(), apart.Memory(CPU))
    tokens = programs.random_tokens(program.model.config, 2, 5)

    def check(same):
        def write(model, kv, tokens, new, graph=True):
            texts = torch.zeros(2, new)
            texts[1, 7:] = float(graph)
            return texts

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode, "write_ours", write)
            assert decode.beside_loop(program, job(), tokens)["same"] == same

    check(7)
    assert_rejects(check, 512)


@pytest.mark.parametrize("side", [OURS, TRANSFORMERS])
def test_a_moment_for_every_token(side):
    asked = job(side=side, quantize="int8-all" if side == OURS else None)
    program = programs.PROGRAMS[side](asked, apart.Memory(CPU))
    tokens = programs.random_tokens(asked.config, 2, 5)

    def check(when):
        assert len(when) == 6 and when == sorted(when) and len(set(when)) == 6

    check(program.moments(tokens, 6))
    check(program.loop(tokens, 6))
    assert_rejects(check, program.moments(tokens, 5), program.loop(tokens, 5))


def test_transformers_has_a_plain_loop_of_its_own():
    _, row = serving.serve(job(side=TRANSFORMERS, quantize=None, loop=True))
    assert set(row["loop"]) == {"seconds"} and row["loop"]["seconds"] > 0


def test_what_takes_long_is_not_repeated():
    clock = [0.0]

    def call():
        clock[0] += 20
        return 20.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
        assert serving.repeated(call, 9) == [20.0, 20.0]


# Prefill and throughput.


def test_reading_a_prompt(read):
    def check(rows):
        (row,) = (row for row in rows if row["measure"] == "prefill")
        assert row["tokens_per_second"] == pytest.approx(16 / row["seconds"]) and row["memory"] == 0.002
        share = row["flops"] / read["card"]["matrix_flops_per_second"] / row["seconds"]
        assert row["matrix_share"] == pytest.approx(share)

    check(read["rows"])
    assert_rejects(check, [row | {"seconds": 2 * row["seconds"]} for row in read["rows"]])
    assert read["left_out"] == {"vllm, tiny": "it is measured on a GPU only"}


def test_flops_of_a_prompt_are_those_of_its_tokens_with_one_look_at_the_head():
    config = mj.preset("tiny")
    tokens = [mj.budget(config, context=t).flops_per_token for t in range(1, 10)]
    head = 2 * 128 * 32

    def check(heads):
        assert prefill.prompt_flops(config, 3, 9) == pytest.approx(3 * (sum(tokens) - (9 - heads) * head))

    check(1)
    assert_rejects(check, 9, 0)


def test_the_longest_context_is_looked_for_from_the_budget_on(read):
    def check(rows):
        (row,) = (row for row in rows if row["measure"] == "longest context")
        said = prefill.limit_of(mj.budget(mj.preset("tiny"), quantize="int8-all"), int(0.002 * 2**30))
        assert row["said"] == said == row["context"] > 8
        assert row["seconds"] > 0 and [tried["context"] for tried in row["tried"]] == [said]

    check(read["rows"])
    assert_rejects(check, [row | {"context": row["context"] - 1} for row in read["rows"]])


def test_the_longest_context_goes_down_where_the_budget_promised_too_much(monkeypatch):
    def attempts(most):
        def fake(job, share):
            context = int(1000 * share)
            row = serving.case_of(job, 1, context) | {"said": 1000}
            return row | ({"failed": apart.NO_ROOM} if context > most else {"seconds": 1.0, "peak_bytes": 1})

        monkeypatch.setattr(prefill, "_try", fake)
        row = prefill._longest(job(measure="longest context"), tries=5)
        return row["context"], [tried["context"] for tried in row["tried"]], "failed" in row

    assert attempts(most=1070) == (1062, [1000, 1062, 1125], False)
    assert attempts(most=900) == (875, [1000, 937, 875], False)
    assert attempts(most=100) == (500, [1000, 937, 875, 750, 500], True)


def test_prompt_and_answer(through):
    def check(rows):
        row = rows[0]
        assert (row["batch"], row["context"], row["new"]) == (2, 8, 6) and row["prefill_seconds"] > 0
        assert row["decode_seconds"] + row["prefill_seconds"] == pytest.approx(row["seconds"])
        assert row["tokens_per_second"] == pytest.approx(12 / row["seconds"])
        assert row["all_tokens_per_second"] == pytest.approx(28 / row["seconds"])

    rows = through["rows"]
    check(rows)
    assert_rejects(check, [rows[0] | {"all_tokens_per_second": rows[0]["tokens_per_second"]}])


def test_the_prompt_of_an_answer_ends_with_its_first_token():
    """A prompt of 50 ms and 5 ms a token, of a program that tells when each came and of one that does not."""
    clock = [0.0]

    def moments(tokens, new):
        clock[0] += 0.05
        when = []
        for _ in range(new):
            clock[0] += 0.005
            when.append(clock[0])
        return when

    def check(prompt):
        for program in (programs.Program(moments), programs.Program(moments, moments)):
            with pytest.MonkeyPatch.context() as patch:
                for module in (serving, throughput):
                    patch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
                row = throughput.figures(program, job(new=10, repeats=3), torch.zeros(2, 4))
            assert row["prefill_seconds"] == pytest.approx(prompt) and row["seconds"] == pytest.approx(0.1)
            assert row["decode_seconds"] == pytest.approx(0.1 - prompt) and row["calls"] == 3

    check(0.055)
    assert_rejects(check, 0.05, 0.1)


def test_the_summary_takes_each_figure_from_its_own_row(monkeypatch):
    row = {"measure": "decode", "model": summary.MODEL, "side": OURS, "quantize": "int8", "batch": 1, "context": 262144}
    rows = [
        row | {"model": "mixtral-8x7b", "tokens_per_second": 1.0},
        row | {"kv": "int8", "tokens_per_second": 200.4},
        row | {"tokens_per_second": 180.0, "peak_bytes": 3 * 2**29},
        row | {"side": TRANSFORMERS, "quantize": None, "failed": apart.NO_ROOM},
        row | {"context": 1024, "batch": 16, "tokens_per_second": 200.0, "loop": {"seconds": 0.25}},
    ]
    expected = [
        "| jamba-v0.1, random weights, Abacus | minijamba, int8 | transformers, bfloat16 |",
        "| written a second, batch 16, after 1,024 tokens | 200 |  |",
        "| in a plain loop, batch 16 | 64.0 |  |",
        "| written a second after 262,144 tokens | 180 | out of memory |",
        "| the same with keys and values in int8 | 200 |  |",
        "| GiB in use, batch 1, 262,144 tokens | 1.5 | out of memory |",
    ]

    def check(rows):
        record = {"device": "Abacus", "rows": rows}
        monkeypatch.setattr(summary, "_record", lambda name: record if name == "decode" else {})
        first, _, *lines = summary.jamba_table().splitlines()
        assert [first, *lines] == expected

    check(rows)
    assert_rejects(check, rows[:2], [row | {"kv": "int8"} for row in rows], [row | {"side": OURS} for row in rows])
    assert_rejects(check, [*rows[:-1], rows[-1] | {"loop": {"seconds": 0.5}}])


def test_longest_contexts_are_computed_in_the_same_memory(through):
    def check(gib):
        found = {(row["model"], row["quantize"]): row["context"] for row in through["rows"] if "computed" in row}
        for (model, scheme), context in found.items():
            plan = mj.budget(mj.preset(model), quantize=scheme, chunk=CHUNK, kernels=True)
            assert context == plan.max_context(int(gib * 2**30))
        llama = [("llama-2-70b", scheme) for scheme in ("int8", "int8-all", "int4-all")]
        assert list(found) == [("tiny", "int8-all"), *llama]

    check(79)
    assert_rejects(check, 78)


def test_plans_of_gpus_are_complete():
    for plans in decode.PLANS, prefill.PLANS, throughput.PLANS:
        todo = serving.jobs(plans["cuda"], "decode", decode.figures, torch.device("cuda", 0), 257)
        assert {job.model for job in todo} == {"jamba-v0.1", "mixtral-8x7b"}
        assert all(job.limit == (79 if job.quantize else None) for job in todo)
    schemes = [job.quantize for job in serving.jobs(decode.PLANS["cuda"], "decode", decode.figures, CPU, 257)]
    assert schemes[:6] == ["int8-all", "int8", "int4-all", None, None, "experts_int8"]


# Loading.


def test_loading_is_measured_beside_reading(checkpoint, tmp_path):
    measured = of_file(f"load --model {checkpoint} --schemes int8 --cached --saved", tmp_path / "record.json")
    content = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))

    def check(rows):
        cases = [(row["measure"], row["quantize"]) for row in rows]
        assert cases == [("load", "int8"), ("load, cached files", "int8"), ("load, packed files", "int8-all")]
        for row in rows:
            stages = sum(row[f"{stage}_seconds"] for stage in ("headers", "waiting", "placing"))
            assert stages <= row["load_seconds"] < row["first_token_seconds"] < row["process_seconds"]
            assert row["times_reading"] == pytest.approx(row["load_seconds"] / row["files_seconds"])
            assert 0.9 * row["files_bytes"] < row["bytes"] < row["files_bytes"]
            assert 2**26 < row["host_bytes_before"] < row["host_bytes"] < 2**33 and row["peak_bytes"] > 0
        assert rows[0]["files_bytes"] == rows[1]["files_bytes"] == content > rows[2]["files_bytes"]

    check(measured["rows"])
    assert_rejects(check, measured["rows"][:1], [row | {"times_reading": 1.0} for row in measured["rows"]])
    assert measured["file_system"] not in ("", "unknown") and measured["dtype"] == "float32"
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
    assert "tiny, load in s" in bench.table(measured)


def test_files_are_read_whole_and_leave_the_cache(tmp_path, monkeypatch):
    (tmp_path / "model-1.safetensors").write_bytes(os.urandom(3_000_001))
    (tmp_path / "model-2.safetensors").write_bytes(os.urandom(5))
    monkeypatch.setattr(load, "BLOCK", 2**20)
    dropped = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: dropped.append(arguments[1:]))
    assert load.read_files(tmp_path)["bytes"] == 3_000_006
    assert dropped == [(0, 0, os.POSIX_FADV_DONTNEED)] * 2
    assert load.read_files(tmp_path, fresh=False)["bytes"] == 3_000_006 and len(dropped) == 2
    with pytest.raises(ValueError, match="holds no model"):
        load.bench_load(tmp_path.parent, "cpu")


def test_a_checkpoint_that_does_not_load_is_a_row_that_says_why(checkpoint, tmp_path):
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    row = load._measured(tmp_path, "int8", CPU, None, {"seconds": 1.0})
    assert row["failed"].startswith("ValueError: ") and "load_seconds" not in row


# Processes.


def count(to):
    yield from range(to)


def fail(error, after=0):
    yield from range(after)
    raise error


def vanish(status):
    yield 1
    os._exit(status)


def threads():
    yield torch.get_num_threads(), os.getpid()


def test_work_apart_yields_what_it_yields_here():
    assert list(apart.apart(count, 3)) == [0, 1, 2]
    ((number, process),) = apart.apart(threads)
    assert number == torch.get_num_threads() and process != os.getpid()


def test_work_that_fails_apart_says_why():
    with pytest.raises(apart.Broke, match="^ValueError: first line$"):
        list(apart.apart(fail, ValueError("first line\nsecond"), 2))
    with pytest.raises(apart.Broke, match="ended with exit status 7"):
        list(apart.apart(vanish, 7))


def test_every_way_to_run_out_of_memory_has_one_name():
    def check(error):
        assert apart.reason(error) == "out of memory"

    for error in torch.OutOfMemoryError("Tried to allocate 2 GiB"), MemoryError(), RuntimeError("CUDA: out of memory"):
        check(error)
    assert_rejects(check, RuntimeError("an illegal memory access"), ValueError())


def test_what_is_not_installed_is_no_failure():
    with pytest.raises(ImportError, match="no module"):
        list(apart.apart(fail, ImportError("no module")))


def break_down(program, job, tokens):
    """Figures for contexts of at most 8, an end without a word for longer ones."""
    if tokens.shape[1] > 8:
        os._exit(3)
    return {"tokens_per_second": 1.0}


def test_a_case_that_breaks_its_process_is_a_row_and_the_others_are_measured():
    asked = job(figures=break_down, cases=((1, 4), (1, 9), (1, 5)))
    rows, left_out = [], {}
    rows = list(serving.rows_of(asked, left_out))

    def check(rows):
        assert [(row["context"], "failed" in row) for row in rows] == [(4, False), (9, True), (5, False)]
        assert rows[1]["failed"] == "the process ended with exit status 3" and not left_out

    check(rows)
    assert_rejects(check, rows[:2], rows[::-1])


def test_a_model_that_does_not_fit_fails_in_every_case(tmp_path, capsys):
    words = "decode --sides minijamba --schemes int8-all --cases 1x4 2x4 --memory 0.0001"
    measured = of_file(words, tmp_path / "record.json")
    assert [row["failed"] for row in measured["rows"]] == [apart.NO_ROOM] * 2
    shown = capsys.readouterr().out
    assert "failed: minijamba int8-all, tiny, decode, 1 x 4: out of memory" in shown


def test_vllm_goes_on_without_its_longest_context(monkeypatch):
    """Its engine gets ready for the longest: where that fails, the others are tried without it."""
    tried = []

    def fake(work, asked):
        tried.append(asked.cases)
        if max(context for _, context in asked.cases) > 100:
            raise apart.Broke("no room for the cache")
        yield {"ready": 1.0}
        for case in asked.cases:
            yield serving.case_of(asked, *case) | {"peak_bytes": 1}

    def check(side):
        tried.clear()
        rows = list(serving.rows_of(job(side=side, cases=((1, 4), (1, 500), (2, 4), (2, 500))), {}))
        assert [(row["batch"], row["context"]) for row in rows if "failed" in row] == [(1, 500), (2, 500)]
        assert tried == [((1, 4), (1, 500), (2, 4), (2, 500)), ((1, 4), (2, 4))]

    monkeypatch.setattr(serving, "apart", fake)
    check(VLLM)
    assert_rejects(check, OURS)


def test_a_transformers_that_writes_too_little_is_refused(monkeypatch):
    short = SimpleNamespace(generate=lambda tokens, **rest: tokens)
    monkeypatch.setattr(programs, "_transformers_model", lambda *_: short)
    with pytest.raises(ValueError, match="it wrote 0 tokens, not 2"):
        programs.transformers(job(side=TRANSFORMERS, quantize=None), apart.Memory(CPU))


# vLLM, as far as it can be seen without a GPU.


def test_vllm_is_asked_for_the_same_with_a_share_of_the_card(monkeypatch):
    asked = {}

    class LLM:
        def __init__(self, **options):
            asked.update(options, config=json.loads(Path(options["model"], "config.json").read_text()))

        def generate(self, prompts, how, use_tqdm):
            asked["prompts"] = prompts
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=range(how["max_tokens"]))]) for _ in prompts]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=lambda **options: options))
    for name in programs.ENVIRONMENT:
        monkeypatch.setenv(name, "")
    card = {"memory_bytes": 140 * 2**30, "free_bytes": 139 * 2**30}
    gpu = torch.device("cuda", 0)
    cases = ((1, 1024), (4, 262144))
    theirs = job(side=VLLM, quantize="experts_int8", device=gpu, memory=70, cases=cases, longest=257, card=card)
    program = programs.vllm(replace(theirs, model="mixtral-8x7b"), apart.Memory(gpu))
    assert asked["gpu_memory_utilization"] == 0.5 and asked["quantization"] == "experts_int8"
    assert asked["max_model_len"] == 262401 == asked["config"]["max_position_embeddings"]
    assert asked["max_num_seqs"] == 4 and asked["compilation_config"] == {"cudagraph_capture_sizes": [1, 4]}
    program.write(torch.tensor([[3, 4], [5, 6]]), 3)
    assert asked["prompts"] == [{"prompt_token_ids": [3, 4]}, {"prompt_token_ids": [5, 6]}]
    small = replace(theirs, memory=139, card=card | {"free_bytes": 100 * 2**30})
    assert programs._share(small) == pytest.approx(99.5 / 140)


# A GPU's memory.


def test_a_limit_counts_the_context_and_peaks_do_too(monkeypatch):
    """Of 100 GiB, 2 are in use by the context and 1 waits for kernels; 31 GiB leave 28 to the allocator."""
    shares, gib = [], 2**30
    made = {"mem_get_info": lambda device: (97 * gib, 100 * gib), "memory_reserved": lambda device: gib}
    made |= {"max_memory_reserved": lambda device: 9 * gib, "empty_cache": lambda: None}
    made |= {"memory_allocated": lambda device: gib, "get_per_process_memory_fraction": lambda device: 1.0}
    made["set_per_process_memory_fraction"] = lambda share, device: shares.append(share)
    for name, function in made.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch, "ones", lambda *shape, **options: torch.zeros(shape))
    for module in (apart, throughput):
        monkeypatch.setattr(module, "KERNELS", gib)

    def check(limit):
        shares.clear()
        memory = apart.Memory(torch.device("cuda", 0), limit)
        assert shares == [0.28] and memory.context == 2 * gib and memory.peak == 11 * gib
        card = {"context_bytes": 2 * gib, "free_bytes": 97 * gib}
        assert memory.room == 28 * gib == throughput._room(job(memory=limit, card=card))
        assert throughput._room(job(memory=200, card=card)) == 97 * gib

    check(31)
    assert_rejects(check, 30)
    with pytest.raises(ValueError, match="less than what is in use"):
        apart.Memory(torch.device("cuda", 0), 1)


# Records.


def test_a_run_can_be_added_to_a_record(decoded, tmp_path):
    """Rows that the second run measures are replaced, the others stay and say which run they are of."""
    path = tmp_path / "record.json"
    path.write_text(json.dumps(decoded))
    added = of_file("decode --sides minijamba --schemes int8-all --cases 2x9 3x9 --add --new 2 --repeats 1", path)
    rows = [(row["side"], row["quantize"], row["batch"], row.get("run")) for row in added["rows"]]
    kept = [(OURS, "int8-all", 1, 0), (OURS, None, 1, 0), (OURS, None, 2, 0), (TRANSFORMERS, None, 1, 0)]
    assert rows == [*kept, (TRANSFORMERS, None, 2, 0), (OURS, "int8-all", 2, None), (OURS, "int8-all", 3, None)]
    assert [run["command"] for run in added["earlier"]] == [decoded["command"]]
    with pytest.raises(ValueError, match="was measured on .*, not on Abacus"):
        serving.earlier_in(path, {"name": "Abacus"})


def test_the_table_has_a_column_for_each_side_and_scheme(decoded):
    title, _, head, *lines = bench.table(decoded).splitlines()
    assert title.startswith("decoding on ") and title.endswith(" 1 threads, float32")
    assert head.split("  ")[-1].strip() == "transformers float32" and "minijamba int8-all" in head
    assert sum("tiny, decode in tokens/s" in line for line in lines) == 2
    failed = decoded["rows"][0] | {"failed": "ValueError: too small"}
    shown = bench.table(decoded | {"rows": [failed, *decoded["rows"][1:]]})
    assert "failed: minijamba int8-all, tiny, decode, 1 x 9: ValueError: too small" in shown


def test_what_does_not_exist_is_refused():
    for words, said in {
        "decode --sides nobody": "no side 'nobody'",
        "prefill --models giant": "no preset is called 'giant'",
        "throughput --cases 12": "'12' is no case",
        "decode --device meta": "no device 'meta'",
    }.items():
        with pytest.raises(ValueError, match=said):
            measured_by([*words.split(), "--output", os.devnull])


def test_importing_the_benchmark_needs_no_other_program():
    code = "import sys; sys.modules.update(dict.fromkeys(['transformers', 'vllm'])); import minijamba.bench"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "vllm" in records.PACKAGES
