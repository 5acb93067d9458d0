"""The laws of `conformance`: ours keeps them all, and each planted fault breaks those that it should, and no other."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import minijamba as mj
from minijamba import conformance
from minijamba.adapters import ours
from minijamba.bench.records import place
from minijamba.cli import main
from minijamba.conformance import CONFIG, FAILS, HOLDS, LAWS, NOT_OFFERED, conform, find, table
from minijamba.mamba import Mamba
from minijamba.moe import MoE
from minijamba.testing import assert_rejects

TITLES = [law.__name__.replace("_", " ") for law in LAWS]


@pytest.fixture(scope="module", autouse=True)
def no_kernels():
    """Kernels would run in Triton's interpreter, and have their own tests."""
    with mj.use_rung("parallel"):
        yield


def planted(name, **parts):
    """Ours, but for some parts."""
    kept = {part: getattr(ours, part) for part in (*conformance.NEEDED, "copy_cache")}
    return SimpleNamespace(**kept | {"NAME": name} | parts)


def zero(cache, what):
    for layer in cache.layers:
        if hasattr(layer, what):
            getattr(layer, what).zero_()


def forgets_the_state(model, tokens, cache=None):
    """Between calls of several tokens, as where the step from a cache is made for one token alone."""
    if cache is not None and tokens.shape[1] > 1:
        zero(cache, "state")
    return ours.forward_with_cache(model, tokens, cache)


def forgets_the_window(model, tokens, cache=None):
    if cache is not None:
        zero(cache, "window")
    return ours.forward_with_cache(model, tokens, cache)


def starts_anew(model, tokens, cache=None):
    return ours.forward_with_cache(model, tokens, None)


def rounds_the_state(model, tokens, cache=None):
    logits, cache = ours.forward_with_cache(model, tokens, cache)
    for layer in cache.layers:
        if hasattr(layer, "state"):
            layer.state.copy_(layer.state.to(model.dtype))
    return logits, cache


def leaks_padding(model, tokens, mask=None, segments=None):
    return model(tokens, segments=segments)


def pushes_rows_to_the_right(model, tokens, mask=None, segments=None):
    """Padding behind a row is moved before it, and then read."""
    if mask is None or not mask[:, 0].all():
        return ours.forward(model, tokens, mask, segments)
    shifts = (~mask).sum(1).tolist()
    pushed = torch.stack([row.roll(shift) for row, shift in zip(tokens, shifts, strict=True)])
    return torch.stack([row.roll(-shift, 0) for row, shift in zip(model(pushed), shifts, strict=True)])


def leaks_documents(model, tokens, mask=None, segments=None):
    return model(tokens, mask=mask)


def leaks_documents_in_mamba(model, tokens, mask=None, segments=None):
    hooks = [
        module.register_forward_pre_hook(lambda _, given: (given[0], replace(given[1], documents=None), *given[2:]))
        for module in model.modules()
        if isinstance(module, Mamba)
    ]
    logits = model(tokens, mask=mask, segments=segments)
    for hook in hooks:
        hook.remove()
    return logits


def renormalises(folder, dtype):
    model = ours.load(folder, dtype)
    for module in model.modules():
        if isinstance(module, MoE):
            module.renormalise = True
    return model


def gates_with_sigmoids(folder, dtype):
    model = ours.load(folder, dtype)
    for module in model.modules():
        if isinstance(module, MoE) and module.chosen < CONFIG.num_experts:
            module.routing = "sigmoid"
    return model


def starts_with(value, end):
    def build(config):
        model = mj.Jamba(config)
        for name, parameter in model.named_parameters():
            if name.endswith(end):
                nn.init.constant_(parameter, value)
        return model

    return build


def says_nothing(model, tokens, mask=None, segments=None):
    return model(tokens, mask=mask, segments=segments) * torch.nan


def breaks_off(model, tokens, cache=None):
    raise RuntimeError("two dtypes meet\nand more")


