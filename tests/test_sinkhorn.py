"""Sinkhorn's plan, and the routing that uses it: even over all tokens in training, each token by itself afterwards."""

import argparse
import inspect
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from refusals import assert_names, refusal
from torch import Tensor

import minijamba as mj
from minijamba import moe
from minijamba.checkpoint import SHIPPED
from minijamba.moe import MoE, expert_load, route, sinkhorn
from minijamba.testing import assert_matches, assert_rejects
from minijamba.tokenizer import load_tokenizer

# float64, sums of some thousands of terms in another order.
FLOAT64 = 1e-10
TOKENS, EXPERTS = (1, 2, 7, 64, 512, 4096), (2, 5, 8)
MANY = 60  # sweeps, after which no mass changes any more


def random_logits(tokens: int, experts: int, bias: float = 0.0, seed: int = 0) -> Tensor:
    """Logits of scale 1, and an offset of scale `bias` for every expert: its popularity."""
    generator = torch.Generator().manual_seed(1000 * tokens + 10 * experts + seed)
    logits = torch.randn(tokens, experts, generator=generator)
    return (logits + bias * torch.randn(experts, generator=generator)).double()


def unevenness(plan: Tensor) -> float:
    """The largest error of a mass: of a token, which should be 1 / T, or of an expert, 1 / E."""
    tokens, experts = plan.shape
    return max(float((plan.sum(1) - 1 / tokens).abs().max()), float((plan.sum(0) - 1 / experts).abs().max()))


def sweeps_needed(logits: Tensor, better_start: bool, error: float = 1e-4) -> int:
    for sweeps in range(1, MANY + 1):
        if unevenness(sinkhorn(logits, sweeps, better_start=better_start)) <= error:
            return sweeps
    raise AssertionError(f"{MANY} sweeps leave more than {error}")


# Plans that only one side of is even; `sweeps` is taken for the same signature.


def even_over_experts_only(logits, sweeps=0, **_):
    return (2 * logits).softmax(0) / logits.shape[1]


def even_over_tokens_only(logits, sweeps=0, **_):
    return (2 * logits).softmax(1) / logits.shape[0]


def one_sweep(logits, sweeps=0, **options):
    return sinkhorn(logits, 1, **options)


# The plan


def naive(logits, sweeps, better_start=True, sharpness=2.0, tokens_last=False) -> Tensor:
    """Alternating normalisation of exp(2 logits), number by number."""
    plan = [[math.exp(sharpness * x) for x in row] for row in logits.tolist()]
    tokens, experts = len(plan), len(plan[0])

    def even_tokens():
        for row in plan:
            mass = sum(row)
            row[:] = [x / mass / tokens for x in row]

    def even_experts():
        for e in range(experts):
            mass = sum(row[e] for row in plan)
            for row in plan:
                row[e] = row[e] / mass / experts

    if better_start:
        even_experts()
    for _ in range(sweeps):
        even_tokens()
        even_experts()
    if tokens_last:
        even_tokens()
    return torch.tensor(plan, dtype=torch.float64)


@pytest.mark.parametrize("better_start", [True, False])
@pytest.mark.parametrize("sweeps", [1, 2, 5])
@pytest.mark.parametrize("sizes", [(1, 5), (2, 2), (7, 8), (64, 5)])
def test_it_is_alternating_normalisation(sizes, sweeps, better_start):
    logits = random_logits(*sizes, bias=2.0)

    def check(expected):
        assert_matches(sinkhorn(logits, sweeps, better_start=better_start), expected, FLOAT64, "plan")

    check(naive(logits, sweeps, better_start))
    if sizes[0] > 1:
        assert_rejects(
            check,
            naive(logits, sweeps, better_start, sharpness=1.0),
            naive(logits, sweeps, not better_start),
            naive(logits, sweeps + 1, better_start),
            naive(logits, sweeps, better_start, tokens_last=True),
            even_over_experts_only(logits),
            even_over_tokens_only(logits),
        )
    if (sweeps, better_start) == (moe.router.SWEEPS, True):
        assert_matches(sinkhorn(logits), sinkhorn(logits, sweeps, better_start=True), 0, "what is used by itself")


