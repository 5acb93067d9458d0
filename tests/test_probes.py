"""Probes against models whose heads are known: random ones, read with plain loops, and one that is set by hand so that
one of its heads is an exact induction head.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from minijamba import probes
from minijamba.config import JambaConfig
from minijamba.data import IGNORED
from minijamba.model import Jamba
from minijamba.tasks import needle_in_text
from minijamba.testing import assert_matches, assert_rejects
from minijamba.tokenizer import ByteTokenizer

# float64, sums of at most some tens of terms through four layers.
FLOAT64 = 1e-12


@pytest.fixture
def model(hybrid, long_memory):
    """Four layers, "mE A+ m+ AE", four query heads in two groups."""
    return long_memory(Jamba(hybrid)).double().requires_grad_(False)


@pytest.fixture
def tokens(hybrid):
    return torch.randint(hybrid.vocab_size, (2, 11), generator=torch.Generator().manual_seed(1))


def copier(vocabulary):
    """A Jamba "m+ A+" that copies, by hand: features 0 .. v-1 say which token this is, v .. 2v-1 which was before.

    Layer 0: the convolution shifts by one, and the mixer writes the token before. Layer 1, head 0: the query is this
    token, the key the token before, the value this token, ten times. Head 1 looks everywhere alike and says nothing.
    """
    v = vocabulary
    config = JambaConfig(
        vocab_size=v, hidden_size=2 * v, intermediate_size=1, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, num_experts=1, mamba_d_state=1, mamba_expand=1,
        mamba_dt_rank=1, mamba_proj_bias=True, max_position_embeddings=256, dtype="float32",
    )  # fmt: skip
    model = Jamba(config).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if not name.endswith(("norm.weight", "A_log", "D")):
            parameter.zero_()
    mamba, attention = (block.mixer for block in model.model.layers)
    this, before = slice(0, v), slice(v, 2 * v)
    one = torch.eye(v)
    model.model.embed_tokens.weight[:, this] = one
    mamba.in_proj.weight[this, this] = one
    mamba.in_proj.bias[2 * v :] = 5.0  # an open gate
    mamba.conv1d.weight[:, 0, -2] = 1.0
    mamba.out_proj.weight[before, this] = one / 50  # the convolution and the gate have made it larger
    attention.q_proj.weight[this, this] = 100 * one
    attention.k_proj.weight[this, before] = one
    attention.v_proj.weight[this, this] = one
    attention.o_proj.weight[this, this] = 10 * one
    model.lm_head.weight[:, this] = 10 * one
    return model


def drawn(model, length, batch=8, seed=0):
    """The rows that the probes read, drawn here again."""
    half = torch.randint(
        3, model.config.vocab_size, (batch, length // 2), generator=torch.Generator().manual_seed(seed)
    )
    return half.repeat(1, 2)


def test_attention_layers(hybrid):
    model = Jamba(hybrid)
    assert probes.attention_layers(model) == {i: model.model.layers[i].self_attn for i in (1, 3)}


def mixed(mixer, x, weights):
    """The layer's output from its input x (b, t, d) and the weights (b, h, t, s), one head after the other."""
    values = mixer.v_proj(x).split(mixer.head_dim, dim=-1)
    heads = [w @ values[head * len(values) // weights.shape[1]] for head, w in enumerate(weights.unbind(1))]
    return mixer.o_proj(torch.cat(heads, dim=-1))


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_weights_mix_the_values_to_the_layers_own_output(model, tokens, packed):
    segments = torch.tensor([[0] * 4 + [1] * 7, [0] * 9 + [1] * 2]) if packed else None
    passed = {}
    for i, mixer in probes.attention_layers(model).items():
        mixer.register_forward_hook(lambda mixer, inputs, y, i=i: passed.update({i: (mixer, inputs[0], y)}))
    weights = probes.attention_weights(model, tokens, segments)
    assert list(weights) == [1, 3] and weights[1].shape == (2, 4, 11, 11)

    def check(weights):
        for i, (mixer, x, y) in passed.items():
            assert_matches(mixed(mixer, x, weights[i]), y, FLOAT64, f"layer {i}")

    check(weights)
    assert_rejects(
        check,
        {i: w.roll(1, 1) for i, w in weights.items()},
        {i: w.roll(1, 3) for i, w in weights.items()},
        {i: w.square() / w.square().sum(-1, keepdim=True) for i, w in weights.items()},
        {1: weights[3], 3: weights[1]},
    )


def test_weights_of_a_row_are_a_distribution_over_what_it_sees(model, tokens):
    segments = torch.tensor([[0] * 4 + [1] * 7] * 2)
    causal = torch.ones(11, 11, dtype=torch.bool).tril()

    def check(weights, visible):
        assert ((weights > 0) == visible).all()
        assert_matches(weights.sum(-1), torch.ones(2, 4, 11), FLOAT64, "sums")

    (plain, _), (packed, _) = (probes.attention_weights(model, tokens, s).values() for s in (None, segments))
    check(plain, causal)
    check(packed, causal & (segments[:, None, :, None] == segments[:, None, None, :]))
    assert_rejects(lambda weights: check(weights, causal), packed, plain.roll(1, 3), 2 * plain)


def test_probing_leaves_no_trace(model, tokens):
    before = model(tokens)
    probes.attention_weights(model, tokens)
    probes.induction_scores(model, length=8)
    with probes.switched_off(model, {0: "all", 1: [2]}):
        pass
    with pytest.raises(KeyError), probes.switched_off(model, {0: "all", 1: [2], 3: "all"}):
        raise KeyError
    with pytest.raises(ValueError, match="no head 9"), probes.switched_off(model, {0: "all", 1: [9]}):
        pass
    assert torch.equal(model(tokens), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_heads_switched_off_are_zero_columns_of_o_proj(model, hybrid, long_memory, tokens):
    def zeroed(*columns, layer=1):
        other = long_memory(Jamba(hybrid)).double().requires_grad_(False)
        other.model.layers[layer].mixer.o_proj.weight[:, list(columns)] = 0
        return other(tokens)

    with probes.switched_off(model, {1: [0, 2]}):
        logits = model(tokens)
    with probes.switched_off(model, {1: [0]}), probes.switched_off(model, {1: [2]}):
        assert_matches(model(tokens), logits, FLOAT64, "nested blocks")

    def check(expected):
        assert_matches(logits, expected, FLOAT64, "heads 0 and 2 of layer 1")

    width = hybrid.head_dim
    both = [*range(width), *range(2 * width, 3 * width)]
    check(zeroed(*both))
    assert_rejects(
        check,
        model(tokens),
        zeroed(*range(2 * width)),
        zeroed(*range(0, 4 * width, 4), *range(2, 4 * width, 4)),
        zeroed(*both, layer=3),
    )


@pytest.mark.parametrize("layer", [0, 1], ids=["Mamba", "attention"])
def test_a_mixer_switched_off_writes_nothing(model, hybrid, long_memory, tokens, layer):
    def without(layer):
        other = long_memory(Jamba(hybrid)).double().requires_grad_(False)
        mixer = other.model.layers[layer].mixer
        (mixer.o_proj if hasattr(mixer, "o_proj") else mixer.out_proj).weight.zero_()
        return other(tokens)

    with probes.switched_off(model, {layer: "all"}):
        logits = model(tokens)

    def check(expected):
        assert_matches(logits, expected, FLOAT64, "logits")

    check(without(layer))
    assert_rejects(check, model(tokens), without(layer + 1), without(layer + 2))


def test_switched_off_holds_in_every_call_of_a_cache(model, tokens):
    with probes.switched_off(model, {0: "all", 3: [1]}):
        whole, cache = model(tokens), model.new_cache(batch=2)
        first = model(tokens[:, :6], cache=cache)
        rest = [model(token[:, None], cache=cache) for token in tokens[:, 6:].unbind(1)]
    outside = [model(tokens[:, :6], cache := model.new_cache(batch=2)), model(tokens[:, 6:], cache=cache)]

    def check(pieces):
        assert_matches(torch.cat(pieces, dim=1), whole, FLOAT64, "pieces")

    check([first, *rest])
    assert_rejects(check, outside)


def test_gradients_flow_past_a_head_that_is_off(hybrid, long_memory, tokens):
    model = long_memory(Jamba(hybrid)).double()
    with probes.switched_off(model, {1: [0]}):
        model(tokens).sum().backward()
    off, on = model.model.layers[1].self_attn.o_proj.weight.grad.split([hybrid.head_dim, 3 * hybrid.head_dim], dim=1)
    assert off.abs().max() == 0 and on.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ({4: "all"}, "no layer 4"),
        ({-1: "all"}, "no layer -1"),
        ({1: "most"}, "most"),
        ({0: [1]}, "Mamba layer"),
        ({1: [4]}, "no head 4"),
        ({3: [0, -1]}, "no head -1"),
    ],
)
def test_parts_that_do_not_exist(model, parts, problem):
    with pytest.raises(ValueError, match=problem), probes.switched_off(model, parts):
        pass


def test_a_layer_without_a_mixer_has_nothing_to_switch_off(hybrid):
    model = Jamba(replace(hybrid, pattern="m- -E"))
    for heads in ("all", [0]):
        with pytest.raises(ValueError, match="layer 1 has no mixer"), probes.switched_off(model, {1: heads}):
            pass


def test_an_induction_head_made_by_hand_scores_1():
    model = copier(67)
    length, seed = 12, 2
    (tokens,) = drawn(model, length, batch=1, seed=seed).tolist()
    assert len(set(tokens)) == length // 2, "take another seed: a token that comes twice splits the weight"
    scores = probes.induction_scores(model, length=length, batch=1, seed=seed)
    everywhere = sum(1 / (t + 1) for t in range(6, 12)) / 6
    # float32; what the softmax leaves to other tokens is far below its precision.
    assert_matches(scores, [[1.0, everywhere]], 1e-6, "scores")

    (weights,) = probes.attention_weights(model, torch.tensor([tokens])).values()

    def check(distance):
        queries = torch.arange(6, 12)
        keys = queries - distance
        seen = keys >= 0
        assert_matches(weights[0, :, queries[seen], keys[seen]].mean(1), scores[0], 1e-6, "scores")

    check(5)
    assert_rejects(check, 0, 1, 4, 6, 7)


def test_a_token_that_came_twice_splits_the_weight():
    model = copier(13)
    rows = drawn(model, 30, batch=3, seed=4).tolist()
    shares = [
        1 / sum(before == row[t] for before in row[:t])  # all places whose token before is this one
        for row in rows
        for t in range(15, 30)
    ]
    scores = probes.induction_scores(model, length=30, batch=3, seed=4)
    assert scores.shape == (1, 2) and min(shares) < 0.5
    # float32; 45 terms.
    assert_matches(scores[0, 0], sum(shares) / len(shares), 1e-5, "score")


def test_scores_of_a_random_model_by_loops(model):
    (first, second) = probes.attention_weights(model, drawn(model, 10, batch=3, seed=5)).values()
    (once, _) = probes.attention_weights(model, drawn(model, 20, batch=3, seed=5)[:, :10]).values()

    def mean(weights, places):
        return [sum(weights[b, h, t, s] for b in range(3) for t, s in places) / 3 / len(places) for h in range(4)]

    induction = probes.induction_scores(model, length=10, batch=3, seed=5)
    previous = probes.previous_token_scores(model, length=10, batch=3, seed=5)
    assert induction.shape == previous.shape == (2, 4)

    def check_induction(places, weights=first):
        assert_matches(induction[0], torch.tensor(mean(weights, places)), FLOAT64, "induction")

    def check_previous(places):
        assert_matches(previous[0], torch.tensor(mean(once, places)), FLOAT64, "previous")

    check_induction([(t, t - 4) for t in range(5, 10)])
    assert_rejects(check_induction, [(t, t - 5) for t in range(5, 10)], [(t, t - 4) for t in range(4, 10)])
    assert_rejects(lambda weights: check_induction([(t, t - 4) for t in range(5, 10)], weights), second)
    check_previous([(t, t - 1) for t in range(1, 10)])
    assert_rejects(check_previous, [(t, t) for t in range(10)], [(t, t - 1) for t in range(5, 10)])


def test_a_model_without_attention_has_no_scores(hybrid):
    config = JambaConfig(**{**vars(hybrid), "attn_layer_period": 9, "attn_layer_offset": 8})
    model = Jamba(config)
    assert probes.attention_weights(model, torch.tensor([[1, 2]])) == {}
    assert probes.induction_scores(model, length=6).shape == (0, 4)


def test_copying_by_loops(model):
    rows = drawn(model, 10, batch=3, seed=6)
    log_p = model(rows).log_softmax(-1)

    def mean(places):
        return -sum(log_p[b, t, rows[b, t + 1]].item() for b in range(3) for t in places) / 3 / len(places)

    found = probes.copying(model, length=10, batch=3, seed=6)

    def check(first, second):
        assert_matches(list(found), [mean(first), mean(second)], FLOAT64, "nats")

    check(range(4), range(5, 9))
    assert found.gain == found.first - found.second
    assert_rejects(lambda places: check(*places), (range(5), range(5, 9)), (range(4), range(4, 9)))


def test_the_copier_copies_until_its_head_is_off():
    model = copier(67)

    def check(parts):
        with probes.switched_off(model, parts):
            found = probes.copying(model, length=12, batch=1, seed=2)
        assert found.first > 3 and found.second < 1e-3

    check({})
    check({1: [1]})
    assert_rejects(check, {1: [0]}, {1: "all"}, {0: "all"})


def test_ids_to_draw_from():
    model = copier(67)
    seen = []
    model.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0].unique().tolist()))

    def check(ids, **options):
        seen.clear()
        probes.copying(model, length=200, **options)
        probes.induction_scores(model, length=200, **options)
        assert seen == [list(ids)] * 2

    check(range(3, 67))
    check(range(20, 30), vocabulary=range(20, 30))
    assert_rejects(lambda ids: check(ids, vocabulary=range(20, 30)), range(3, 67), range(19, 30))


