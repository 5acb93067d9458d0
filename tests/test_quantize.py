"""Packed weights: every number by hand on small rows, and error bounds on random ones."""

import pytest
import torch
from refusals import assert_names, refusal

from minijamba import packed, quantize
from minijamba.quantize import PackedLinear, PackedWeight, linear, pack, packed_bits, packed_shapes, unpack
from minijamba.rungs import use_rung
from minijamba.testing import assert_matches, assert_rejects

SHAPES = [(1, 1), (3, 63), (5, 64), (2, 100), (4, 256), (3, 257), (2, 600), (3, 2, 70)]


def weights(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator)


def scales_of_weights(made):
    """The scale of every weight, (..., out, in), as the two formats say it."""
    if made.bits == 8:
        return made.scales[..., None].expand(made.shape)
    return made.scales.float().repeat_interleave(64, -1)[..., : made.inputs]


# By hand


def test_int8_by_hand():
    """s = 127 / 127 = 1 and 2.54 / 127 = 0.02; halves go to the even neighbour."""
    weight = torch.tensor([[127.0, -3.4, 0.5, 1.5, -127.0], [2.54, 0.0, -0.021, 0.029, 0.031]])

    def check(pack8):
        values, scales = pack8(weight)
        assert values.tolist() == [[127, -3, 0, 2, -127], [127, 0, -1, 1, 2]]
        assert_matches(scales, torch.tensor([1.0, 0.02]), 1e-6)

    def towards_zero(weight):
        scales = weight.abs().amax(-1) / 127
        return (weight / scales[:, None]).trunc().to(torch.int8), scales

    def scale_of_the_matrix(weight):
        scales = (weight.abs().amax() / 127).expand(len(weight))
        return (weight / scales[:, None]).round().to(torch.int8), scales

    def over_128(weight):
        scales = weight.abs().amax(-1) / 128
        return (weight / scales[:, None]).round().clamp(-128, 127).to(torch.int8), scales

    check(lambda weight: packed.pack_rows(weight, 8))
    assert_rejects(check, towards_zero, scale_of_the_matrix, over_128)
    assert_matches(unpack(pack(weight, 8))[0], torch.tensor([127.0, -3, 0, 2, -127]), 0)


def int4_row():
    """Four groups of 64: the weights of largest magnitude are -8, 16, 0.5 and 0."""
    row = torch.zeros(256)
    row[0], row[1], row[2], row[63] = -8.0, 7.5, 3.2, -1.0
    row[64], row[65] = 16.0, -14.0
    row[128], row[129] = 0.5, 0.25
    return row[None]


def number(words, scales, i):
    """Number i of a row, as the format describes it: plane i // 64 of word i % 64."""
    block, plane, j = i // 256, i % 256 // 64, i % 64
    return ((words[64 * block + j] & 0xFFFF) >> (4 * plane) & 15) - 8, scales[4 * block + plane]


def test_int4_by_hand():
    """s = 1, -2, -1/16 and 1. 7.5 is rounded to 8, which does not exist, and becomes 7."""

    def check(pack4):
        values, scales = pack4(int4_row())
        words, scales = values[0].tolist(), scales[0].tolist()
        found = {i: number(words, scales, i) for i in (0, 1, 2, 62, 63, 64, 65, 128, 129, 200)}
        assert found == {
            0: (-8, 1), 1: (7, 1), 2: (3, 1), 62: (0, 1), 63: (-1, 1), 64: (-8, -2), 65: (7, -2), 128: (-8, -1 / 16),
            129: (-4, -1 / 16), 200: (0, 1),
        }  # fmt: skip
        # Number 8 is zero: planes 3, 2, 1, 0 of word 0 hold 8, 0, 0, 0 and of word 2 hold 8, 8, 8, 11.
        assert words[0] & 0xFFFF == 0x8000 and words[2] & 0xFFFF == 0x888B
        assert words[1] & 0xFFFF == 0x84FF and words[63] & 0xFFFF == 0x8887

    def planes_reversed(row):
        values, scales = packed.pack_rows(row, 4)
        unsigned = values.int() & 0xFFFF
        turned = sum(((unsigned >> 4 * i) & 15) << (12 - 4 * i) for i in range(4))
        return turned.to(torch.int16), scales

    def neighbours_in_a_word(row):
        values, scales = packed.pack_rows(row.view(4, 64).T.reshape(1, 256), 4)
        return values, scales

    def without_clamp(row):
        values, scales = packed.pack_rows(row, 4)
        numbers = (row.view(4, 64) / scales.float().view(4, 1)).round().int() + 8
        return sum((numbers[i] & 15) << 4 * i for i in range(4)).to(torch.int16)[None], scales

    def towards_zero(row):
        return packed.pack_rows(row.trunc(), 4)

    check(lambda row: packed.pack_rows(row, 4))
    assert_rejects(check, planes_reversed, neighbours_in_a_word, without_clamp, towards_zero)