CONTINUING = {"token by token", "every split", "reuse"}
# The adapter, the laws that it breaks, and what is said of the first of them.
FAULTS = [
    (planted("forgets the state", forward_with_cache=forgets_the_state), {"every split", "reuse"}, "recurrent state"),
    (planted("forgets the window", forward_with_cache=forgets_the_window), CONTINUING, "convolution's window"),
    (planted("breaks off", forward_with_cache=breaks_off), CONTINUING, "RuntimeError: two dtypes meet"),
    (planted("leaks padding", forward=leaks_padding), {"left padding"}, "as if padding were text"),
    (planted("pushes rows", forward=pushes_rows_to_the_right), {"right padding"}, "no mistake that is known"),
    (planted("leaks documents", forward=leaks_documents), {"packing"}, "all were one document"),
    (planted("shared copies", copy_cache=lambda cache: cache), {"reuse"}, "both copies were one"),
    (planted("renormalises", load=renormalises), {"router weights"}, "add up to one"),
    (planted("delta's bias 0", build=starts_with(0.0, "dt_proj.bias")), {"initialisation"}, "0.69 to 0.69"),
]
# Others that break one of these laws, and what is said of them.
VARIANTS = [
    (planted("says nothing", forward=says_nothing), conformance.plain_run, "not finite"),
    (planted("starts anew", forward_with_cache=starts_anew), conformance.token_by_token, "a sequence of its own"),
    (planted("deaf Mamba", forward=leaks_documents_in_mamba), conformance.packing, "as if attention alone"),
    (planted("sigmoids", load=gates_with_sigmoids), conformance.router_weights, "a sigmoid"),
    (planted("one delta", build=starts_with(-4.6, "dt_proj.bias")), conformance.initialisation, "not spread"),
    (planted("A all one", build=starts_with(0.0, "A_log")), conformance.initialisation, "A_log is not"),
    (planted("no D", build=starts_with(0.0, ".D")), conformance.initialisation, "D is not 1"),
]


@pytest.fixture(scope="module")
def found():
    """Verdicts on the planted faults: precision, the slowest law, is for the test below."""
    return conform([adapter for adapter, _, _ in FAULTS], [law for law in LAWS if law.__name__ != "precision"])


def rows_of(found, adapter):
    return [row for row in found["rows"] if row["side"] == adapter.NAME]


@pytest.mark.parametrize(("adapter", "broken", "seen"), FAULTS, ids=[adapter.NAME for adapter, _, _ in FAULTS])
def test_a_fault_breaks_the_laws_that_it_should(found, adapter, broken, seen):
    rows = rows_of(found, adapter)
    assert [row["law"] for row in rows] == TITLES[:-1]
    assert {row["law"] for row in rows if row["verdict"] == FAILS} == broken
    assert {row["law"] for row in rows if row["verdict"] == HOLDS} == set(TITLES[:-1]) - broken
    assert seen in next(row["seen"] for row in rows if row["verdict"] == FAILS)


def test_ours_keeps_all_laws_and_a_rounded_state_breaks_precision():
    rounded = planted("rounds", forward_with_cache=rounds_the_state)
    found = conform([ours, rounded])
    assert [(row["law"], row["verdict"]) for row in rows_of(found, ours)] == [(title, HOLDS) for title in TITLES]
    assert [row["law"] for row in rows_of(found, rounded) if row["verdict"] != HOLDS] == ["precision"]
    kept, lost = (rows_of(found, adapter)[-1] for adapter in (ours, rounded))
    assert "rounding adds up" in lost["seen"] and "token by token" in lost["seen"]
    # Rounded states lie well above the limit, and what keeps the law well below.
    assert lost["error"] > 1.5 * conformance.TIMES_OURS * kept["error"]


@pytest.mark.parametrize(("adapter", "law", "seen"), VARIANTS, ids=[adapter.NAME for adapter, _, _ in VARIANTS])
def test_a_fault_is_named(adapter, law, seen):
    right, wrong = conform([ours, adapter], [law])["rows"]
    assert right["verdict"] == HOLDS and wrong["verdict"] == FAILS and seen in wrong["seen"]


