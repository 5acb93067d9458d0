import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from minijamba.mlp import MLP
from minijamba.norm import RMSNorm
from minijamba.testing import assert_matches, assert_rejects

# float64, sums of at most some tens of terms.
FLOAT64 = 1e-14


def test_rms_norm_by_hand():
    norm = RMSNorm(2, eps=0.5).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 3.0]))

    def check(rms):
        assert_matches(norm(torch.tensor([3.0, 4.0]).double()), [2 * 3 / rms, 3 * 4 / rms], FLOAT64, "norm")

    check(math.sqrt(12.5 + 0.5))
    assert_rejects(check, math.sqrt(12.5) + 0.5, math.sqrt(25 + 0.5))


def test_rms_norm_takes_the_mean_in_float32():
    """Squares of half precision overflow from 256 on, and a mean in bfloat16 has 8 bits."""

    def check(norm):
        x = 300 * torch.ones(4, dtype=torch.float16)
        assert norm(x).dtype == torch.float16
        assert_matches(norm(x), torch.ones(4), 1e-3, "float16")

    def in_half_precision(x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    check(RMSNorm(4).half())
    assert_rejects(check, in_half_precision)


def test_rms_norm_rounds_before_the_weight():
    """As transformers does: the normalised values go back to the type of x, then meet the weight."""
    norm = RMSNorm(64).to(torch.bfloat16)
    torch.manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.2 * torch.randn(64))
    x = torch.randn(32, 64).to(torch.bfloat16)
    normalised = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)

    def check(expected):
        assert_matches(norm(x), expected, 0, "norm")

    check(norm.weight * normalised.to(torch.bfloat16))
    assert_rejects(check, (norm.weight.float() * normalised).to(torch.bfloat16))


def test_mlp_is_its_formula(hybrid, long_memory):
    mlp = long_memory(MLP(replace(hybrid, hidden_size=4, intermediate_size=5))).double()
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight

    def check(expected):
        assert_matches(mlp(x), expected, FLOAT64, "mlp")

    check((F.silu(x @ gate.T) * (x @ up.T)) @ down.T)
    assert_rejects(
        check,
        ((x @ gate.T) * F.silu(x @ up.T)) @ down.T,
        (F.gelu(x @ gate.T) * (x @ up.T)) @ down.T,
    )
