import pytest
import torch

from minijamba import attention as module
from minijamba.attention import Attention, attention
from minijamba.cache import Layout
from minijamba.testing import assert_matches, assert_rejects

# float64, sums of at most some tens of terms.
FLOAT64 = 1e-13
RUNGS = ["naive", "parallel"]
HEADS = {"a key head each": (4, 4), "two groups": (4, 2), "one key head": (4, 1), "one head": (1, 1)}

rungs = pytest.mark.parametrize("rung", RUNGS)
heads = pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)


def inputs(heads=(4, 2), steps=7, keys=7, width=3):
    torch.manual_seed(0)
    h, g = heads
    q = torch.randn(2, steps, h, width).double()
    return q, torch.randn(2, keys, g, width).double(), torch.randn(2, keys, g, width).double()


def by_hand(q, k, v, visible, scale=None, group=lambda head, share: head // share):
    """One query and one head after the other."""
    (batch, steps, h, width), share = q.shape, q.shape[2] // k.shape[2]
    y = torch.zeros_like(q)
    for b in range(batch):
        for t in range(steps):
            seen = visible[b, t].nonzero()[:, 0]
            for head in range(h):
                g = group(head, share)
                scores = (k[b, seen, g] @ q[b, t, head]) * (width**-0.5 if scale is None else scale)
                weights = (scores - scores.max()).exp()
                y[b, t, head] = (weights / weights.sum()) @ v[b, seen, g]
    return y


def causal(steps, keys):
    return (torch.arange(keys) <= torch.arange(steps)[:, None] + keys - steps).expand(2, -1, -1)


@rungs
@heads
def test_causal_attention_by_hand(rung, heads):
    q, k, v = inputs(heads)
    y = attention(q, k, v, rung=rung)

    def check(expected):
        assert_matches(y, expected, FLOAT64, "attention")

    check(by_hand(q, k, v, causal(7, 7)))
    assert_rejects(
        check,
        by_hand(q, k, v, torch.ones(2, 7, 7, dtype=torch.bool)),
        by_hand(q, k, v, causal(7, 7), scale=1.0),
        by_hand(q, k, v, causal(7, 7).roll(1, dims=2)),
    )


@rungs
def test_neighbouring_query_heads_share_a_key_head(rung):
    q, k, v = inputs((4, 2))

    def check(group):
        assert_matches(attention(q, k, v, rung=rung), by_hand(q, k, v, causal(7, 7), group=group), FLOAT64, "groups")

    check(lambda head, share: head // share)
    assert_rejects(check, lambda head, share: head % 2)


@rungs
@heads
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_queries_stand_at_the_end_of_longer_keys(rung, heads, steps):
    q, k, v = inputs(heads)
    whole = attention(q, k, v, rung="naive")

    def check(first):
        y = attention(q[:, 7 - steps :], k[:, first:], v[:, first:], rung=rung)
        assert_matches(y, whole[:, 7 - steps :], FLOAT64, "last queries")

    check(0)
    assert_rejects(check, 7 - steps)


@rungs
@heads
@pytest.mark.parametrize(("steps", "keys"), [(7, 7), (3, 7), (1, 7), (1, 1)])
def test_a_visible_mask_replaces_causality(rung, heads, steps, keys):
    q, k, v = inputs(heads, steps, keys)
    visible = torch.rand(2, steps, keys, generator=torch.Generator().manual_seed(1)) < 0.5
    visible[:, :, 0] = True
    y = attention(q, k, v, visible, rung=rung)

    def check(visible):
        assert_matches(y, by_hand(q, k, v, visible), FLOAT64, "visible")

    check(visible)
    if keys > 1:
        assert_rejects(check, causal(steps, keys), visible.flip(0), torch.ones_like(visible))
    assert_matches(
        attention(q, k, v, causal(steps, keys), rung=rung), attention(q, k, v, rung="naive"), FLOAT64, "causal mask"
    )


@heads
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_the_rungs_are_equal(heads, masked):
    visible = causal(3, 7) & (torch.arange(7) != 2) if masked else None

    def gradients(rung):
        q, k, v = (x.requires_grad_() for x in inputs(heads, steps=3))
        attention(q, k, v, visible, rung=rung).sin().sum().backward()
        return {"q": q.grad, "k": k.grad, "v": v.grad}

    expected = gradients("naive")
    assert_matches(gradients("parallel"), expected, FLOAT64, "gradients")
    if masked:
        assert_matches(expected["k"][:, 2], torch.zeros_like(expected["k"][:, 2]), 0, "hidden key")
        assert_rejects(
            lambda name: assert_matches(expected[name][:, 2], torch.zeros_like(expected[name][:, 2]), 0), "q"
        )


def test_naive_gradient_is_the_difference_quotient():
    q, k, v = (x.requires_grad_() for x in inputs((2, 1), steps=2, keys=3, width=2))
    assert torch.autograd.gradcheck(lambda *x: attention(*x, rung="naive"), (q, k, v))


@rungs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softmax_is_taken_in_float32(rung, dtype):
    """256 equal keys: a weight of 1/256 each, whose sum in half precision would lose the values' last bits."""
    q, k, v = inputs((2, 1), steps=1, keys=256)
    q, k, v = (x.to(dtype) for x in (q * 0, k, v + 1))
    y = attention(q, k, v, rung=rung)
    assert y.dtype == dtype
    mean = v.double().mean(1, keepdim=True).expand(-1, -1, 2, -1)
    # One rounding of the weights and one of the sum: 2^-8 each.
    assert_matches(y, mean, 2**-7, "mean")
    assert_rejects(lambda expected: assert_matches(y, expected, 2**-7), mean * (1 + 2**-6))


@rungs
def test_order_does_not_matter_without_a_mask_on_it(rung):
    """No positions: keys and values in another order give the same answer."""
    q, k, v = inputs(steps=1)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    expected = attention(q, k, v, rung=rung)

    def check(v):
        assert_matches(attention(q, k[:, order], v, rung=rung), expected, FLOAT64, "shuffled")

    check(v[:, order])
    assert_rejects(check, v)


def test_module_projects_heads_and_joins_them(hybrid, long_memory):
    module = long_memory(Attention(hybrid)).double()
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16).double()
    q, k, v = ((x @ p.weight.T).view(2, 5, -1, 4) for p in (module.q_proj, module.k_proj, module.v_proj))
    assert (q.shape[2], k.shape[2], v.shape[2]) == (4, 2, 2)
    heads = by_hand(q, k, v, causal(5, 5))

    def check(heads):
        assert_matches(module(x, Layout()), heads.flatten(2) @ module.o_proj.weight.T, FLOAT64, "attention")

    check(heads)
    assert_rejects(check, heads.transpose(2, 3), heads.flip(2))


@torch.no_grad()
@pytest.mark.parametrize(("steps", "keys"), [(2, 3), (5, 12), (4, 71)])
def test_a_prompt_s_past_is_attended_to_in_pieces(steps, keys, monkeypatch):
    """As on a GPU, where a library computes each piece; here the definition does, with its sums of exponentials."""
    q, k, v = inputs(steps=steps, keys=keys)

    def piece(q, k, v, causal):
        share = q.shape[1] // k.shape[1]
        k, v = (heads.repeat_interleave(share, 1) for heads in (k, v))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if causal:
            scores = scores.masked_fill(~torch.ones(steps, steps, dtype=torch.bool).tril(), -torch.inf)
        return scores.softmax(-1) @ v, scores.logsumexp(-1, keepdim=True)

    def check(piece):
        monkeypatch.setattr(module, "_piece", piece)
        assert_matches(module._flash(q, k, v, None), attention(q, k, v, rung="naive"), 1e-5, "in pieces")

    monkeypatch.setattr(module, "_has_pieces", lambda q: True)
    check(piece)

    def sums_forgotten(q, k, v, causal):
        y, weight = piece(q, k, v, causal)
        return y, torch.zeros_like(weight)

    def nothing_hidden(q, k, v, causal):
        return piece(q, k, v, False)

    assert_rejects(check, sums_forgotten, nothing_hidden)


def test_pieces_are_few_lengths_and_cover_all():
    def check(cut):
        for keys in (1, 2, 7, 16384, 3 * 16384, 262143):
            ends = [0, *(end for _, end in cut(keys))]
            assert ends[-1] == keys and [begin for begin, _ in cut(keys)] == ends[:-1]
            lengths = [end - begin for begin, end in cut(keys)]
            assert all(length & (length - 1) == 0 for length in lengths) and sorted(set(lengths)) == lengths[::-1]

    check(module._pieces)
    assert_rejects(check, lambda keys: [(0, keys)], lambda keys: [(i, i + 1) for i in range(min(keys, 9))])