def test_a_lost_state_is_counted(found):
    """All splits but the one before the last token, whose call is a single step."""
    row = next(row for row in found["rows"] if row["side"] == "forgets the state" and row["law"] == "every split")
    assert row["seen"].startswith("17 of 18 splits are wrong")
    assert row["error"] > 100 * conformance.TOLERANCE and row["same_choice"] < 1


def test_no_router_of_the_laws_is_near_a_tie(tmp_path):
    """Else rounding could choose other experts, and the verdict on the router would be luck."""
    path = conformance.Desk(tmp_path).checkpoint(torch.float32, num_experts_per_tok=2)
    trace = mj.Trace()
    ours.load(path, torch.float64)(conformance.draw(2, 40), trace=trace)

    def check(tolerance):
        for logits in trace.router:
            ranked = logits.sort(descending=True).values
            assert (ranked[..., 1] - ranked[..., 2]).min() > 2 * tolerance * logits.abs().max()

    check(1e-5)  # what float32 can be off by
    assert_rejects(check, 1.0)


# Adapters

LITTLE = """
from minijamba.adapters.ours import build, load
NAME = "little"
NOTE = "as its author says"

def forward(model, tokens, mask=None, segments=None):
    if mask is not None or segments is not None:
        raise NotImplementedError("text alone")
    return model(tokens)

def forward_with_cache(model, tokens, cache=None):
    raise NotImplementedError("it has no cache")
"""
WITHOUT_PRECISION = LAWS[:-1]


@pytest.fixture
def little(tmp_path):
    path = tmp_path / "little_adapter.py"
    path.write_text(LITTLE)
    return path


def test_what_is_not_offered_is_no_failure(little):
    rows = conform([str(little)], WITHOUT_PRECISION)["rows"]
    kept = {"plain run", "router weights", "initialisation"}
    assert {row["law"] for row in rows if row["verdict"] == HOLDS} == kept
    assert {row["law"]: row["seen"] for row in rows if row["verdict"] == NOT_OFFERED} == {
        "token by token": "it has no cache", "every split": "it has no cache", "reuse": "it has no cache",
        "left padding": "text alone", "right padding": "text alone", "packing": "text alone",
    }  # fmt: skip


def test_without_a_cache_precision_is_that_of_a_run_at_once(little):
    class Desk(conformance.Desk):
        least = 0.01

    def check(adapter):
        case = conformance.Case(adapter, Desk(little.parent))
        with torch.no_grad():
            result = conformance.precision(case)
        assert result.verdict == HOLDS and result.seen.startswith("at once off by")

    def in_halves(model, tokens, mask=None, segments=None):
        return (2 * model(tokens)).round() / 2

    def says_nothing_again(model, tokens, mask=None, segments=None):
        return says_nothing(model, tokens)

    adapter = find(str(little))
    check(adapter)
    for forward in (in_halves, says_nothing_again):
        assert_rejects(check, planted(forward.__name__, forward=forward, forward_with_cache=adapter.forward_with_cache))


def test_parameters_under_other_names_are_no_failure():
    nameless = planted("nameless", named_parameters=lambda model: [("weight", torch.ones(2))])
    (row,) = conform([nameless], [conformance.initialisation])["rows"]
    assert row["verdict"] == NOT_OFFERED and "named_parameters" in row["seen"]


def test_logits_of_another_shape_are_refused():
    (row,) = conform([planted("short", forward=lambda model, tokens: model(tokens)[:, -1])], LAWS[:1])["rows"]
    assert row["verdict"] == FAILS and "logits must be (b, t, v), here (2, 40, 41), not (2, 41)" in row["seen"]


def test_an_error_of_a_law_is_not_the_implementation_s():
    def wrong_law(case):
        """Breaks off by itself."""
        case.models()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        conform([ours], [wrong_law])


