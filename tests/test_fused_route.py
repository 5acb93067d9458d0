"""Routing of few tokens in two kernels: against the router's own functions."""

import pytest
import torch

from minijamba.moe import fused
from minijamba.moe.fused_route import route, sort
from minijamba.moe.router import route as definition
from minijamba.testing import assert_matches, assert_rejects

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [(1, 16, 2, 100), (5, 5, 2, 64), (64, 8, 1, 700), (9, 3, 3, 33)]  # tokens, experts, k, inputs


@pytest.mark.parametrize("routing", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("tokens, experts, k, inputs", SIZES)
def test_routes_as_the_router_does(tokens, experts, k, inputs, routing, renormalise):
    torch.manual_seed(tokens)
    x, weight, bias = (torch.randn(s, device=DEVICE) for s in ((tokens, inputs), (experts, inputs), (experts,)))
    weight *= inputs**-0.5  # sigmoids of large logits are all one, and equal ones have no order
    logits = x.double() @ weight.double().T + bias.double()

    def check(logits):
        expected = (logits, *definition(logits, k, routing, renormalise=renormalise))
        assert_matches(route(x, weight, bias, k, routing, renormalise), expected, 1e-5, "logits, weights, indices")

    check(logits)
    assert_rejects(check, logits - bias, logits.flip(-1))


@pytest.mark.parametrize("tokens, experts, k", [(1, 4, 2), (7, 5, 2), (64, 16, 2), (3, 3, 3)])
def test_sorts_as_many_choices_are_sorted(tokens, experts, k):
    torch.manual_seed(tokens)
    indices = torch.rand(tokens, experts, device=DEVICE).topk(k).indices
    names = ("order", "place", "ends")
    actual = dict(zip(names, sort(indices, experts), strict=True))

    def check(indices):
        expected = dict(zip(names, fused._sort(indices, experts), strict=True))
        assert_matches(actual, expected, 0, "choices")

    check(indices)
    assert_rejects(check, indices.flip(0).flip(1) if tokens == 1 else indices.roll(1, 0))


def test_what_is_not_a_number_chooses_an_expert_that_exists():
    x, weight = torch.full((1, 8), torch.nan, device=DEVICE), torch.ones(5, 8, device=DEVICE)
    assert int(route(x, weight, None, 2, "softmax", False)[2].max()) < 5


def test_ties_go_to_the_first_expert():
    x, weight = torch.ones(1, 8, device=DEVICE), torch.ones(4, 8, device=DEVICE)
    _, weights, indices = route(x, weight, None, 2, "softmax", False)
    assert indices.tolist() == [[0, 1]]
    assert_matches(weights, [[0.25, 0.25]], 1e-6, "weights")
