"""Studies: models that differ in one thing and in nothing else, and a record that says what was done."""

import copy
import json
import math
import sys
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minijamba import budget, cli, preset, study
from minijamba.data import Batch, Windows, prepare
from minijamba.model import Jamba, Trace
from minijamba.probes import copying, induction_scores, switched_off
from minijamba.recipe import DataRecipe, TrainRecipe, load_recipe
from minijamba.rungs import use_rung
from minijamba.tasks import accuracy, task_batch
from minijamba.testing import assert_matches, assert_rejects
from minijamba.tokenizer import ByteTokenizer
from minijamba.train import Record, Trainer, evaluate, schedule

CPU = torch.device("cpu")
TEXTS = {f"{i}.py": "".join(f"def f{j}(x):\n    return x + {i * j % 61}\n\n" for j in range(12)) for i in range(60)}
SMALL = [
    "model.hidden_size=32", "model.intermediate_size=32", "model.num_attention_heads=4", "model.num_experts=4",
    "model.num_hidden_layers=4", "model.attn_layer_period=4", "model.attn_layer_offset=2", "model.mamba_d_state=8",
    "data.packages=[]", "train.batch=2", "train.length=32", "train.bfloat16=false", "log.validation_batches=2",
]  # fmt: skip


def tokens_of(config, batch=2, length=24, seed=0):
    return torch.randint(3, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model(hybrid, long_memory):
    return long_memory(Jamba(hybrid)).eval()


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Generated text, a byte a token."""
    corpus = prepare(TEXTS, ByteTokenizer(), tmp_path_factory.mktemp("tokens"))
    corpus.facts["vocab_size"] = ByteTokenizer.vocab_size
    return study.Setting(1, CPU, load_recipe(study.RECIPE, SMALL), corpus)


# Twins.


@pytest.mark.parametrize("config", [load_recipe(study.RECIPE).config(4096), preset("small")])
def test_twins_have_the_same_number_of_parameters(config):
    def check(twin):
        wanted = budget(config).total_params
        for kind in ("hybrid", "mamba", "attention"):
            assert abs(budget(twin(config, kind)).total_params - wanted) < 0.01 * wanted

    def of_the_same_width(config, kind):
        return replace(study.twin(config, kind), intermediate_size=config.intermediate_size)

    check(study.twin)
    assert_rejects(check, of_the_same_width)


def test_twins_differ_in_their_mixers_alone(hybrid):
    def check(twin):
        mixers = {kind: {layer.mixer for layer in twin(hybrid, kind).layers} for kind in ("mamba", "attention")}
        assert mixers == {"mamba": {"mamba"}, "attention": {"attention"}}
        assert twin(hybrid, "hybrid") == hybrid, "whatever its width is a multiple of"
        for kind in ("mamba", "attention"):
            own = {"pattern", "intermediate_size"}
            assert all(
                getattr(twin(hybrid, kind), name) == value for name, value in vars(hybrid).items() if name not in own
            )
            assert [layer.feed_forward for layer in twin(hybrid, kind).layers] == [
                layer.feed_forward for layer in hybrid.layers
            ]

    def with_fewer_experts(config, kind):
        return replace(study.twin(config, kind), num_experts=2)

    def all_hybrids(config, kind):
        return config

    check(study.twin)
    assert_rejects(check, with_fewer_experts, all_hybrids)
    mixed = replace(hybrid, pattern="m- -E A+", num_hidden_layers=6)
    assert study.twin(mixed, "mamba").schedule == "m- -E m+ m- -E m+"
    assert study.twin(mixed, "attention").schedule == "A- -E A+ A- -E A+"


@pytest.mark.parametrize("config", [load_recipe(study.RECIPE).config(4096), preset("small")])
def test_the_blackmamba_twin_is_one_of_as_many_parameters(config):
    def check(twin):
        wanted = budget(config).total_params
        assert abs(budget(twin).total_params - wanted) < 0.02 * wanted
        assert twin.schedule.split() == ["m-", "-E"] * config.num_hidden_layers
        assert twin.family.name == "blackmamba" and twin.routing == "sinkhorn"

    twin = study.blackmamba_twin(config)
    check(twin)
    assert_rejects(
        check, config, replace(twin, intermediate_size=2 * twin.intermediate_size), replace(twin, routing="softmax")
    )


# What a batch does to the experts.


@torch.no_grad()
def test_balanced_counts_choices_of_use_and_of_the_plan(hybrid):
    torch.manual_seed(0)
    config = replace(study.blackmamba_twin(replace(hybrid, num_experts=4)), intermediate_size=8)
    model = Jamba(config)
    for name, parameter in model.named_parameters():
        if "router" in name:
            parameter.normal_()
    tokens, trace = tokens_of(config, batch=4, length=30), Trace()
    model.train()
    found = study.balanced(model, Batch(tokens, tokens))
    assert model.training, "it leaves the model as it was"
    model.eval()(tokens, trace=trace)
    logits = [layer.flatten(0, 1) for layer in trace.router]

    def check(found):
        for i, layer in enumerate(logits):
            used, plan = layer.argmax(-1).tolist(), by_loops(layer, 2)[0].argmax(-1).tolist()
            assert_matches(found["load"][i], [used.count(e) * 4 / 120 for e in range(4)], 1e-6)
            assert_matches(found["balanced"][i], [plan.count(e) * 4 / 120 for e in range(4)], 1e-6)
            moved = sum(a != b for a, b in zip(used, plan, strict=True)) / 120
            assert found["moved"][i] == pytest.approx(moved) and moved > 0
            for start, better in ("better", True), ("plain", False):
                off = [(120 * by_loops(layer, sweeps, better)[0].sum(1) - 1).abs().max() for sweeps in (1, 2, 5)]
                assert_matches([found["sweeps"][start][i][n] for n in (0, 1, 4)], torch.stack(off).tolist(), 1e-2)

    check(found)
    assert_rejects(
        check,
        found | {"load": found["balanced"]},
        found | {"balanced": found["load"]},
        found | {"sweeps": {"better": found["sweeps"]["plain"], "plain": found["sweeps"]["better"]}},
    )


def by_loops(logits, sweeps, better=True):
    """Sinkhorn's plan by its two factors, u for the tokens and v for the experts."""
    cost = (2 * logits.double()).exp()
    v = 1 / cost.sum(0) if better else torch.ones(cost.shape[1]).double()
    for _ in range(sweeps):
        u = 1 / (cost @ v) / len(cost)
        v = 1 / (u @ cost) / cost.shape[1]
    return u[:, None] * cost * v, v


# Training and its curve.


def test_fit_trains_as_a_recipe_says(hybrid, setting):
    """The losses of five steps, to the last bit."""
    config, steps = replace(hybrid, vocab_size=ByteTokenizer.vocab_size), 5
    options = TrainRecipe(steps, learning_rate=1e-2, warmup=0.2, floor=0.5, weight_decay=0.3, clip=0.1, accumulate=2)
    model = study.build(config, 0, CPU)
    trainer, expected = Trainer(model, weight_decay=0.3, clip=0.1, accumulate=2), []
    for step in range(steps):
        rate = 1e-2 * schedule(step / steps, warmup=0.2, floor=0.5)
        expected.append(trainer.step(setting.batches(0)(step), rate)[0].item())

    def check(options, order=0, seed=0):
        history = study.fit(study.build(config, seed, CPU), setting.batches(order), options)
        assert [record.loss for record in history] == expected and expected[-1] < expected[0]

    check(options)
    others = {"learning_rate": 2e-2, "warmup": 0.3, "floor": 0.1, "weight_decay": 9.0, "clip": 1.0, "accumulate": 1}
    assert_rejects(check, *(replace(options, **{name: value}) for name, value in others.items()))
    assert_rejects(lambda other: check(options, **other), {"order": 1}, {"seed": 1})


def test_looks_come_before_every_25th_step_and_after_the_last(hybrid):
    looks, seen = [], []
    model = study.build(hybrid, 0, CPU)
    tokens = tokens_of(hybrid, batch=1, length=4)
    batch = Batch(tokens, tokens)

    def batches(step):
        seen.append(step)
        return batch

    study.fit(model, batches, TrainRecipe(30), look=lambda step: looks.append((step, len(seen))))
    assert looks == [(0, 0), (25, 25), (30, 30)]


def test_a_curve_holds_means_of_25_steps():
    history = [Record(step, float(step), 2.0 * step, 1.0, 0.1, 3.0, 0.5, 9.0, (1.0,)) for step in range(60)]

    def check(curve):
        found = curve(history)
        assert found["step"] == [24, 49, 59] and found["loss"] == [12.0, 37.0, 54.5]
        assert found["balance"] == [24.0, 74.0, 109.0]
        assert found["norm"] == [1.0] * 3 and found["busiest"] == [3.0] * 3 and found["idlest"] == [0.5] * 3

    def of_single_steps(history):
        chosen = [history[i] for i in (24, 49, 59)]
        return {name: [getattr(record, name) for record in chosen] for name in study.curve(history)}

    check(study.curve)
    assert_rejects(check, of_single_steps)
    assert study.curve([])["loss"] == []


def test_a_setting_draws_text_and_turns_nats_into_bits(setting):
    same, other = setting.batches(3)(7), setting.batches(4)(7)
    expected = Windows(setting.corpus.tokens["train"], 2, 32, seed=3)(7)
    assert torch.equal(same.tokens, expected.tokens) and not torch.equal(other.tokens, expected.tokens)
    validation = setting.validation()
    assert [batch.tokens.shape for batch in validation] == [(2, 32), (2, 32)]
    text = set(setting.corpus.tokens["validation"].tolist())
    assert all(set(batch.tokens.unique().tolist()) <= text for batch in validation)

    def check(bits):
        assert bits == pytest.approx(8.0, rel=1e-6)  # float32's log of 2

    # A byte is a token here, and <eos> is predicted beside the bytes of each document.
    facts = setting.corpus.facts["parts"]["validation"]
    per_byte = (facts["bytes"] + facts["documents"]) / facts["bytes"]
    check(setting.bits(math.log(256)) / per_byte)
    assert_rejects(check, setting.bits(math.log(256)), setting.bits(8.0) / per_byte)


# The inner norms.


class Through(nn.Module):
    """In the place of a norm, nothing."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x):
        return x


NORMS = ("dt_layernorm", "b_layernorm", "c_layernorm")


def with_norms_replaced(model, names):
    model = copy.deepcopy(model)
    for mixer in study.mixers(model):
        for name in names:
            setattr(mixer, name, Through(getattr(mixer, name)))
    return model


def bare(model):
    """The same weights without the norms, which must be ones."""
    config = replace(model.config, mamba_inner_layernorms=False)
    without = Jamba(config).eval()
    kept = {name: value for name, value in model.state_dict().items() if not any(norm in name for norm in NORMS)}
    without.load_state_dict(kept)
    return without


@torch.no_grad()
def test_without_inner_norms_a_mixer_selects_what_it_projects(model, hybrid):
    tokens, without = tokens_of(hybrid), bare(model)

    def check(names):
        assert_matches(without(tokens), with_norms_replaced(model, names)(tokens), 1e-6)  # float32, the same operations

    check(NORMS)
    assert_rejects(check, (), NORMS[:1], NORMS[:2], NORMS[1:])
    mixer, x = study.mixers(without)[0], torch.randn(2, 5, hybrid.d_inner)
    delta, B, C = (x @ mixer.x_proj.weight.T).split([3, 4, 4], dim=-1)
    for found, expected in zip(mixer.select(x), (delta @ mixer.dt_proj.weight.T, B, C), strict=True):
        assert_matches(found, expected, 1e-6)


@pytest.mark.parametrize("rung", ["naive", "parallel", "fused"])
@torch.no_grad()
def test_without_inner_norms_decoding_gives_the_logits_of_the_plain_run(model, hybrid, rung):
    tokens = tokens_of(hybrid, length=6)
    whole = bare(model)(tokens)

    def check(model):
        with use_rung(rung):
            cache = model.new_cache(batch=2)
            steps = [model(tokens[:, t : t + 1], cache=cache) for t in range(6)]
        assert_matches(torch.cat(steps, dim=1), whole, 1e-5)  # float32, four layers

    check(bare(model))
    assert_rejects(check, model)


# What is looked into.


def largest_by_hand(model, batch):
    """Largest sizes by the inputs that reach x_proj."""
    inputs, found = {}, {"delta": [], "B": [], "C": []}
    hooks = [
        mixer.x_proj.register_forward_hook(lambda _, args, __, i=i: inputs.update({i: args[0]}))
        for i, mixer in enumerate(study.mixers(model))
    ]
    model(batch.tokens, segments=batch.segments)
    for hook in hooks:
        hook.remove()
    for i, mixer in enumerate(study.mixers(model)):
        parts = mixer.x_proj(inputs[i]).split([len(getattr(mixer, norm).weight) for norm in NORMS], dim=-1)
        delta, B, C = (getattr(mixer, norm)(part) for norm, part in zip(NORMS, parts, strict=True))
        for name, values in ("delta", F.linear(delta, mixer.dt_proj.weight)), ("B", B), ("C", C):
            found[name].append(values.abs().max().item())
    return found


@torch.no_grad()
def test_inner_sizes_are_the_largest_values_that_select_gives(model, hybrid):
    tokens = tokens_of(hybrid)
    segments = torch.arange(24).div(9, rounding_mode="floor").expand(2, -1)
    batch, expected = Batch(tokens, tokens, segments), largest_by_hand(model, Batch(tokens, tokens, segments))

    def check(batch):
        assert_matches(study.inner_sizes(model, batch), expected, 1e-6)  # float32, sums of tens of terms

    check(batch)
    assert_rejects(check, Batch(tokens, tokens), Batch(tokens[:, :3], tokens[:, :3]))
    # Without norms nothing bounds them, and the same watch sees it.
    grown = bare(model)
    for mixer in study.mixers(grown):
        mixer.x_proj.weight.mul_(50)
    assert min(study.inner_sizes(grown, batch)["B"]) > 5 * max(expected["B"])


def test_the_watch_is_gone_afterwards_also_after_an_exception(model, hybrid):
    tokens = tokens_of(hybrid)
    selects = [mixer.select for mixer in study.mixers(model)]

    def check(inner_sizes):
        model.lm_head.register_forward_pre_hook(refuse)
        with pytest.raises(KeyError):
            inner_sizes(model, Batch(tokens, tokens))
        assert [mixer.select for mixer in study.mixers(model)] == selects

    def refuse(*_):
        raise KeyError

    def leaving_it(model, batch):
        for mixer in study.mixers(model):
            mixer.select = partial(mixer.select)
        model(batch.tokens)

    study.inner_sizes(model, Batch(tokens, tokens))
    assert [mixer.select for mixer in study.mixers(model)] == selects
    check(study.inner_sizes)
    assert_rejects(check, leaving_it)


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("as in Mamba", ()),
        ("zero bias", ("dt_proj.bias",)),
        ("one decay", ("A_log",)),
        ("both", ("dt_proj.bias", "A_log")),
    ],
)
def test_a_wrong_start_changes_what_it_says_and_nothing_else(hybrid, kind, parts):
    own = dict(study.build(hybrid, 0, CPU).named_parameters())
    wanted = {name for name in own if name.endswith(parts)} if parts else set()

    def check(kind):
        model = study.build(hybrid, 0, CPU)
        assert study.wrong_start(model, kind) is model
        changed = {name for name, value in model.named_parameters() if not torch.equal(value, own[name])}
        assert changed == wanted and all(not model.get_parameter(name).any() for name in wanted)
        assert len(wanted) == len(parts) * len(study.mixers(model))

    check(kind)
    assert_rejects(check, *({"as in Mamba", "zero bias", "one decay", "both"} - {kind}))
    decays = study.mixers(study.wrong_start(study.build(hybrid, 0, CPU), "one decay"))[0].A
    assert (decays == -1).all()


def test_what_is_looked_into_is_what_the_probes_find(model, monkeypatch):
    """Heads above the bound are switched off together, whatever layer they are in."""
    scores = induction_scores(model)
    bound = scores.flatten().sort().values[-3].item()  # leaves two heads
    monkeypatch.setattr(study, "INDUCTION", bound)

    def check(bound):
        heads = {
            layer: [head for head in range(4) if row[head] > bound]
            for layer, row in zip((1, 3), scores.tolist(), strict=True)
        }
        heads = {layer: chosen for layer, chosen in heads.items() if chosen}
        with switched_off(model, heads):
            off = list(copying(model))
        found = study.looked_into(model)
        assert found["switched_off"] == heads and sum(map(len, heads.values())) == 2
        assert_matches(found["copying_switched_off"], off, 1e-6)
        assert_matches(found["induction"], scores.tolist(), 1e-6)
        assert_matches(found["copying"], list(copying(model)), 1e-6)

    check(bound)
    assert_rejects(check, 0.0, 1.0)


def test_a_model_without_attention_has_no_heads_to_look_at(hybrid):
    model = study.build(study.twin(hybrid, "mamba"), 0, CPU)
    assert study.looked_into(model).keys() == {"copying"} and not model.training


# Recall by the size of the state.


@pytest.mark.parametrize(("kind", "schedule"), [("mamba", ["mamba", "mamba"]), ("hybrid", ["mamba", "attention"])])
def test_recall_compares_two_layers_that_differ_in_state_and_mixer(kind, schedule):
    def check(kind):
        config = study.recall_config(kind, states=16, vocabulary=40, width=32)
        assert [layer.mixer for layer in config.layers] == schedule
        assert {layer.feed_forward for layer in config.layers} == {"mlp"}
        assert config.mamba_d_state == 16 and config.vocab_size == 40 and config.hidden_size == 32

    check(kind)
    assert_rejects(check, {"mamba": "hybrid", "hybrid": "mamba"}[kind])
    assert study.recall_config(kind, 4, 40) == replace(study.recall_config(kind, 16, 40), mamba_d_state=4)


@torch.no_grad()
def test_recalled_is_the_share_of_right_answers():
    model = study.build(study.recall_config("hybrid", 4, 40, width=16), 0, CPU).train()
    batch = task_batch("associative_recall", 4, 32, seed=0, step=0, pairs=4, vocabulary=40)
    right = model.eval()(batch.tokens).argmax(-1)

    def check(share):
        judged = (batch.targets >= 0).nonzero()
        targets = torch.full_like(batch.targets, -100)
        for i, (row, place) in enumerate(judged.tolist()):
            likeliest = right[row, place]
            targets[row, place] = likeliest if i % 4 < 4 * share else (likeliest + 1) % 40
        assert study.recalled(model, Batch(batch.tokens, targets)) == 0.75
        assert accuracy(model(batch.tokens), targets) == 0.75

    check(0.75)
    assert_rejects(check, 0.5, 1.0)


def test_pairs_are_drawn_once_and_alike_for_all_models():
    study._pairs.cache_clear()
    first = study._pairs(0, 8, 5)
    assert study._pairs(0, 8, 5) is first and study._pairs.cache_info().hits == 1
    expected = task_batch("associative_recall", study.RECALL_BATCH, seed=0, step=5, pairs=8, **study.RECALL)

    def check(*case):
        assert torch.equal(study._pairs(*case).tokens, expected.tokens)

    check(0, 8, 5)
    assert_rejects(lambda case: check(*case), (1, 8, 5), (0, 32, 5), (0, 8, 6))


# Whole studies, in miniature.

WEIGHTS, STARTS = [0.0, 0.001, 0.01], ["as in Mamba", "zero bias", "one decay", "both"]
KEYS = {
    "twins": {
        "twin", "seed", "schedule", "intermediate_size", "parameters", "active_parameters", "tokens",
        "tokens_per_second", "validation_loss", "bits_per_byte", "curve", "copying", "needle",
    },
    "balance": {"weight", "seed", "validation_loss", "tokens_per_second", "curve"},
    "norms": {"inner_norms", "seed", "validation_loss", "tokens_per_second", "curve", "sizes"},
    "start": {"start", "seed", "validation_loss", "tokens_per_second", "curve"},
    "recall": {"twin", "states", "pairs", "seed", "accuracy"},
    "blackmamba": {
        "router", "seed", "parameters", "active_parameters", "tokens", "tokens_per_second", "validation_loss",
        "bits_per_byte", "curve", "copying", "untrained", "trained",
    },
}  # fmt: skip
STEPS = 3


@pytest.fixture
def small(monkeypatch):
    """Little text, short needles and few pairs."""
    monkeypatch.setattr(DataRecipe, "documents", lambda recipe: TEXTS)
    for name, value in {
        "NEEDLE_LENGTHS": (48, 64), "NEEDLE_DEPTHS": (0.0, 1.0), "RECALL_STATES": (1, 4), "RECALL_PAIRS": (2, 3),
        "RECALL_BATCH": 4, "RECALL": {"vocabulary": 32, "length": 16},
    }.items():  # fmt: skip
        monkeypatch.setattr(study, name, value)
    study._pairs.cache_clear()
    yield
    study._pairs.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the tokens are kept: they are made once."""
    return tmp_path_factory.mktemp("study")


@pytest.fixture
def measured(small, folder, tmp_path):
    def run(name, steps=STEPS, seeds=1, changes=SMALL):
        changes = [] if name == "recall" else changes
        options = {"steps": steps, "seeds": seeds, "changes": changes}
        path = study.study(name, "cpu", folder=folder, output=tmp_path / "a", **options)
        return json.loads(path.read_text())

    return run


@pytest.mark.parametrize("name", study.STUDIES)
def test_a_study_records_its_rows_and_how_they_came_about(name, measured):
    def check(found):
        assert found["name"] == f"{name}_cpu" and found["train"]["steps"] == STEPS and found["seeds"] == 1
        assert found["command"].startswith("minijamba") and found["versions"]["torch"] == version("torch")
        for row in found["rows"]:
            assert row.keys() - {"induction", "switched_off", "copying_switched_off"} == KEYS[name]
            if "curve" in row:
                assert row["curve"]["step"] == [STEPS - 1] and 5 < row["curve"]["loss"][0] < 12
                assert 5 < row["validation_loss"] < 12  # ln 4096 = 8.3, after three steps

    found = measured(name)
    check(found)
    assert_rejects(check, found | {"train": {"steps": 0}}, found | {"rows": [{}]})
    trained = {"batch": 4, "length": 16, "vocabulary": 32} if name == "recall" else {"batch": 2, "length": 32}
    assert trained.items() <= found["train"].items()


@pytest.mark.parametrize("name", ["balance", "recall"])
def test_a_study_is_trained_as_its_record_says(name, measured, monkeypatch):
    fit, used = study.fit, []

    def watched(model, batches, options, **others):
        used.append((options, batches(0).tokens.shape))
        return fit(model, batches, options, **others)

    monkeypatch.setattr(study, "fit", watched)
    found = measured(name)

    def check(said):
        for options, shape in used:
            assert vars(options).items() <= said.items() and shape == (said["batch"], said["length"])

    check(found["train"])
    assert found["train"]["warmup"] == 0.05 and found["train"]["floor"] == 0.1
    assert_rejects(check, found["train"] | {"warmup": 0.02}, found["train"] | {"length": 9})


def test_twins_see_the_same_text_and_differ_in_mixers(measured):
    rows = measured("twins", seeds=2, steps=1)["rows"]
    assert [(row["twin"], row["seed"]) for row in rows] == [
        (kind, seed) for seed in (0, 1) for kind in ("hybrid", "mamba", "attention")
    ]
    for row in rows:
        assert ("A" in row["schedule"], "m" in row["schedule"]) == {
            "hybrid": (True, True), "mamba": (False, True), "attention": (True, False)
        }[row["twin"]]  # fmt: skip
        assert ("induction" in row) == (row["twin"] != "mamba") and row["tokens"] == 2 * 32
        assert len(row["needle"]) == 2 and all(0 <= share <= 1 for line in row["needle"] for share in line)
        assert row["active_parameters"] < row["parameters"] and row["tokens_per_second"] > 0
        assert 0 < row["bits_per_byte"] < row["validation_loss"]

    def check(rows):
        losses = {row["twin"]: row["curve"]["loss"][0] for row in rows}
        assert len(set(losses.values())) == 3

    check(rows[:3])
    assert_rejects(check, [row | {"curve": rows[0]["curve"]} for row in rows])
    assert rows[0]["validation_loss"] != rows[3]["validation_loss"], "seeds are different models"


def test_what_a_study_varies_is_varied(measured):
    assert [row["weight"] for row in measured("balance")["rows"]] == WEIGHTS
    with_norms, without = measured("norms")["rows"]
    assert (with_norms["inner_norms"], without["inner_norms"]) == (True, False)
    assert [[size["step"] for size in row["sizes"]] for row in (with_norms, without)] == [[0, STEPS]] * 2
    # A norm of weight one gives a root mean square of one over 8 states: a largest value from 1 to sqrt(8).
    assert all(1 <= with_norms["sizes"][0][name] <= 8**0.5 for name in "BC")
    assert all(without["sizes"][0][name] < 1 for name in "BC"), "projections start small"
    rows = measured("start")["rows"]
    assert [row["start"] for row in rows] == STARTS
    assert len({row["validation_loss"] for row in rows}) == 4
    rows = measured("blackmamba")["rows"]
    assert [row["router"] for row in rows] == list(study.ROUTERS)
    assert len({row["validation_loss"] for row in rows}) == 4
    rows = measured("recall", seeds=2)["rows"]
    assert [tuple(row[name] for name in ("seed", "pairs", "twin", "states")) for row in rows] == [
        (seed, pairs, kind, states)
        for seed in (0, 1) for pairs in (2, 3) for kind in ("mamba", "hybrid") for states in (1, 4)
    ]  # fmt: skip
    assert all(0 <= row["accuracy"] <= 1 for row in rows)


def test_recall_is_judged_on_pairs_that_were_not_trained_on(small, monkeypatch):
    """Steps enough to learn a few batches by heart; the judged batch is none of them."""
    trained, judged = [], []
    fit = study.fit

    def watched_fit(model, batches, options, **others):
        trained.extend(batches(step).tokens for step in range(options.steps))
        return fit(model, batches, options, **others)

    def watched_recalled(model, batch):
        judged.append(batch.tokens)
        return 0.0

    monkeypatch.setattr(study, "fit", watched_fit)
    monkeypatch.setattr(study, "recalled", watched_recalled)
    list(study.recall(study.Setting(1, CPU, load_recipe(study.RECIPE, ["train.steps=2", "train.bfloat16=false"]))))

    def check(judged):
        assert not any(torch.equal(tokens, seen) for tokens in judged for seen in trained)

    assert len(judged) == 8
    check(judged)
    assert_rejects(check, trained)


def test_the_study_judges_the_model_that_it_trained(measured, setting, monkeypatch):
    """The loss that is recorded is the trained model's on the validation text."""
    models, evaluated = [], []
    build = study.build
    monkeypatch.setattr(study, "build", lambda *arguments: models.append(build(*arguments)) or models[-1])

    def watched(model, batches, bfloat16):
        evaluated.append(evaluate(model, batches, bfloat16))
        return evaluated[-1]

    monkeypatch.setattr(study, "evaluate", watched)
    rows = measured("balance")["rows"]
    assert [row["validation_loss"] for row in rows] == evaluated and len(models) == 3
    assert [model.config.router_aux_loss_coef for model in models] == WEIGHTS


def test_another_text_is_not_taken_for_the_first(measured, folder, monkeypatch):
    """Tokens are kept between studies, those of each text by themselves."""
    packages = {name: text.replace("return", "yield") for name, text in TEXTS.items()}
    monkeypatch.setattr(DataRecipe, "documents", lambda recipe: packages if recipe.packages else TEXTS)
    prepared = []

    def watched(*arguments, **options):
        prepared.append(prepare(*arguments, **options))
        return prepared[-1]

    monkeypatch.setattr(study, "prepare", watched)

    def text(*changes):
        measured("balance", steps=1, changes=[*SMALL, *changes])
        return prepared[-1].facts["parts"]["train"]["sha256"]

    def check(*changes):
        assert text(*changes) != text()

    check('data.packages=["one"]')
    assert_rejects(check, "train.batch=1")
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("triplets", {}, "no study 'triplets': choose of twins, balance, norms, start, blackmamba, recall"),
        ("twins", {"steps": 0}, "0 steps and 3 seeds train nothing"),
        ("recall", {"seeds": -1}, "3000 steps and -1 seeds"),
        ("twins", {"changes": ["train.batchs=3"]}, "did you mean train.batch"),
        ("recall", {"changes": ["train.batch=3"]}, "recall is trained on a task, not by the recipe"),
    ],
)
def test_a_study_that_cannot_be_is_refused(name, options, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        study.study(name, "cpu", output=tmp_path / "a", folder=tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_the_command_is_recorded_as_it_would_be_repeated(small, tmp_path, monkeypatch, capsys):
    """Where the figures were written, and from which commit, says nothing about them."""
    monkeypatch.chdir(tmp_path)
    words = ["study", "recall", "--steps", "1", "--seeds", "1", "--device", "cpu"]
    arguments = [*words, "--output", str(tmp_path / "a.json"), "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", ["minijamba", *arguments])
    assert cli.main(arguments) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["commit"] == "abc" and "recorded in" in capsys.readouterr().out

    def check(command):
        assert command.split() == ["minijamba", *words]

    check(found["command"])
    assert_rejects(check, " ".join(["minijamba", *arguments]))
