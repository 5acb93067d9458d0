"""Products with packed weights: the kernels against unpacking and multiplying, in float64 where the device can."""

import pytest
import torch

from minijamba import fused_linear
from minijamba.fused_linear import product
from minijamba.moe import fused, naive
from minijamba.packed import Packed, pack, unpack
from minijamba.quantize import PackedLinear, linear
from minijamba.rungs import use_rung
from minijamba.testing import assert_matches, assert_rejects

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of the largest value: sums of some hundred to thousand terms in another order; results of half precision are rounded
# to 11 and 8 bits, and the interpreter cuts bfloat16 off.
TOLERANCES = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def matrix(*shape, bits, dtype=torch.float32):
    weight = normal(*shape, seed=1) * shape[-1] ** -0.5
    return weight.to(dtype) if bits == 16 else pack(weight, bits, dtype)


def exact(weight):
    """The matrix in float64 that the stored one stands for, before any rounding to the model's dtype."""
    if isinstance(weight, Packed):
        return unpack(Packed(weight.values, weight.scales, weight.inputs, torch.float64)).double()
    return weight.double()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("bits", [8, 4, 16])
@pytest.mark.parametrize("rows, inputs, outputs", [(1, 64, 48), (3, 100, 33), (17, 300, 40), (70, 512, 16)])
def test_a_product_equals_unpacking_first(bits, dtype, rows, inputs, outputs):
    x, weight = normal(rows, inputs, dtype=dtype), matrix(outputs, inputs, bits=bits, dtype=dtype)

    def check(shift):
        y = product(x.roll(shift, 0), weight)
        assert y.dtype == dtype
        assert_matches(y, x.double() @ exact(weight).T, TOLERANCES[dtype], "product")

    check(0)
    if rows > 1:
        assert_rejects(check, 1)


@pytest.mark.parametrize("bits", [8, 4, 16])
def test_inputs_are_shared_out_among_programs(bits, monkeypatch):
    """The last program to come adds up the parts, in their order, and leaves the counters at zero for the next call."""
    monkeypatch.setattr(fused_linear, "LEAST", 256)
    x, weight = normal(2, 1024), matrix(40, 1024, bits=bits)
    expected = x.double() @ exact(weight).T
    first = product(x, weight)
    assert_matches(first, expected, TOLERANCES[torch.float32], "product")
    assert_matches(product(x, weight), first, 0, "again")
    monkeypatch.setattr(fused_linear, "_split", lambda *sizes: 1)
    whole = product(x, weight)
    assert_matches(whole, expected, TOLERANCES[torch.float32], "in one part")
    assert DEVICE.type == "cuda" or not torch.equal(whole, first)  # another order of additions: it was shared out


@pytest.mark.parametrize("bits", [8, 4, 16])
@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_two_matrices_and_the_gate_between_them(bits, act):
    x, gate, up = normal(5, 300), matrix(24, 300, bits=bits), matrix(24, 300, bits=bits)
    up = up.roll(1, 0) if bits == 16 else pack(unpack(up).roll(1, 0), bits)

    def check(act):
        expected = getattr(torch.nn.functional, act)(x.double() @ exact(gate).T) * (x.double() @ exact(up).T)
        assert_matches(product(x, gate, up, chosen_act), expected, 1e-5, "gated")

    chosen_act = act
    check(act)
    assert_rejects(check, {"silu": "gelu", "gelu": "silu"}[act], "relu")