@pytest.mark.parametrize("better_start", [True, False])
@pytest.mark.parametrize("bias", [0.0, 2.0])
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_many_sweeps_make_all_masses_even(tokens, experts, bias, better_start):
    logits = random_logits(tokens, experts, bias)

    def check(plan):
        plan = plan(logits, MANY, better_start=better_start)
        assert (plan >= 0).all() and plan.dtype == torch.float64
        assert unevenness(plan) < 1e-6
        assert_matches(plan.sum(), 1.0, FLOAT64, "sum")

    check(sinkhorn)
    wrong = [even_over_tokens_only, *([even_over_experts_only, one_sweep] if tokens > 1 else [])]
    assert_rejects(check, *wrong)


@pytest.mark.parametrize("better_start", [True, False])
@pytest.mark.parametrize("tokens", TOKENS)
def test_experts_are_even_after_every_sweep(tokens, better_start):
    logits = random_logits(tokens, 8, bias=2.0)

    def check(plan):
        for sweeps in range(1, 5):
            masses = plan(logits, sweeps, better_start=better_start).sum(0)
            assert_matches(masses, torch.full((8,), 1 / 8).double(), 1e-12, "experts' masses")

    check(sinkhorn)
    assert_rejects(check, even_over_tokens_only)


@pytest.mark.parametrize("experts", EXPERTS)
def test_popularity_costs_sweeps_unless_the_start_knows_it(experts):
    """4096 tokens, the worst of five draws. A token's own mass is 2.4e-4 there: 1e-4 is less strict than it seems."""

    def worst(bias, better_start, error=1e-4):
        return max(sweeps_needed(random_logits(4096, experts, bias, seed), better_start, error) for seed in range(5))

    def check(better, plain):
        assert worst(0.0, better) <= 2 and worst(2.0, better) <= 2
        assert worst(0.0, plain) <= 2 < worst(2.0, plain) <= 5
        # To a hundredth of a token's mass.
        percent = 0.01 / 4096
        assert worst(0.0, better, percent) == worst(2.0, better, percent) <= 5 < worst(2.0, plain, percent)

    check(True, False)
    assert_rejects(lambda starts: check(*starts), (False, True), (True, True), (False, False))


@pytest.mark.parametrize("experts", EXPERTS)
def test_few_tokens_need_more_sweeps(experts):
    """Each is a large share of the whole: two sweeps leave them uneven, with either start."""

    def check(sweeps):
        for tokens in (2, 7, 64):
            for better_start in (True, False):
                errors = [
                    unevenness(sinkhorn(random_logits(tokens, experts, 2.0, seed), sweeps, better_start=better_start))
                    for seed in range(5)
                ]
                assert max(errors) <= 1e-4, tokens

    check(40)
    assert_rejects(check, 1, 2, 4)


@pytest.fixture(scope="module")
def trained() -> list[Tensor]:
    """Router logits (4096, 8) of every MoE layer of the trained model, on Python source."""
    model, trace = mj.load(device="cpu", dtype="float32"), mj.Trace()
    tokens = load_tokenizer(SHIPPED).encode(inspect.getsource(argparse))[:4096]
    with torch.no_grad():
        model(torch.tensor([tokens]), trace=trace)
    assert len(trace.router) == 4 and trace.router[0].shape == (1, 4096, 8)
    return [logits[0].double() for logits in trace.router]


def test_trained_logits_need_some_sweeps_with_either_start(trained):
    """Trained routers are surer than random ones, so what the start knows is soon outweighed: it saves no sweep."""

    def check(sweeps):
        for logits in trained:
            for better_start in (True, False):
                assert unevenness(sinkhorn(logits, sweeps, better_start=better_start)) <= 1e-4

    check(8)
    assert_rejects(check, 1, 2)


