"""One law: any split over calls, any padding, any packing and any reuse of a cache gives the logits of the plain run.

Every test lays sequences out in some lawful way and compares the logits of each real token with those of its document
run alone, in one call, without a cache. Steps of length 0.01 (`long_memory`) make every token here remember all before
it; `test_short_memory_hides_a_lost_state` shows what passes otherwise.
"""

from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minijamba.attention import Attention
from minijamba.cache import Cache, KeyValues, MambaState
from minijamba.mamba import Mamba
from minijamba.model import Jamba
from minijamba.rungs import use_rung
from minijamba.testing import assert_matches, assert_rejects

# float64: other orders of summation, over some hundred terms and four layers.
FLOAT64 = 1e-12

SCHEDULES = {
    "mE A+ m+ AE": {},
    "m+": {"num_hidden_layers": 1, "num_experts": 1},
    "A+": {"num_hidden_layers": 1, "num_experts": 1, "attn_layer_period": 1, "attn_layer_offset": 0},
    # What the other families have, in one model.
    "m- -E A- -+": {
        "pattern": "m- -E A- -+", "rope_theta": 100.0, "sliding_window": 5, "head_width": 6, "attention_bias": True,
        "mamba_inner_layernorms": False, "routing": "sinkhorn", "router_bias": True, "norm_topk_prob": True,
        "hidden_act": "gelu", "mlp_bias": True, "final_norm": "layer", "head_bias": True, "residual_in_fp32": True,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=["naive", "parallel"])
def rung(request):
    with use_rung(request.param), torch.no_grad():
        yield request.param


@pytest.fixture(scope="module", params=SCHEDULES)
def model(request, rung, hybrid, long_memory):
    """The whole model, and each mixer by itself in a model of one layer."""
    model = long_memory(Jamba(replace(hybrid, **SCHEDULES[request.param]))).double().eval()
    assert model.config.schedule == request.param
    return model


class Call(NamedTuple):
    """What one call of the model gets."""

    tokens: Tensor
    mask: Tensor | None = None
    segments: Tensor | None = None


def draw(*shape, seed=0):
    return torch.randint(0, 41, shape, generator=torch.Generator().manual_seed(seed))


def documents(*lengths, seed=0):
    return [draw(length, seed=10 * seed + i) for i, length in enumerate(lengths)]


def lay_out(rows, masks=None, packed=True):
    """Rows of documents as one call: tokens at the 1s of a row's mask, such as "0111", and anything at the 0s."""
    masks = ["1" * sum(map(len, row)) for row in rows] if masks is None else masks
    mask = torch.tensor([[c == "1" for c in row] for row in masks])
    tokens, segments = draw(2, *mask.shape, seed=99)
    for i, row in enumerate(rows):
        tokens[i, mask[i]] = torch.cat(row)
        # A number returns for another document.
        segments[i, mask[i]] = torch.cat([torch.full_like(document, (7, 3)[j % 2]) for j, document in enumerate(row)])
    return Call(tokens, mask, segments if packed else None)


def cut(call, *columns):
    """One call as several, cut before the given columns."""
    bounds = pairwise([0, *columns, call.tokens.shape[1]])
    return [Call(*(None if x is None else x[:, start:end] for x in call)) for start, end in bounds]


def alone(model, rows):
    """The logits that the law asks for, (tokens, v) for each row: every document by itself."""
    return [torch.cat([model(document[None])[0] for document in row]) for row in rows]


def run(model, calls, cache=None, before_call=lambda cache: None):
    """The calls one after the other on one cache: (tokens, v) for each row, the logits of its real tokens."""
    cache = model.new_cache(len(calls[0].tokens)) if cache is None else cache
    pieces = []
    for tokens, mask, segments in calls:
        before_call(cache)
        logits = model(tokens, cache=cache, mask=mask, segments=segments)
        pieces.append([row[real] for row, real in zip(logits, real_tokens(tokens, mask), strict=True)])
    return [torch.cat(row) for row in zip(*pieces, strict=True)]


def run_without_cache(model, calls):
    (tokens, mask, segments), = calls  # fmt: skip
    logits = model(tokens, mask=mask, segments=segments)
    return [row[real] for row, real in zip(logits, real_tokens(tokens, mask), strict=True)]


def real_tokens(tokens, mask):
    return torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask


def assert_lawful(model, calls, expected, run=run):
    for row, logits in enumerate(run(model, calls)):
        assert_matches(logits, expected[row], FLOAT64, f"row {row}")


# What goes wrong in practice: each runs the calls as `run` does, but for one mistake.


def forgets_the_state(model, calls):
    return run(model, calls, before_call=lambda cache: [s.state.zero_() for s in layers(cache, MambaState)])


def forgets_the_window(model, calls):
    return run(model, calls, before_call=lambda cache: [s.window.zero_() for s in layers(cache, MambaState)])


def forgets_the_keys(model, calls):
    return run(model, calls, before_call=lambda cache: [s.keys.zero_() for s in layers(cache, KeyValues)])


def forgets_the_document(model, calls):
    """Takes the first token of every call for a continuation of the document before."""
    unnamed = model.new_cache(len(calls[0].tokens)).segment
    return run(model, calls, before_call=lambda cache: setattr(cache, "segment", unnamed))


def lets_padding_in(model, calls):
    """Mamba layers do not hear of the mask."""
    forward = Mamba.forward

    def deaf(self, x, layout, cache=None):
        return forward(self, x, replace(layout, real=None), cache)

    with patch.object(Mamba, "forward", deaf):
        return run(model, calls)


def attends_to_padding(model, calls):
    """Attention layers see all slots in use, whoever wrote them."""
    forward = Attention.forward

    def all_seeing(self, x, layout, cache=None):
        steps, slots = layout.visible.shape[1:]
        visible = torch.ones(steps, slots, dtype=torch.bool).tril(slots - steps)
        return forward(self, x, replace(layout, visible=visible.expand_as(layout.visible)), cache)

    with patch.object(Attention, "forward", all_seeing):
        return run(model, calls)


def ignores_the_mask(model, calls):
    rows = run(model, [call._replace(mask=None) for call in calls])
    real = torch.cat([call.mask for call in calls], dim=1)
    return [logits[mask] for logits, mask in zip(rows, real, strict=True)]


def ignores_packing(model, calls):
    return run(model, [call._replace(segments=None) for call in calls])


MISTAKE_OF = {
    forgets_the_state: "mamba",
    forgets_the_window: "mamba",
    lets_padding_in: "mamba",
    forgets_the_keys: "attention",
    attends_to_padding: "attention",
}


def layers(cache, kind):
    return [layer for layer in cache.layers if isinstance(layer, kind)]


def assert_rejected(model, calls, expected, *wrong):
    """The law refuses these mistakes, as far as the model has the layers that make them."""
    mixers = {layer.mixer for layer in model.config.layers}
    possible = [mistake for mistake in wrong if MISTAKE_OF.get(mistake) in {None, *mixers}]
    if possible:
        assert_rejects(lambda run: assert_lawful(model, calls, expected, run), *possible)


FORGETFUL = (forgets_the_state, forgets_the_window, forgets_the_keys)


# Splits


def test_token_by_token(model):
    rows = [documents(20), documents(20, seed=1)]
    calls, expected = cut(lay_out(rows, packed=False), *range(1, 20)), alone(model, rows)
    assert_lawful(model, calls, expected)
    assert_rejected(model, calls, expected, *FORGETFUL)
    with torch.enable_grad():  # Mamba then runs its full form on one token
        assert_lawful(model, calls, expected)


def test_every_split_in_two(model):
    rows = [documents(20), documents(20, seed=1)]
    whole, expected = lay_out(rows, packed=False), alone(model, rows)
    for at in range(1, 20):
        assert_lawful(model, cut(whole, at), expected)
    for at in (1, 10, 19):
        assert_rejected(model, cut(whole, at), expected, *FORGETFUL)


# Padding. A blank parts two turns.

PADDED = {
    "left": ["001111111 1111", "111111111 0111", "000000001 0001"],
    "right": ["111111100 1111", "111111111 1110", "100000000 1000"],
    "middle": ["110010110 0110", "101010101 1001", "011111110 1010"],
    "left, then right": ["001111111 1000", "111111111 1111", "000000001 1100"],
    "a row at rest": ["111111111 0000", "000000000 1111", "000000011 0001"],
    "a plain second turn": ["001111111 1111", "111111111 1111", "000000001 1111"],
    "one plain token": ["001111111 1", "111111111 1", "000000001 1"],
}


def padded(masks):
    """Rows that fill the masks, their layout, and the column between the turns."""
    at, masks = masks[0].index(" "), [mask.replace(" ", "") for mask in masks]
    rows = [documents(mask.count("1"), seed=i) for i, mask in enumerate(masks)]
    return rows, lay_out(rows, masks, packed=False), at


@pytest.mark.parametrize("masks", PADDED.values(), ids=PADDED)
def test_padding_in_two_turns(model, masks):
    rows, whole, at = padded(masks)
    calls, expected = cut(whole, at), alone(model, rows)
    assert_lawful(model, calls, expected)
    assert_lawful(model, calls, expected, lambda model, calls: run(model, calls, model.new_cache(3, capacity=50)))
    assert_rejected(model, calls, expected, lets_padding_in, attends_to_padding, ignores_the_mask)


@pytest.mark.parametrize("masks", PADDED.values(), ids=PADDED)
def test_padding_without_a_cache(model, masks):
    rows, whole, _ = padded(masks)
    expected = alone(model, rows)
    assert_lawful(model, [whole], expected, run_without_cache)
    assert_rejected(model, [whole], expected, ignores_the_mask)
    assert (model(whole.tokens, mask=whole.mask)[~whole.mask] == 0).all()


# Packing


def test_packed_documents_equal_separate_runs(model):
    rows = [documents(5, 1, 7, 4), documents(1, 1, 12, 3, seed=1)]
    whole, expected = lay_out(rows), alone(model, rows)
    assert_lawful(model, [whole], expected)
    assert_lawful(model, [whole], expected, run_without_cache)
    assert_rejected(model, [whole], expected, ignores_packing)


def test_packing_split_at_every_place(model):
    rows = [documents(5, 1, 7, 4), documents(1, 1, 12, 3, seed=1)]
    whole, expected = lay_out(rows), alone(model, rows)
    for at in range(1, 17):
        assert_lawful(model, cut(whole, at), expected)
    assert_lawful(model, cut(whole, *range(1, 17)), expected)
    assert_rejected(model, cut(whole, 9), expected, *FORGETFUL, ignores_packing)  # within a document
    assert_rejected(model, cut(whole, 13), expected, forgets_the_document)  # between two


def test_packing_and_padding_together(model):
    rows = [documents(4, 3), documents(2, 2, 5, seed=1)]
    whole, expected = lay_out(rows, ["0110101010110", "1101110110110"]), alone(model, rows)
    for at in range(1, 13):
        assert_lawful(model, cut(whole, at), expected)
    assert_lawful(model, [whole], expected, run_without_cache)
    assert_rejected(model, cut(whole, 6), expected, ignores_packing, ignores_the_mask, lets_padding_in)


def test_calls_without_segments_go_on_with_the_last_document(model):
    """Packed, then plain; plain, then packed; and token by token after that."""
    rows = [documents(5, 9)]
    whole, expected = lay_out(rows), alone(model, rows)
    for calls, plain in ((cut(whole, 8), 1), (cut(whole, 3), 0)):
        calls[plain] = calls[plain]._replace(segments=None)
        assert_lawful(model, calls, expected)
        assert_lawful(model, [*calls[:1], *cut(calls[1], *range(1, calls[1].tokens.shape[1]))], expected)
        assert_rejected(model, calls, expected, *FORGETFUL)


def test_padding_does_not_name_a_document(model):
    """A plain turn; a packed one in which row 1 rests; one in which it goes on: still the same document."""
    rows = [documents(6), documents(7, seed=1)]
    whole, expected = lay_out(rows, ["111111000", "111100111"]), alone(model, rows)
    first, *rest = cut(whole, 4, 6)
    calls = [first._replace(segments=None), *rest]
    assert_lawful(model, calls, expected)
    assert_rejected(model, calls, expected, *FORGETFUL, lets_padding_in)


# Reuse


def copied(cache, path):
    return cache.copy()


def saved(cache, path):
    cache.save(path)
    return Cache.load(path)


def selected(cache, path):
    return cache.select([1, 0]).select([1, 0])


def the_same(cache, path):
    return cache


@pytest.mark.parametrize("reuse", [copied, saved, selected])
@pytest.mark.parametrize("kind", ["plain", "ragged", "packed"])
def test_two_second_turns_from_one_cache(model, reuse, kind, tmp_path):
    """One answer on the cache itself, one on what was kept of it; neither sees the other."""
    rows, masks = {
        "plain": ([documents(6), documents(6, seed=1)], None),
        "ragged": ([documents(6), documents(4, seed=1)], ["111111", "001111"]),
        "packed": ([documents(2, 4), documents(3, 3, seed=1)], None),
    }[kind]
    prompt = lay_out(rows, masks, packed=kind == "packed")
    answers = [draw(2, 5, seed=seed) for seed in (1, 2)]
    continued = [[torch.cat([row[-1], more])] for answer in answers for row, more in zip(rows, answer, strict=True)]
    expected = [logits[-5:] for logits in alone(model, continued)]

    def check(reuse):
        cache = model.new_cache(2)
        run(model, [prompt], cache)
        kept = reuse(cache, tmp_path / "cache.safetensors")
        first, second = (cut(Call(answer), 1, 3) for answer in answers)
        assert_matches(run(model, first, cache) + run(model, second, kept), expected, FLOAT64, "answers")

    check(reuse)
    assert_rejects(check, the_same)


# Everything at once


@st.composite
def arrangements(draw):
    """Rows of documents laid out with padding anywhere, cut into calls anywhere."""
    columns = draw(st.integers(1, 14))
    masks = draw(st.lists(st.text("01", min_size=columns, max_size=columns), min_size=1, max_size=3))
    packed = draw(st.booleans())
    rows = []
    for seed, mask in enumerate(masks):
        length = mask.count("1")
        ends = draw(st.sets(st.integers(1, length - 1))) if packed and length > 1 else []
        rows.append(documents(*(end - start for start, end in pairwise([0, *sorted(ends), length])), seed=seed))
    cuts = sorted(draw(st.sets(st.integers(1, columns - 1)))) if columns > 1 else []
    return rows, cut(lay_out(rows, masks, packed), *cuts)


@settings(max_examples=25)
@given(arrangement=arrangements())
def test_any_arrangement(model, arrangement):
    rows, calls = arrangement
    rows = [[document for document in row if len(document)] for row in rows]
    expected = [alone(model, [row])[0] if row else torch.zeros(0, 41).double() for row in rows]
    assert_lawful(model, calls, expected)


# Gradients


@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
def test_gradients_through_a_split_equal_the_whole_run(model, kind):
    """A loss on the last two tokens only, so that whatever the earlier calls learn comes through the cache."""
    rows, masks = {
        "plain": ([documents(12)], None),
        "padded": ([documents(12), documents(8, seed=1)], ["111111111111", "110111011010"]),
        "packed": ([documents(4, 8)], None),
    }[kind]
    whole, parameters = lay_out(rows, masks, packed=kind == "packed"), dict(model.named_parameters())

    def gradients(logits):
        loss = sum(row[-2:].sin().sum() for row in logits)
        found = torch.autograd.grad(loss, parameters.values(), allow_unused=True, materialize_grads=True)
        return dict(zip(parameters, found, strict=True))

    def cut_off(cache):
        for layer in filter(None, cache.layers):
            vars(layer).update({name: tensor.detach() for name, tensor in vars(layer).items()})

    def check(before_call):
        for columns in ((8,), (3, 4, 8), range(1, 12)):
            actual = gradients(run(model, cut(whole, *columns), before_call=before_call))
            # The backward pass sums as many terms again.
            assert_matches(actual, expected, 10 * FLOAT64, f"gradients, cut at {list(columns)}")

    with torch.enable_grad():
        expected = gradients(alone(model, rows))
        check(lambda cache: None)
        assert_rejects(check, cut_off)


# Why the memory is long


@torch.no_grad()
def test_short_memory_hides_a_lost_state(hybrid, long_memory):
    """With transformers' start, weights of 0.02 and delta's bias 0, a test in float32 to 1e-5 accepts a lost state."""
    config = replace(hybrid, **SCHEDULES["m+"])
    whole = lay_out([documents(40)], packed=False)

    def assert_unnoticed(model, last, tolerance):
        logits = forgets_the_state(model, cut(whole, 20))[0]
        assert_matches(logits[-last:], model(whole.tokens)[0, -last:], tolerance, "logits after a lost state")

    def as_transformers_starts(model):
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.zero_()
            elif parameter.dim() > 1 and "A_log" not in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(len(name)))
        return model

    assert_unnoticed(as_transformers_starts(Jamba(config)), last=40, tolerance=1e-5)
    # Large weights show it at once, but it is forgotten within 20 tokens as long as the steps are long.
    assert_unnoticed(long_memory(Jamba(config), delta_bias=0.0), last=1, tolerance=1e-5)
    assert_rejects(lambda model: assert_unnoticed(model, last=1, tolerance=1e-2), long_memory(Jamba(config)))
