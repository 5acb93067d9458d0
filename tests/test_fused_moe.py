"""The mixture's kernels: on a GPU where there is one, otherwise in Triton's interpreter."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from minijamba import fused_glu
from minijamba.moe import MoE, fused, mixture, route, waits_for_host
from minijamba.rungs import use_rung
from minijamba.testing import assert_matches, assert_rejects

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of the largest value. float64: sums of some tens of terms in another order. float32: the same, through products of
# three factors. The others round inputs, four results on the way and gradients to 11 and 8 bits; the interpreter cuts
# bfloat16 off.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
NAMES = ("x", "weights", "indices", "gate", "up", "down")


@pytest.fixture
def small_tiles(monkeypatch):
    """Many programs, and several steps along a row, for few rows of few numbers."""
    monkeypatch.setattr(fused, "TILE", 4)
    monkeypatch.setattr(fused_glu, "TILE", 4)
    monkeypatch.setattr(fused_glu, "COLUMNS", 2)


def arguments(tokens=9, k=2, experts=6, width=5, inner=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(tokens + k + experts)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights, indices = route(normal(tokens, experts), k)
    gate, up = normal(2, experts, inner, width) * width**-0.5
    down = normal(experts, width, inner) * inner**-0.5
    values = normal(tokens, width), weights, indices, gate, up, down
    return {
        name: value.to(DEVICE, dtype if value.is_floating_point() else None)
        for name, value in zip(NAMES, values, strict=True)
    }


def naive(*args, **options):
    return mixture(*args, rung="naive", **options)


def kernel(*args, **options):
    return mixture(*args, rung="fused", **options)


def results(mixture, arguments, dtype=None, view=lambda x: x):
    """y and every gradient, computed in dtype."""
    leaves = {name: value.detach() for name, value in arguments.items()}
    for name in leaves.keys() - {"indices"}:
        leaves[name] = leaves[name].to(dtype).requires_grad_()
    y = mixture(*map(view, leaves.values()))
    dy = torch.linspace(-9, 9, y.numel(), dtype=torch.float64, device=DEVICE).sin().view(y.shape).to(y.dtype)
    y.backward(view(dy))
    return {"y": y.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items() if name != "indices"}


def assert_equals_naive(arguments, dtype=torch.float64, mixture=kernel, definition=naive, **options):
    actual = results(mixture, arguments, dtype, **options)
    assert_matches(actual, results(definition, arguments, torch.float64), TOLERANCES[dtype], "mixture")


@pytest.mark.parametrize("tokens, k, experts", [(1, 1, 1), (1, 2, 6), (9, 1, 6), (9, 6, 6), (40, 2, 16)])
def test_equals_the_definition(tokens, k, experts):
    assert_equals_naive(arguments(tokens, k, experts))


def test_gelu(small_tiles):
    expected = results(partial(naive, act="gelu"), arguments(), torch.float64)

    def check(mixture):
        assert_matches(results(mixture, arguments(), torch.float64), expected, TOLERANCES[torch.float64], "mixture")

    check(partial(kernel, act="gelu"))
    assert_rejects(check, kernel, naive)


@pytest.mark.filterwarnings("ignore:moe")  # which says so on a GPU
def test_biases_run_on_the_grouped_rung_as_no_kernel_adds_them(hybrid, long_memory):
    moe = long_memory(MoE(replace(hybrid, mlp_bias=True, hidden_act="gelu"))).double().to(DEVICE)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).double().to(DEVICE)

    def check(rung):
        with use_rung(rung):
            assert_matches(moe(x)[0], expected, TOLERANCES[torch.float64], "module")

    with use_rung("naive"):
        expected = moe(x)[0]
    for rung in ("parallel", "fused"):
        check(rung)
    moe.experts.up_bias.data.zero_()
    assert_rejects(check, "naive", "parallel", "fused")


def test_many_tiles(small_tiles):
    def check(mixture):
        assert_equals_naive(arguments(), mixture=mixture)

    check(kernel)
    assert_rejects(check, lambda x, *rest: kernel(x.roll(4, dims=1), *rest))


def test_wrong_mixtures_would_be_found():
    def check(mixture):
        assert_equals_naive(arguments(), mixture=mixture)

    def renormalised(x, weights, *rest):
        return kernel(x, weights / weights.sum(1, keepdim=True), *rest)

    def other_pairs(x, weights, *rest):
        return kernel(x, weights.flip(1), *rest)

    def dropped_tokens(x, weights, indices, *stacks):
        """Every expert takes two tokens and no more."""
        earlier = F.one_hot(indices.flatten(), 6).cumsum(0).gather(1, indices.view(-1, 1)).view(indices.shape)
        return kernel(x, weights * (earlier <= 2), indices, *stacks)

    def gradient_without_weights(x, weights, *rest):
        bare = kernel(x, torch.ones_like(weights), *rest)
        return bare - bare.detach() + kernel(x.detach(), weights, rest[0], *(stack.detach() for stack in rest[1:]))

    def no_gradient_of_weights(x, weights, *rest):
        return kernel(x, weights.detach() + 0 * weights, *rest)

    def gradient_of_one_choice(x, weights, indices, *stacks):
        first, second = weights.chunk(2, dim=1), indices.chunk(2, dim=1)
        return kernel(x, first[0], second[0], *stacks) + kernel(x.detach(), first[1], second[1], *stacks)

    check(kernel)
    assert_rejects(check, renormalised, other_pairs, dropped_tokens)
    assert_rejects(check, gradient_without_weights, no_gradient_of_weights, gradient_of_one_choice)


def test_sort_by_hand():
    def check(indices):
        order, place, ends = fused._sort(torch.tensor(indices, device=DEVICE), 3)
        assert order.tolist() == [1, 4, 0, 2, 3, 5]
        assert place.tolist() == [[2, 0], [3, 4], [1, 5]]
        assert ends.tolist() == [2, 4, 6] and ends.dtype == torch.int32

    check([[1, 0], [1, 2], [0, 2]])
    assert_rejects(check, [[0, 1], [1, 2], [0, 2]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_experts_that_nobody_chose(dtype):
    """Alone or all at once: they change nothing, and their gradients are exactly zero."""
    used, unused = [1, 4], [0, 2, 3, 5]
    given = arguments(width=8, inner=16, dtype=dtype)
    given["indices"] = torch.tensor([[1, 4]], device=DEVICE).expand(9, 2)
    assert_equals_naive(given, dtype)

    def check(experts):
        broken = {name: given[name].clone() for name in ("gate", "up", "down")}
        for stack in broken.values():
            stack[experts] = torch.nan
        actual = results(kernel, given | broken, dtype)
        assert_matches(actual["y"], results(kernel, given, dtype)["y"], 0, "y")
        for name in broken:
            assert (actual[f"d{name}"][unused] == 0).all() and (actual[f"d{name}"][used] != 0).any()

    check(unused)
    assert_rejects(check, used)


@pytest.mark.parametrize(
    "dtype, width, inner, at_once",
    [
        (torch.bfloat16, 16, 24, True),
        (torch.bfloat16, 16, 20, False),
        (torch.bfloat16, 12, 24, False),
        (torch.float16, 16, 24, False),
        (torch.float32, 16, 24, False),
    ],
)
def test_half_precision_and_the_choice_of_products(dtype, width, inner, at_once, monkeypatch):
    calls, grouped_mm = [], F.grouped_mm

    def counted(*args, **options):
        calls.append(args)
        return grouped_mm(*args, **options)

    monkeypatch.setattr(F, "grouped_mm", counted)
    rounded = arguments(20, 3, 4, width, inner, dtype)
    assert_equals_naive(rounded, dtype, partial(kernel, act="gelu"), partial(naive, act="gelu"))
    calls.clear()
    assert_equals_naive(rounded, dtype)
    # Three products forwards, and for each the gradients of both its factors.
    assert len(calls) == (9 if at_once and fused._has_kernel(DEVICE) else 0)

    def wrong(x, weights, *rest):
        return kernel(x, weights.flip(1), *rest)

    assert_rejects(lambda wrong: assert_equals_naive(rounded, dtype, wrong), wrong)


def test_autocast_computes_in_bfloat16_and_returns_gradients_in_their_own_dtype():
    given = arguments(20, 2, 4, 16, 24, torch.float32)

    def check(autocast):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            actual = results(kernel, given, torch.float32)
        assert actual["y"].dtype == torch.bfloat16
        assert all(actual[f"d{name}"].dtype == torch.float32 for name in given.keys() - {"indices"})
        assert_matches(actual, results(naive, given, torch.float64), TOLERANCES[torch.bfloat16], "autocast")

    check(True)
    assert_rejects(check, False)


def transposed(x):
    return x.mT.contiguous().mT


def every_other(x):
    return x.repeat_interleave(2, dim=-1)[..., ::2]


@pytest.mark.parametrize("view", [transposed, every_other])
def test_any_strides(view):
    assert not view(arguments()["gate"]).is_contiguous()
    assert_equals_naive(arguments(), view=view)
    assert_equals_naive(arguments(width=8, inner=16, dtype=torch.bfloat16), torch.bfloat16, view=view)
    assert_rejects(lambda view: assert_equals_naive(arguments(), view=view), lambda x: view(x.flip(-1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits_and_fill_their_outputs(dtype, poisoned_memory):
    given = arguments(20, 3, 4, 8, 16, dtype)
    first = results(kernel, given, dtype)
    assert_matches(results(kernel, given, dtype), first, 0)
    other = given | {"x": given["x"].nextafter(given["x"] + 1)}
    assert_rejects(lambda given: assert_matches(results(kernel, given, dtype), first, 0), other)


def test_nothing_waits_for_the_host(monkeypatch):
    given = arguments(20, 2, 4, 8, 16, torch.bfloat16)

    def refuse(*_):
        raise AssertionError("a number was asked for")

    def check(rung):
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "nonzero", "__bool__", "__int__"):
                patch.setattr(torch.Tensor, name, refuse)
            results(lambda *args: mixture(*args, rung=rung), given, torch.bfloat16)

    if fused._has_kernel(DEVICE):
        check("fused")
    assert_rejects(check, "naive", "parallel")


@torch.no_grad()
def test_choices_that_are_parts_of_larger_tensors():
    given = arguments(20, 2, 4, 8, 16)
    wide = {name: torch.cat([given[name], given[name].flip(0)], 1)[:, :2] for name in ("weights", "indices")}
    assert not wide["indices"].is_contiguous()
    expected = mixture(*given.values(), rung="naive")

    def check(changes):
        assert_matches(kernel(*(given | changes).values()), expected, 1e-5)

    check(wide)
    assert_rejects(check, {"weights": wide["weights"].flip(1)})


def test_few_tokens_ask_nothing_of_the_host(hybrid):
    def check(tokens, bits, asks):
        assert waits_for_host(hybrid, torch.float32, DEVICE, tokens, bits) == asks

    for bits, most in fused.AS_STORED.items():
        tokens = most * hybrid.num_experts // hybrid.num_experts_per_tok
        check(tokens, bits, False)
        check(tokens + 1, bits, True)
    assert waits_for_host(hybrid, torch.float32, DEVICE)
    assert_rejects(lambda tokens: check(tokens, 16, False), 10**6)


def test_gradcheck():
    x, weights, indices, *stacks = arguments(2, 2, 3, 2, 2).values()
    leaves = [leaf.requires_grad_() for leaf in (x, weights, *stacks)]

    def checked(x, weights, *stacks):
        return kernel(x, weights, indices, *stacks)

    assert torch.autograd.gradcheck(checked, leaves)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda x, *rest: checked(x, *rest) + x - x.detach(), leaves)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(checked(*leaves).sum() + (x**3).sum(), x, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph(backend):
    torch.compiler.reset()
    compiled = torch.compile(kernel, fullgraph=True, backend=backend)
    assert_equals_naive(arguments(), mixture=compiled)
    assert_rejects(
        lambda mixture: assert_equals_naive(arguments(), mixture=mixture), lambda x, *rest: compiled(x.flip(0), *rest)
    )


def test_operators_keep_their_word():
    given = list(arguments(3, 2, 3).values())
    x, weights, _, *stacks = given
    for act in ("silu", "gelu"):
        torch.library.opcheck(torch.ops.minijamba.mixture.default, (*given, act))
        y, *saved = fused._mixture(*given, act)
        torch.library.opcheck(torch.ops.minijamba.mixture_backward.default, (y, x, weights, *stacks, *saved, act))


def test_module_runs_on_it(hybrid, long_memory):
    moe = long_memory(MoE(hybrid)).double().to(DEVICE)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).double().to(DEVICE)

    def run(rung, x=x):
        moe.zero_grad()
        with use_rung(rung):
            y, routing = moe(x)
        (y.sin().sum() + routing.logits.cos().sum()).backward()
        return {"y": y.detach()} | {name: parameter.grad.clone() for name, parameter in moe.named_parameters()}

    def check(x):
        assert_matches(run("fused", x), expected, TOLERANCES[torch.float64], "module")

    expected = run("naive")
    check(x)
    assert_rejects(check, x.roll(1, dims=1))