@pytest.fixture(scope="module")
def haystack():
    """Lines of letters: no quotation mark and no digit but the needle's."""
    letters = np.random.default_rng(0).integers(97, 123, 500)
    letters[::17] = 10
    return np.array(ByteTokenizer().encode(bytes(letters.tolist()).decode()))


def code(haystack, seed):
    targets = needle_in_text(ByteTokenizer(), haystack, 80, 0.0, seed=seed).targets
    return targets[targets != IGNORED].tolist()


def test_needles_that_the_copier_finds(haystack):
    """After the quotation mark it cannot know whether the code or a line's end follows; each further digit is sure."""
    tokenizer, model = ByteTokenizer(), copier(ByteTokenizer.vocab_size)
    seed = next(seed for seed in range(50) if all(len(set(code(haystack, seed + i))) == 4 for i in (0, 1)))
    settings = {"lengths": [60, 90], "depths": [0, 0.5, 1], "trials": 2, "seed": seed}

    def check(parts):
        with probes.switched_off(model, parts):
            found = probes.needle_map(model, tokenizer, haystack, **settings)
        assert found.right.shape == (2, 3) and found.right.min() >= 0.75
        # The logits of the two that tie are far above all others.
        assert_matches(found.probability, torch.full((2, 3), 3.5 / 4), 1e-3, "probability")

    check({})
    assert_rejects(check, {1: [0]}, {0: "all"})


