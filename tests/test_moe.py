import pytest
import torch
import torch.nn.functional as F

from minijamba.mlp import MLP
from minijamba.moe import MoE, balance_loss, mixture, route
from minijamba.testing import assert_matches, assert_rejects

# float64, sums of at most some tens of terms.
FLOAT64 = 1e-13
RUNGS = ["naive", "parallel"]
WIDTH, INNER, EXPERTS = 4, 5, 6

rungs = pytest.mark.parametrize("rung", RUNGS)


def inputs(tokens=9, k=2, experts=EXPERTS):
    torch.manual_seed(0)
    x = torch.randn(tokens, WIDTH).double()
    gate, up = torch.randn(2, experts, INNER, WIDTH).double()
    down = torch.randn(experts, WIDTH, INNER).double()
    weights, indices = route(torch.randn(tokens, experts).double(), k)
    return x, weights, indices, gate, up, down


def by_hand(x, weights, indices, gate, up, down):
    """Every expert for every token, and zero where it was not chosen."""
    everything = torch.einsum(
        "xef, edf -> xed",
        F.silu(torch.einsum("xd, efd -> xef", x, gate)) * torch.einsum("xd, efd -> xef", x, up),
        down,
    )
    share = torch.zeros(len(x), len(gate), dtype=x.dtype).scatter(1, indices, weights)
    return torch.einsum("xe, xed -> xd", share, everything)


def test_route_is_softmax_over_all_experts_then_the_largest():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [1.0, -1.0, 5.0, 0.0]]).double()
    chosen = torch.tensor([[1, 3], [2, 0]])

    def check(route):
        weights, indices = route(logits, 2)
        assert indices.tolist() == chosen.tolist(), "largest first"
        assert_matches(weights, (logits.exp() / logits.exp().sum(-1, keepdim=True)).gather(1, chosen), FLOAT64)
        assert (weights.sum(-1) < 1).all()

    def renormalised(logits, k):
        weights, indices = route(logits, k)
        return weights / weights.sum(-1, keepdim=True), indices

    def softmax_of_the_chosen(logits, k):
        values, indices = logits.topk(k, dim=-1)
        return values.softmax(-1), indices

    def smallest_first(logits, k):
        return tuple(side.flip(-1) for side in route(logits, k))

    check(route)
    assert_rejects(check, renormalised, softmax_of_the_chosen, smallest_first)


def test_sigmoid_gates_ask_nothing_of_the_other_experts():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [1.0, 5.0, -1.0, 0.0]]).double()  # both like expert 1 best

    def check(routing):
        for training in (False, True):
            weights, indices = route(logits, 1, routing, training=training)
            assert indices.tolist() == [[1], [1]], "the largest, in training too"
            assert_matches(weights, 1 / (1 + (-logits.gather(1, indices)).exp()), FLOAT64)

    check("sigmoid")
    assert_rejects(check, "softmax", "sinkhorn")


def test_route_keeps_float32_and_any_leading_axes():
    logits = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    weights, indices = route(logits, 3)
    assert weights.shape == indices.shape == (2, 3, 3)
    assert weights.dtype == torch.float32
    in_float32, in_bfloat16 = (logits.to(t).softmax(-1).gather(-1, indices) for t in (torch.float32, torch.bfloat16))
    # The same float32 softmax of the same numbers.
    assert_matches(weights, in_float32, 1e-6)
    assert_rejects(lambda expected: assert_matches(weights, expected, 1e-6), in_bfloat16)


def test_ties_choose_different_experts_of_equal_weight():
    weights, indices = route(torch.zeros(3, 8), 4)
    assert_matches(weights, torch.full((3, 4), 1 / 8), 0)
    assert all(len(set(row)) == 4 for row in indices.tolist())
    weights, indices = route(torch.tensor([[2.0, 5.0, 2.0, 5.0, 0.0]]), 2)
    assert sorted(indices[0].tolist()) == [1, 3]


@rungs
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 6), (9, 1, 6), (9, 2, 6), (9, 6, 6), (40, 2, 16)])
def test_mixture_is_its_formula(rung, sizes):
    tokens, k, experts = sizes
    x, weights, indices, *stacks = inputs(tokens, k, experts)

    def check(weights, indices=indices):
        assert_matches(mixture(x, weights, indices, *stacks, rung=rung), expected, FLOAT64, "mixture")

    expected = by_hand(x, weights, indices, *stacks)
    check(weights)
    assert_rejects(check, torch.zeros_like(weights))
    if k > 1:
        # The order of the choices does not matter, the pairing of choice and weight does.
        check(weights.flip(1), indices.flip(1))
        assert_rejects(check, weights.flip(1))
    if k < experts:
        assert_rejects(check, weights / weights.sum(-1, keepdim=True))


@rungs
def test_experts_that_nobody_chose_do_nothing(rung):
    x, weights, _, gate, up, down = inputs()
    indices = torch.tensor([[1, 4]]).expand(9, 2)
    used, unused = torch.tensor([1, 4]), torch.tensor([0, 2, 3, 5])
    expected = by_hand(x, weights, indices, gate, up, down)

    def check(changed):
        broken = gate.clone()
        broken[changed] = torch.nan
        assert_matches(mixture(x, weights, indices, broken, up, down, rung=rung), expected, FLOAT64, "mixture")

    check(unused)
    assert_rejects(check, used)

    leaves = [stack.clone().requires_grad_() for stack in (gate, up, down)]
    mixture(x, weights, indices, *leaves, rung=rung).sum().backward()
    for leaf in leaves:
        assert (leaf.grad[unused] == 0).all() and (leaf.grad[used] != 0).any()