def busiest(indices: Tensor, experts: int) -> float:
    """The load of the expert with most tokens, as a multiple of an even share."""
    return float(indices.flatten().bincount(minlength=experts).max()) * experts / indices.numel()


def test_two_sweeps_even_out_the_choices_of_a_trained_router(trained):
    def check(plan):
        assert max(busiest(plan(logits).argmax(1), 8) for logits in trained) < 1.65

    check(sinkhorn)
    check(lambda logits: sinkhorn(logits, MANY))
    assert_rejects(check, Tensor.sigmoid, even_over_tokens_only)


# What changes a plan, and what does not


def test_a_tokens_own_offset_changes_nothing():
    logits = random_logits(64, 8, bias=2.0)
    shifted = logits + 3 * random_logits(64, 1)

    def check(logits, sweeps, better_start):
        assert_matches(
            sinkhorn(shifted, sweeps, better_start=better_start), sinkhorn(logits, sweeps, better_start=better_start),
            FLOAT64, "plan",
        )  # fmt: skip

    for sweeps in (1, 2, MANY):
        check(logits, sweeps, False)
    check(logits, 2 * MANY, True)
    # The better start weighs the tokens by their size before the first sweep.
    assert_rejects(lambda sweeps: check(logits, sweeps, True), 1, 2)
    assert_rejects(lambda logits: check(logits, MANY, False), logits.flip(0), logits * 1.01)


def test_an_experts_popularity_changes_nothing_with_the_better_start():
    logits = random_logits(64, 8)
    popular = logits + 2 * random_logits(1, 8)

    def check(better_start, sweeps):
        actual, expected = (sinkhorn(side, sweeps, better_start=better_start) for side in (popular, logits))
        assert_matches(actual, expected, FLOAT64, "plan")

    for sweeps in (1, 2, 5):
        check(True, sweeps)
    check(False, MANY)
    assert_rejects(lambda sweeps: check(False, sweeps), 1, 2, 5)


def unprotected(logits, sweeps=2, better_start=True, **_):
    """The same without logarithms."""
    cost = (2 * logits).exp()
    u, v = torch.ones_like(cost[:, 0]), torch.ones_like(cost[0])
    if better_start:
        v = 1 / cost.sum(0) / len(v)
    for _ in range(sweeps):
        u = 1 / (cost @ v) / len(u)
        v = 1 / (u @ cost) / len(v)
    return u[:, None] * cost * v