def test_a_cell_is_the_mean_over_trials_and_digits(haystack, long_memory, hybrid):
    tokenizer = ByteTokenizer()
    config = JambaConfig(**{**vars(hybrid), "vocab_size": tokenizer.vocab_size})
    model = long_memory(Jamba(config)).double().requires_grad_(False)
    settings = {"lengths": [50, 70], "depths": [0.1, 0.9], "trials": 3, "seed": 5}
    found = probes.needle_map(model, tokenizer, haystack, **settings)

    def by_loops(first_seed, transposed=False):
        cells = torch.zeros(2, 2, 2)
        for i, length in enumerate(settings["lengths"]):
            for j, depth in enumerate(settings["depths"]):
                for seed in range(first_seed, first_seed + 3):
                    row = needle_in_text(tokenizer, haystack, length, depth, seed=seed)
                    p = model(row.tokens)[0].softmax(-1)
                    for t in range(length - 4, length):
                        target = row.targets[0, t]
                        cells[0, i, j] += (p[t].argmax() == target) / 12
                        cells[1, i, j] += p[t, target] / 12
        return cells.transpose(1, 2) if transposed else cells

    def check(cells):
        assert_matches(list(found), list(cells), 1e-6, "cells")  # they are float32

    check(by_loops(5))
    assert_rejects(check, by_loops(6), by_loops(5, transposed=True))
    one_by_one = probes.needle_map(model, tokenizer, haystack, batch=1, **settings)
    assert_matches(list(one_by_one), list(found), 1e-6, "one row at a time")


@pytest.mark.parametrize("name", ["lengths", "depths", "trials", "batch"])
def test_a_map_of_nothing(model, haystack, name):
    settings = {"lengths": [50], "depths": [0.5], "trials": 1, "batch": 1}
    nothing = {name: type(settings[name])()}
    with pytest.raises(ValueError, match=f"{name} must be at least one"):
        probes.needle_map(model, ByteTokenizer(), haystack, **{**settings, **nothing})


def test_nats_of_a_model_that_knows_nothing(hybrid):
    model = Jamba(hybrid).requires_grad_(False)

    def check(scale):
        model.lm_head.weight.mul_(scale)
        # float32: the logarithm of a sum of 41 equal terms.
        assert_matches(list(probes.copying(model, length=8)), [math.log(41)] * 2, 1e-6, "ln 41")

    assert_rejects(check, 1)
    check(0)
