"""The load-balancing loss against transformers'."""

import pytest
import torch
from transformers.models.jamba.modeling_jamba import load_balancing_loss_func

from minijamba.moe import balance_loss
from minijamba.testing import assert_matches, assert_rejects

# transformers takes its means in float32, whatever the logits are: some roundings of 6e-8.
FLOAT32 = 1e-6


@pytest.mark.parametrize("experts", [4, 16])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_transformers(experts, k, padded):
    torch.manual_seed(experts + k)
    layers = list(torch.randn(3, 2, 11, experts).double())
    mask = torch.rand(2, 11) < 0.7 if padded else None
    flat = tuple(layer.flatten(0, 1) for layer in layers)
    expected = load_balancing_loss_func(flat, experts, k, None if mask is None else mask.long())

    def check(loss):
        assert_matches(loss, expected, FLOAT32, "balance loss")

    check(balance_loss(layers, k, mask))
    assert_rejects(check, balance_loss(layers, k, mask) / k if k > 1 else balance_loss(layers, 2, mask))
    if padded:
        assert_rejects(check, balance_loss(layers, k))