@pytest.mark.parametrize("better_start", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_logits_give_numbers(dtype, better_start):
    # Logarithms of 2e4 are known to 1e-3 in float32.
    tolerance = 5e-3 if dtype == torch.float32 else FLOAT64
    signs = 1e4 * random_logits(64, 8).sign()

    def check(plan):
        for logits in (1e4 * random_logits(64, 8), signs, -signs, 1e4 + random_logits(64, 8)):
            for sweeps in (1, 2, MANY):
                result = plan(logits.to(dtype), sweeps, better_start=better_start)
                assert result.isfinite().all() and (result >= 0).all()
                assert_matches(result.sum(0), torch.full((8,), 1 / 8, dtype=dtype), tolerance, "experts' masses")

    logits = random_logits(64, 8).to(dtype)
    assert_matches(unprotected(logits), sinkhorn(logits), 1e-5, "where both work")
    check(sinkhorn)
    assert_rejects(check, unprotected)


def test_half_precision_is_widened():
    logits = random_logits(512, 8, bias=2.0).to(torch.bfloat16)

    def check(plan):
        result = plan(logits)
        assert result.dtype == torch.float32
        assert_matches(result, sinkhorn(logits.float()), 0, "plan")

    def stays_narrow(logits):
        return unprotected(logits).to(torch.bfloat16)

    def rounded(logits):
        return unprotected(logits).float()

    check(sinkhorn)
    assert_rejects(check, stays_narrow, rounded)
    assert sinkhorn(logits.to(torch.float16)).dtype == torch.float32


def test_two_calls_are_identical_and_draw_nothing():
    logits = random_logits(512, 8).float()

    def check(plan):
        state = torch.get_rng_state()
        assert_matches(plan(logits), plan(logits.clone()), 0, "plan")
        assert_matches(torch.get_rng_state(), state, 0, "random state")

    check(sinkhorn)
    assert_rejects(check, lambda logits: sinkhorn(logits + 0.01 * torch.rand_like(logits)))


@pytest.mark.parametrize("better_start", [True, False])
@pytest.mark.parametrize("filler", [0.0, 7.0, -1e4, 1e4])
def test_padding_takes_no_share(filler, better_start):
    logits = random_logits(64, 8, bias=2.0)
    real = torch.arange(64) % 3 != 1
    padded = logits.masked_fill(~real[:, None], filler)

    def check(real_given, sweeps=2):
        plan = sinkhorn(padded, sweeps, better_start=better_start, real=real_given)
        assert (plan[~real] == 0).all()
        assert_matches(plan[real], sinkhorn(logits[real], sweeps, better_start=better_start), FLOAT64, "real tokens")

    check(real)
    check(real, MANY)
    assert_rejects(check, None, torch.ones_like(real), real.roll(1))


# The routing


def test_no_gradient_goes_through_the_plan():
    logits = random_logits(64, 8).requires_grad_()

    def check(plan):
        assert not plan(logits).requires_grad

    check(sinkhorn)
    assert_rejects(check, unprotected)


def test_in_training_the_plan_chooses_and_afterwards_the_sigmoid():
    logits = random_logits(64, 8, bias=2.0)
    scores = 1 / (1 + torch.exp(-logits))
    for k in (1, 2, 3):
        by_plan = naive(logits, 2).argsort(1, descending=True)[:, :k]
        by_score = logits.argsort(1, descending=True)[:, :k]

        def check(route, k=k, by_plan=by_plan, by_score=by_score):
            for training, expected in ((True, by_plan), (False, by_score)):
                weights, indices = route(logits, k, "sinkhorn", training=training)
                assert torch.equal(indices, expected)
                assert_matches(weights, scores.gather(1, expected), FLOAT64, "weights")

        check(route)
        assert_rejects(check, *WRONG_ROUTES)


def training_choice_always(logits, k, routing, *, training=False, **options):
    return route(logits, k, routing, training=True, **options)


def training_choice_never(logits, k, routing, *, training=False, **options):
    return route(logits, k, routing, training=False, **options)


def gate_from_the_plan(logits, k, routing, *, training=False, real=None, **options):
    weights, indices = route(logits, k, routing, training=training, real=real, **options)
    return len(logits) * sinkhorn(logits, real=real).gather(1, indices), indices


def gate_from_softmax(logits, k, routing, *, training=False, **options):
    _, indices = route(logits, k, routing, training=training, **options)
    return logits.softmax(-1).gather(1, indices), indices


def choice_even_over_experts_only(logits, k, routing, *, training=False, **options):
    plan = even_over_experts_only(logits) if training else logits
    indices = plan.topk(k, dim=-1).indices
    return logits.sigmoid().gather(1, indices), indices


def choice_even_over_tokens_only(logits, k, routing, *, training=False, **options):
    plan = even_over_tokens_only(logits) if training else logits
    indices = plan.topk(k, dim=-1).indices
    return logits.sigmoid().gather(1, indices), indices


WRONG_ROUTES = (
    training_choice_always, training_choice_never, gate_from_the_plan, gate_from_softmax, choice_even_over_experts_only,
    choice_even_over_tokens_only,
)  # fmt: skip


def gate_detached(logits, k, routing, **options):
    weights, indices = route(logits, k, routing, **options)
    return weights.detach(), indices


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("k", [1, 2])
def test_renormalised_weights_sum_to_one(k, training):
    logits = random_logits(64, 8, bias=2.0)
    plain, chosen = route(logits, k, "sinkhorn", training=training)

    def check(renormalise):
        weights, indices = route(logits, k, "sinkhorn", training=training, renormalise=renormalise)
        assert indices.tolist() == chosen.tolist()
        assert_matches(weights.sum(1), torch.ones(64).double(), 1e-12, "sums")
        assert_matches(weights, plain / plain.sum(1, keepdim=True), 1e-12, "weights")

    check(True)
    assert_rejects(check, False)


CONFIG = mj.JambaConfig.from_dict({
    "num_layers": 4, "hidden_size": 16, "state_size": 4, "conv_dimension": 3, "vocab_size": 43, "expansion_factor": 2,
    "mamba_moe_layers": ["r", "8", "r", "8"], "ffn_hidden_size": 12, "add_bias_linear": True, "swiglu": True,
    "max_sequence_length": 2048,
})  # fmt: skip


@pytest.fixture
def layer(long_memory) -> MoE:
    """A mixture whose router likes some experts more than others, in float64."""
    mixture = long_memory(MoE(CONFIG)).double()
    with torch.no_grad():
        mixture.router.bias.copy_(2 * random_logits(1, 8)[0])
    return mixture.train()


@pytest.fixture
def model(long_memory) -> mj.Jamba:
    """A BlackMamba of four blocks, in float64."""
    return long_memory(mj.Jamba(CONFIG)).double().train()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_route(monkeypatch, wrong: Callable, action: Callable):
    """What the action gives where routes are chosen by `wrong`."""
    with monkeypatch.context() as patch:
        patch.setattr(moe, "route", wrong)
        return action()


def by_hand(layer: MoE, x: Tensor, chosen: Tensor, logits: Tensor) -> Tensor:
    """Each token's chosen expert, times the sigmoid of its logit: x (tokens, d)."""
    rows = []
    for token, e, row in zip(x, chosen.tolist(), logits, strict=True):
        experts = layer.experts
        gate = F.gelu(experts.gate_proj[e] @ token + experts.gate_bias[e])
        inner = gate * (experts.up_proj[e] @ token + experts.up_bias[e])
        rows.append(row[e].sigmoid() * (experts.down_proj[e] @ inner + experts.down_bias[e]))
    return torch.stack(rows)


@pytest.mark.parametrize("training", [True, False])
def test_the_layer_is_its_formula(layer, monkeypatch, training):
    x = draw(2, 24, 16)
    flat = x.flatten(0, 1)
    logits = flat @ layer.router.weight.T + layer.router.bias
    chosen = (naive(logits, 2) if training else logits).argmax(1)
    expected = by_hand(layer, flat, chosen, logits).view_as(x)
    layer.train(training)

    def check(route):
        y, routing = with_route(monkeypatch, route, lambda: layer(x))
        assert routing.indices.flatten().tolist() == chosen.tolist()
        assert_matches(routing.logits.flatten(0, 1), logits, 1e-12, "logits")
        assert_matches(y, expected, 1e-12, "mixture")

    check(route)
    wrong = (training_choice_never, choice_even_over_experts_only, choice_even_over_tokens_only)
    assert_rejects(
        check, gate_from_softmax, gate_from_the_plan, *(wrong if training else [training_choice_always])
    )


def test_the_router_learns_through_the_gate_alone(layer, monkeypatch):
    """Finite differences, with the choice held fixed."""
    x = draw(1, 24, 16)
    chosen = naive(layer.router(x)[0].detach(), 2).argmax(1)

    def loss_of(weight, bias):
        return float(by_hand(layer, x[0], chosen, x[0] @ weight.T + bias).sin().sum())

    def differences(which, step=1e-5):
        values = [layer.router.weight.detach().clone(), layer.router.bias.detach().clone()]
        flat, found = values[which].view(-1), []
        for i in range(len(flat)):
            start, sides = float(flat[i]), []
            for side in (step, -step):
                flat[i] = start + side
                sides.append(loss_of(*values))
            flat[i] = start
            found.append((sides[0] - sides[1]) / (2 * step))
        return torch.tensor(found, dtype=torch.float64).view_as(values[which])

    with torch.no_grad():
        expected = {"weight": differences(0), "bias": differences(1)}

    def check(route):
        layer.zero_grad()
        with_route(monkeypatch, route, lambda: layer(x)[0].sin().sum().backward())
        gradients = {name: parameter.grad for name, parameter in layer.router.named_parameters()}
        found = {name: torch.zeros(8) if grad is None else grad for name, grad in gradients.items()}
        # Steps of 1e-5: their squares, and float64's rounding divided by them.
        assert_matches(found, expected, 1e-8, "gradient")

    check(route)
    assert_rejects(check, gate_detached, gate_from_softmax, gate_from_the_plan, training_choice_never)


def test_training_loads_the_experts_evenly(layer, monkeypatch):
    x = draw(4, 1024, 16)

    def check(route=route):
        _, routing = with_route(monkeypatch, route, lambda: layer(x))
        assert busiest(routing.indices, 8) < 1.3
        assert float(expert_load([routing.indices], 8).max()) == pytest.approx(busiest(routing.indices, 8))

    check()
    assert_rejects(check, training_choice_never, choice_even_over_tokens_only)
    with torch.no_grad():
        _, routing = layer.eval()(x)
    assert busiest(routing.indices, 8) > 3, "the biased sigmoids alone"


def test_splitting_a_batch_changes_nothing_after_training(layer):
    x = draw(4, 32, 16)

    def check(training):
        layer.train(training)
        whole = layer(x)[0]
        assert_matches(torch.cat([layer(part)[0] for part in x.split(1)]), whole, 1e-12, "rows")
        assert_matches(torch.cat([layer(part)[0] for part in x.split(8, 1)], 1), whole, 1e-12, "times")
        assert_matches(layer(x.flip(0))[0].flip(0), whole, 1e-12, "order of the rows")

    check(False)
    assert_rejects(check, True)


def test_padding_changes_no_choice_in_training(model, monkeypatch):
    """A row padded on the left, and two documents padded or packed, give what the real tokens give alone."""
    tokens = torch.randint(0, 43, (20,), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([torch.full((6,), 9), tokens])[None]
    mask = (torch.arange(26) >= 6)[None]
    rows = torch.stack([tokens[:10], torch.cat([torch.full((4,), 9), tokens[10:16]])])
    real = torch.stack([torch.ones(10, dtype=torch.bool), torch.arange(10) >= 4])
    packed, segments = tokens[None, :16], (torch.arange(16) >= 10).long()[None]

    def check(route):
        def run():
            trace = mj.Trace()
            assert_matches(model(padded, mask=mask, trace=trace)[:, 6:], model(tokens[None]), FLOAT64, "one row")
            together = model(packed, segments=segments)[0]
            assert_matches(model(rows, mask=real)[real], together, FLOAT64, "two rows")
            return trace

        return with_route(monkeypatch, route, run)

    def padding_counts(logits, k, routing, *, real=None, **options):
        return route(logits, k, routing, **options)

    trace = check(route)
    assert trace.experts[0].shape == (1, 26, 1)
    assert_rejects(check, padding_counts)


def test_text_is_written_as_after_training(model):
    """A model that is being trained writes what it would after, and goes on as before."""
    prompt = [7, 41, 0, 19, 3]
    with torch.no_grad():
        # The blocks outweigh the embedding: a text does not just repeat its last token.
        model.model.embed_tokens.weight *= 0.3
        for name, parameter in model.named_parameters():
            if name.endswith(("out_proj.weight", "down_proj")):
                parameter *= 4

    def check(write):
        model.train()
        text = write()
        assert model.training and all(module.training for module in model.modules())
        assert text == mj.generate(model.eval(), prompt, max_new_tokens=12, stop=()).tolist()

    def with_the_choice_of_training():
        model.train()
        cache, new = model.new_cache(), []
        logits = model(torch.tensor([prompt]), cache=cache)
        for _ in range(12):
            new.append(int(logits[0, -1].argmax()))
            logits = model(torch.tensor([new[-1:]]), cache=cache)
        return [new]

    check(lambda: mj.generate(model, prompt, max_new_tokens=12, stop=()).tolist())
    assert_rejects(check, with_the_choice_of_training)


def test_recomputed_layers_choose_alike(model):
    tokens = torch.randint(0, 43, (2, 16), generator=torch.Generator().manual_seed(0))

    def gradients(recompute, tokens=tokens):
        model.zero_grad()
        model.recompute = recompute
        model(tokens).sin().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients(False)
    assert all(expected[f"model.layers.{i}.feed_forward.router.weight"].abs().max() > 0 for i in (1, 3))

    def check(actual):
        assert_matches(actual, expected, 1e-12, "gradients")

    check(gradients(True))
    assert_rejects(check, gradients(True, tokens.flip(1)))


def test_softmax_routing_is_the_same_in_training(layer, monkeypatch):
    """Top-1 without a plan: each token by itself, whatever the mode."""
    softmax = MoE(replace(CONFIG, routing="softmax")).double()
    softmax.load_state_dict(layer.state_dict())
    x = draw(2, 24, 16)

    def check(layer):
        assert_matches(layer.train()(x)[0], layer.eval()(x)[0], 0, "mixture")

    check(softmax)
    assert_rejects(check, layer)


def test_whoever_reads_a_model_reads_each_token_by_itself(layer):
    """Without gradients nothing is trained, so the choice is that of use whatever the mode: splits change nothing."""
    x = draw(4, 32, 16)
    expected = layer.eval()(x)[0]
    layer.train()

    def check(gradients):
        with torch.set_grad_enabled(gradients):
            assert_matches(layer(x)[0], expected, 1e-12, "mixture")

    check(False)
    assert_rejects(check, True)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda logits: route(logits, 1, "sinkhron"), ["'sinkhron'", "softmax, sigmoid, sinkhorn"]),
        (lambda logits: route(logits, 9), ["to 9 of 8 experts"]),
        (lambda logits: route(logits, 0), ["to 0 of 8 experts"]),
        (lambda logits: sinkhorn(logits, 0), ["sweeps is 0", "one at least"]),
    ],
    ids=["routing", "too many", "none", "sweeps"],
)
def test_what_cannot_be_routed_is_refused(call, words):
    assert_names(refusal(call, draw(5, 8)), words)


# Loads


def test_expert_load_by_hand():
    """Two layers, six tokens, three experts: an even share is two tokens a layer."""
    first = torch.tensor([[[0], [0], [0]], [[0], [2], [2]]])
    second = torch.tensor([[[1], [0], [2]], [[1], [2], [0]]])

    def check(load):
        assert_matches(load, torch.tensor([[2.0, 0.0, 1.0], [1.0, 1.0, 1.0]]), 1e-6, "load")
        assert_matches(load.mean(1), torch.ones(2), 1e-6, "mean")

    check(expert_load([first, second], 3))
    assert_rejects(
        check, expert_load([second, first], 3), expert_load([first, second], 3) / 3, expert_load([first, second], 4)
    )


def test_expert_load_of_several_choices():
    """Four tokens with two of four experts each: an even share is two choices."""
    indices = torch.tensor([[[0, 1], [0, 2], [0, 1], [0, 3]]])

    def check(load):
        assert_matches(load, torch.tensor([[2.0, 1.0, 0.5, 0.5]]), 1e-6, "load")

    check(expert_load([indices], 4))
    assert_rejects(check, expert_load([indices[..., :1]], 4), expert_load([indices[..., 1:]], 4))