def test_gradients_of_the_rungs_are_equal_also_through_the_router():
    x, _, _, *stacks = inputs()
    router = torch.randn(EXPERTS, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    leaves = dict(zip(["x", "router", "gate", "up", "down"], [x, router, *stacks], strict=True))

    def gradients(mixture, detach=False):
        fresh = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
        weights, indices = route(fresh["x"] @ fresh["router"].T, 2)
        weights = weights.detach() if detach else weights
        mixture(fresh["x"], weights, indices, fresh["gate"], fresh["up"], fresh["down"]).sin().sum().backward()
        return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in fresh.items()}

    expected = gradients(by_hand)
    for rung in RUNGS:

        def check(detach, rung=rung):
            actual = gradients(lambda *arguments: mixture(*arguments, rung=rung), detach)
            assert_matches(actual, expected, FLOAT64, f"gradients, {rung}")

        check(False)
        assert_rejects(check, True)


@rungs
def test_module_routes_every_token_by_itself(rung, hybrid, long_memory):
    moe = long_memory(MoE(hybrid)).double()
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16).double()
    y, (logits, indices) = moe(x)
    assert_matches(indices, logits.topk(hybrid.num_experts_per_tok).indices, 0, "experts")
    assert_matches(logits, x @ moe.router.weight.T, FLOAT64, "router logits")

    def check(x):
        for b in range(2):
            for t in range(5):
                token = x[b, t]
                probabilities = (moe.router.weight @ token).softmax(0)
                best = probabilities.argsort(descending=True)[: hybrid.num_experts_per_tok]
                expected = sum(probabilities[i] * expert(moe, int(i))(token) for i in best)
                assert_matches(y[b, t], expected, FLOAT64, f"token {b}, {t}")

    def expert(moe, i):
        mlp = MLP(hybrid).double()
        mlp.load_state_dict({f"{name}.weight": stack[i] for name, stack in moe.experts.named_parameters()})
        return mlp

    check(x)
    assert_rejects(check, x.roll(1, dims=1))


def test_half_precision_keeps_its_type(hybrid, long_memory):
    moe = long_memory(MoE(hybrid))
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    y, routing = moe.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert y.dtype == routing.logits.dtype == torch.bfloat16


def one_layer(*rows):
    """Router logits (1, t, e) whose softmax is close to the given probabilities."""
    return torch.tensor([rows]).double().clamp(min=1e-9).log()


def test_balance_loss_by_hand():
    """Two experts and two tokens, one choice each: f = (1/2, 1/2), p = (0.6, 0.4); then f = (1, 0), p = (0.7, 0.3)."""

    def check(rows, expected):
        assert_matches(balance_loss([one_layer(*rows)], 1), expected, 1e-8, "balance loss")

    check([(0.8, 0.2), (0.4, 0.6)], 2 * (0.5 * 0.6 + 0.5 * 0.4))
    check([(0.8, 0.2), (0.6, 0.4)], 2 * (1 * 0.7 + 0 * 0.3))
    assert_rejects(lambda expected: check([(0.8, 0.2), (0.6, 0.4)], expected), 2 * (0.7**2 + 0.3**2), 1.0)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_balance_loss_is_k_in_perfect_balance_and_e_at_worst(k):
    """Perfect: e rolled copies of one preference, so that each expert is chosen k times in e tokens."""
    preference = torch.arange(8.0).double()
    perfect = torch.stack([preference.roll(i) for i in range(8)])[None]
    assert_matches(balance_loss([perfect], k), float(k), FLOAT64, "perfect")
    one_sided = 50.0 * (torch.arange(8) < k).double().expand(1, 5, 8)
    assert_matches(balance_loss([one_sided], k), 8.0, FLOAT64, "all on k experts")
    assert_rejects(lambda logits: assert_matches(balance_loss([logits], k), float(k), 1e-3), one_sided)


def test_balance_loss_takes_all_layers_together_and_no_padding():
    torch.manual_seed(0)
    layers = list(torch.randn(3, 2, 7, 4).double())
    mask = torch.rand(2, 7) < 0.6
    together = torch.cat([layer[mask] for layer in layers])[None]

    def check(loss):
        assert_matches(loss, balance_loss([together], 2), FLOAT64, "balance loss")

    check(balance_loss(layers, 2, mask))
    assert_rejects(
        check,
        balance_loss(layers, 2),
        balance_loss(layers, 2, ~mask),
        torch.stack([balance_loss([layer], 2, mask) for layer in layers]).mean(),
    )


def test_balance_loss_pushes_towards_balance():
    logits = torch.tensor([[[3.0, 1.0, 0.0, -1.0]]]).double().repeat(1, 6, 1).requires_grad_()
    balance_loss([logits], 1).backward()
    assert (logits.grad[..., 0] > 0).all() and (logits.grad[..., 1:] < 0).all()


def test_no_router_logits_is_an_error():
    with pytest.raises(ValueError, match="no MoE layer"):
        balance_loss([], 2)