def test_an_error_goes_through_when_asked_for():
    with pytest.raises(RuntimeError, match="two dtypes meet"):
        conform([planted("breaks off", forward_with_cache=breaks_off)], [conformance.token_by_token], debug=True)


@pytest.mark.parametrize("name", ["transformers", "mambapy"])
def test_adapters_of_others_run(name):
    found = conform([name], [conformance.plain_run, conformance.right_padding, conformance.token_by_token])
    assert [row["verdict"] for row in found["rows"]] == [HOLDS] * 3
    assert found["sides"][name]["versions"].keys() == {name}


def test_adapters_are_found_by_path_and_by_dotted_name(little, monkeypatch):
    assert find(str(little)).NAME == "little"
    assert find("ours") is find("minijamba") is find("minijamba.adapters.ours") is ours
    monkeypatch.syspath_prepend(little.parent)
    assert find("little_adapter").NAME == "little"


def test_an_adapter_imports_its_neighbours(little):
    (little.parent / "the_model_beside.py").write_text("NAME = 'neighbour'")
    little.write_text(LITTLE + "from the_model_beside import NAME\n")
    assert find(str(little)).NAME == "neighbour"


def test_bad_names_are_refused(little, tmp_path, capsys):
    needy, wrong, empty = (tmp_path / f"{name}.py" for name in ("needy_adapter", "wrong_adapter", "empty"))
    needy.write_text("import no_such_package")
    wrong.write_text("from minijamba.mamba import Mamba9")
    empty.write_text("NAME = 'empty'")
    for name, message in {
        "transfomers": "'transfomers' is no module: give minijamba, ours, transformers, mambapy",
        "minijamba.nothing": "'minijamba.nothing' is no module",
        str(tmp_path / "absent.py"): "there is no such file",
        str(needy): "needs no_such_package, which is not installed",
        str(wrong): "cannot be imported: cannot import name 'Mamba9' from 'minijamba.mamba'",
        str(empty): "is no adapter, it lacks build, load, forward, forward_with_cache",
    }.items():
        assert main(["conform", name]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="lacks NAME"):
        conform([SimpleNamespace()])
    with pytest.raises(ValueError, match="called the same"):
        conform(["ours", "minijamba"])


# The report


def test_the_verb_prints_and_records(little, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(conformance, "conform", partial(conform, laws=[conformance.plain_run, conformance.packing]))
    assert main(["conform", "ours", str(little), "--record", str(tmp_path / "laws.json")]) == 0
    record = json.loads((tmp_path / "laws.json").read_text())
    printed = capsys.readouterr().out
    assert printed.startswith(table(record)) and "recorded in" in printed
    assert record["name"] == "laws" and record["versions"]["torch"] == torch.__version__
    lines = table(record).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")][1:-1] == ["law", f"minijamba {mj.__version__}", "little"]
    assert "not offered" in lines[3] and "holds" in lines[3]
    assert lines[-2:] == ["- little: as its author says.", "- little, packing: not offered, text alone."]

    little.write_text(LITTLE.replace("model(tokens)", "model(tokens) + 1"))
    assert main(["conform", str(little)]) == 1
    assert "**fails**" in capsys.readouterr().out


def test_the_shipped_record_is_whole():
    record = json.loads(place("conformance_cpu").read_text(encoding="utf-8"))

    def check(record):
        assert list(record["laws"]) == TITLES
        expected = [(side, law) for side in ("minijamba", "transformers", "mambapy") for law in TITLES]
        assert [(row["side"], row["law"]) for row in record["rows"]] == expected
        assert {row["verdict"] for row in record["rows"] if row["side"] == "minijamba"} == {HOLDS}
        assert record["command"] == "minijamba conform minijamba transformers mambapy"
        shown = table(record)
        assert all(f"| {law} " in shown for law in TITLES)

    check(record)
    assert_rejects(check, record | {"rows": record["rows"][:-1]}, record | {"laws": {}}, record | {"command": ""})