def choices(tokens, experts, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(tokens, experts, generator=generator).topk(k).indices
    return torch.rand(tokens, k, generator=generator).to(DEVICE), indices.to(DEVICE)


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4, 16])
@pytest.mark.parametrize("tokens, experts, k", [(1, 5, 1), (1, 5, 2), (3, 5, 2), (9, 2, 2), (70, 4, 2), (40, 3, 1)])
def test_few_tokens_of_a_mixture(bits, tokens, experts, k):
    """Also with experts that no token chose, and with more tokens of one than a program takes at once."""
    weights, indices = choices(tokens, experts, k)
    x, stacks = normal(tokens, 40), [matrix(experts, *shape, bits=bits) for shape in ((24, 40), (24, 40), (40, 24))]
    plain = [exact(stack) for stack in stacks]

    def check(indices):
        y = fused._as_stored(x, weights, indices, *stacks, "silu")
        assert_matches(y, naive.mixture(x.double(), weights.double(), own, *plain), 1e-5, "mixture")

    own = indices
    check(indices)
    if k < experts:
        assert_rejects(check, (indices + 1) % experts)


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
def test_many_tokens_of_a_mixture_unpack_the_experts(bits, monkeypatch):
    weights, indices = choices(9, 5, 2)
    x, stacks = normal(9, 40), [matrix(5, *shape, bits=bits) for shape in ((24, 40), (24, 40), (40, 24))]
    expected = naive.mixture(x.double(), weights.double(), indices, *(exact(stack) for stack in stacks))
    monkeypatch.setitem(fused.AS_STORED, bits, 0)
    monkeypatch.setattr(fused, "_as_stored", None)
    assert_matches(fused.mixture(x, weights, indices, *stacks), expected, 1e-5, "mixture")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(3, 64), (33, 100), (2, 3, 700), (5, 4352)])
def test_unpacking_equals_its_definition(bits, shape):
    weight = matrix(*shape, bits=bits)

    def check(unpack_wrongly):
        assert_matches(fused_linear.unpack(weight), unpack_wrongly(weight), 0, "unpacked")

    def scales_of_the_next_row(weight):
        return unpack(Packed(weight.values, weight.scales.roll(1, -1), weight.inputs, weight.dtype))

    check(unpack)
    assert_rejects(check, scales_of_the_next_row)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_layer_is_the_same_on_every_rung(bits):
    weight = normal(40, 300)
    layer = PackedLinear(40, 300, bits, normal(40, seed=3), torch.float32).to(DEVICE)
    packed = pack(weight, bits)
    layer.weight.values.copy_(packed.values)
    layer.weight.scales.copy_(packed.scales)
    x = normal(2, 3, 300)
    expected = x.double() @ exact(packed).T + layer.bias.double()
    for rung in ("naive", "parallel", "fused"):
        with torch.no_grad(), use_rung(rung):
            assert_matches(layer(x), expected, TOLERANCES[torch.float32], rung)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_gradient_reaches_the_input(bits):
    weight = matrix(20, 30, bits=bits)
    gradients = {}
    for rung in ("naive", "fused"):
        x = normal(4, 30).requires_grad_()
        linear(x, weight, rung=rung).sin().sum().backward()
        gradients[rung] = x.grad
    assert_matches(gradients["fused"], gradients["naive"], 1e-5, "gradient")


def test_where_tiles_end_is_where_they_should():
    """Rows in excess of a tile, in the order of their experts: a wrong end gives a row another expert's matrix."""
    experts, x = 3, normal(40, 24)
    stack = matrix(experts, 16, 24, bits=8)
    of = torch.tensor([0] * 3 + [2] * 37, device=DEVICE)
    plain = exact(stack)
    expected = torch.stack([plain[e] @ row for e, row in zip(of, x.double(), strict=True)])

    def check(ends):
        actual = product(x, stack, ends=torch.tensor(ends, dtype=torch.int32, device=DEVICE))
        assert_matches(actual, expected, TOLERANCES[torch.float32], "rows")

    check([3, 3, 40])
    assert_rejects(check, [4, 4, 40], [3, 5, 40])


@pytest.mark.parametrize("bits", [8, 4])
def test_the_gradient_of_a_mixture_reaches_tokens_and_router(bits):
    weights, indices = choices(9, 5, 2)
    stacks = [matrix(5, *shape, bits=bits) for shape in ((24, 40), (24, 40), (40, 24))]
    gradients = {}
    for mixture in (naive.mixture, fused.mixture):
        leaves = normal(9, 40).requires_grad_(), weights.clone().requires_grad_()
        mixture(*leaves, indices, *stacks).sin().sum().backward()
        gradients[mixture] = [leaf.grad for leaf in leaves]
    assert_matches(gradients[fused.mixture], gradients[naive.mixture], 1e-5, "gradients")