def test_a_word_is_the_16_bits_of_its_four_numbers():
    """Numbers -8, 7, 0, 3 are 0, 15, 8, 11: 0xB8F0, which int16 stores as 0xB8F0 - 2^16."""
    row = torch.zeros(256)
    row[::64], row[5], row[69], row[133], row[197] = -8.0, -8.0, 7.0, 0.0, 3.0
    made = pack(row[None], 4)
    assert made.values.dtype == torch.int16 and made.scales.dtype == torch.bfloat16
    assert made.values[0, 5].item() == 0xB8F0 - 2**16
    assert_matches(unpack(made)[0], row, 0)


# Bounds


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_no_weight_is_off_by_more_than_half_a_step(bits, shape):
    """But where int4 has no 8, or its scale was rounded to less than an eighth of the largest."""
    weight = weights(*shape)

    def check(make):
        made = make(weight)
        assert made.shape == weight.shape and unpack(made).shape == weight.shape
        steps = (weight / scales_of_weights(made)).double()
        error = (unpack(made) / scales_of_weights(made) - steps).abs()
        within = steps.abs() < 127.5 if bits == 8 else (steps > -8.5) & (steps < 7.5)
        assert within.double().mean() > 0.9 or weight.numel() < 100
        assert (error[within] <= 0.5 + 1e-4).all()
        assert (steps[~within].abs() < 8.1).all() and (error[~within] < 1.1).all()

    def rounded_down(weight):
        made = pack(weight, bits)
        return packed.Packed(made.values - (1 if bits == 8 else 0x1111), made.scales, made.inputs, made.dtype)

    check(lambda weight: pack(weight, bits))
    assert_rejects(check, rounded_down)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_shapes_and_bytes(bits, shape):
    made = pack(weights(*shape), bits)
    assert (tuple(made.values.shape), tuple(made.scales.shape)) == packed_shapes(shape, bits)
    assert made.nbytes == quantize.packed_bytes(shape, bits)
    assert (made.bits, made.inputs, made.device.type) == (bits, shape[-1], "cpu")


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_stay_zeros(bits):
    weight = weights(4, 300)
    weight[1] = 0
    weight[2, 64:128] = 0

    def check(weight):
        found = unpack(pack(weight, bits))
        assert found.isfinite().all() and (found[1] == 0).all() and (found[2, 64:128] == 0).all()

    check(weight)
    assert_rejects(check, weight + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bits", [8, 4])
def test_dtype_of_the_matrix(bits, dtype):
    weight = weights(5, 70).to(dtype)
    assert unpack(pack(weight, bits)).dtype == dtype
    assert unpack(pack(weight, bits, torch.bfloat16)).dtype == torch.bfloat16
    assert_matches(unpack(pack(weight, bits)), unpack(pack(weight.float(), bits)).to(dtype), 0)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_stack_is_its_matrices(bits):
    stack = weights(3, 5, 70)
    made = pack(stack, bits)

    def check(matrices):
        assert len(made) == len(matrices)
        for found, matrix in zip(made, matrices, strict=True):
            assert_matches(found, unpack(pack(matrix, bits)), 0)
        assert_matches(made[1], unpack(pack(matrices[1], bits)), 0)

    check(stack)
    assert_rejects(check, stack.flip(0), stack.roll(1, 2))


def test_errors_are_known():
    """About 0.7 % for normal weights in 8 bits and rows of 1,024, and 10 % in 4 bits and groups of 64."""
    weight = weights(64, 1024)

    def check(bits):
        eight = bits[0]
        assert 0.005 < quantize.relative_error(weight, eight) < 0.01
        assert 0.07 < quantize.relative_error(weight, bits[1]) < 0.12

    check([8, 4])
    assert_rejects(check, [4, 8])


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_not_finite_is_refused(bits, wrong):
    weight = weights(4, 130)
    for place in ((0, 0), (3, 129), (2, 64)):
        broken = weight.clone()
        broken[place] = wrong
        assert_names(refusal(pack, broken, bits), ["not finite", "look there"])


def test_arguments():
    assert_names(refusal(pack, weights(2, 2), 2), ["bits is 2", "8 or 4"])
    assert_names(refusal(quantize.scheme, "int2"), ["quantize is 'int2'", "None or one of int8, int4, int8-all"])
    assert quantize.scheme(None) == {} and quantize.scheme("int4")["mlp"] == 4


def test_what_a_scheme_packs():
    names = {
        "model.layers.1.feed_forward.experts.3.up_proj.weight": ("moe", [8, 4, 8, 4]),
        "model.layers.1.feed_forward.experts.3.up_proj.bias": ("moe", [None] * 4),
        "model.layers.1.feed_forward.router.weight": ("moe", [None] * 4),
        "model.layers.0.feed_forward.down_proj.weight": ("mlp", [8, 4, 8, 4]),
        "model.layers.0.mamba.in_proj.weight": ("mamba", [None, None, 8, 8]),
        "model.layers.0.mamba.x_proj.weight": ("mamba", [None] * 4),
        "model.layers.0.mamba.dt_proj.weight": ("mamba", [None] * 4),
        "model.layers.0.mamba.A_log": ("mamba", [None] * 4),
        "model.layers.0.mamba.conv1d.weight": ("mamba", [None] * 4),
        "model.layers.4.self_attn.k_proj.weight": ("attention", [None, None, 8, 8]),
        "lm_head.weight": ("head", [None, None, 8, 8]),
        "model.embed_tokens.weight": ("embedding", [None] * 4),
        "model.final_layernorm.weight": ("norms", [None] * 4),
    }
    for name, (part, bits) in names.items():
        assert [packed_bits(name, part, scheme) for scheme in quantize.SCHEMES] == bits, name
        assert packed_bits(name, part, None) is None


# Modules


def held(bits, weight, dtype=None):
    """A PackedWeight of these weights."""
    module, made = PackedWeight(tuple(weight.shape), bits, dtype or weight.dtype), pack(weight, bits)
    module.values.copy_(made.values)
    module.scales.copy_(made.scales)
    return module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_cast_changes_the_dtype_of_the_matrix_alone(bits, dtype):
    for start in (torch.float32, torch.bfloat16):

        def check(cast, start=start):
            module = torch.nn.ModuleList([held(bits, weights(5, 300), start)])
            values, scales = module[0].values.clone(), module[0].scales.clone()
            module = cast(module)
            found = module[0].packed()
            assert found.values.dtype == values.dtype and found.scales.dtype == scales.dtype
            assert_matches([found.values, found.scales], [values, scales], 0)
            assert unpack(found).dtype == dtype

        check(lambda module: module.to(dtype))
        assert_rejects(check, lambda module: module.to(torch.float32 if dtype != torch.float32 else torch.float16))


def test_it_moves_and_is_saved_with_the_model():
    module = torch.nn.ModuleDict({"a": held(8, weights(5, 70)), "b": held(4, weights(2, 5, 70))})
    assert sorted(module.state_dict()) == ["a.scales", "a.values", "b.scales", "b.values"]
    assert not list(module.parameters())
    other = torch.nn.ModuleDict({"a": PackedWeight((5, 70), 8, torch.float32), "b": PackedWeight((2, 5, 70), 4, None)})
    other.load_state_dict(module.state_dict())
    assert_matches(other["a"].packed().values, module["a"].values, 0)
    moved = module.to("meta", torch.bfloat16)
    assert moved["a"].packed().device.type == "meta" and moved["a"].packed().scales.dtype == torch.float32
    assert moved["b"].packed().scales.dtype == torch.bfloat16 and "(2, 5, 70), int4" in repr(moved["b"])


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_linear_layer_is_the_product_with_the_unpacked_matrix(bits, biased):
    weight, bias = weights(6, 300), weights(6, seed=1) if biased else None
    layer = PackedLinear(6, 300, bits, bias, weight.dtype)
    layer.weight.load_state_dict(held(bits, weight).state_dict())
    x = weights(2, 3, 300, seed=2)

    def check(matrix):
        with use_rung("naive"):
            y = layer(x)
        expected = torch.einsum("...i,oi->...o", x, matrix) + (0 if bias is None else bias)
        assert_matches(y, expected, 1e-5)

    check(unpack(pack(weight, bits)))
    assert_rejects(check, weight, unpack(pack(weight, 12 - bits)), unpack(pack(weight.roll(1, 0), bits)))
    assert ("bias" in layer.state_dict()) == biased


@pytest.mark.parametrize("bits", [8, 4])
def test_the_gradient_in_x(bits):
    """A row of the gradient of the sum of all outputs is the sum of the matrix's rows."""
    made = pack(weights(6, 300), bits)
    x = weights(4, 300, seed=2).requires_grad_()

    def check(matrix):
        (gradient,) = torch.autograd.grad(linear(x, made, rung="naive").sum(), x)
        assert_matches(gradient, matrix.sum(0).expand(4, -1), 1e-5)

    check(unpack(made))
    assert_rejects(check, weights(6, 300), unpack(made).flip(1))
