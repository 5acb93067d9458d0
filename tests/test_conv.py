from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minijamba.conv import causal_conv, causal_conv_step
from minijamba.testing import assert_matches, assert_rejects

# float64, at most four products a value.
FLOAT64 = 1e-14
RUNGS = ["naive", "parallel"]
CHANNELS = 3
IDS = torch.tensor([[7, 7, 7, 3, 3, 7, 7, 7, 7], [5, 1, 1, 1, 1, 1, 1, 2, 5]])

pytestmark = pytest.mark.parametrize("rung", RUNGS)
widths = pytest.mark.parametrize("width", [1, 2, 4])


def inputs(width, steps=9, batch=2, bias=True):
    torch.manual_seed(width)
    x, weight = torch.randn(batch, steps, CHANNELS).double(), torch.randn(CHANNELS, width).double()
    return x, weight, torch.randn(CHANNELS).double() if bias else None


def by_hand(x, weight, bias, state):
    """silu(bias + sum_j weight_j x_{t - (w-1) + j}), one number after the other."""
    (batch, steps, channels), width = x.shape, weight.shape[1]
    y = torch.zeros_like(x)
    for b in range(batch):
        for t in range(steps):
            for c in range(channels):
                total = 0.0 if bias is None else bias[c]
                for j in range(width):
                    at = t - (width - 1) + j
                    total = total + weight[c, j] * (x[b, at, c] if at >= 0 else state[b, at, c])
                y[b, t, c] = total * torch.sigmoid(torch.as_tensor(total))
    return y


def documents_of(ids):
    """Pieces [start, end) of a row of ids; an id that returns is another document."""
    starts = [0, *(t for t in range(1, len(ids)) if ids[t] != ids[t - 1]), len(ids)]
    return list(pairwise(starts))


@widths
@pytest.mark.parametrize("bias", [True, False])
def test_equals_its_formula(rung, width, bias):
    x, weight, bias = inputs(width, bias=bias)
    state = torch.randn(2, width - 1, CHANNELS).double()

    def check(x, weight=weight):
        y = causal_conv(x, weight, bias, state=state, rung=rung)
        assert_matches(y, by_hand(inputs(width)[0], inputs(width)[1], bias, state), FLOAT64, "conv")

    check(x)
    assert_rejects(check, x.roll(1, dims=1))
    if width > 1:
        with pytest.raises(AssertionError):
            check(x, weight.flip(1))


def test_no_state_is_zeros_and_activation_can_be_left_out(rung):
    x, weight, bias = inputs(4)
    assert_matches(
        causal_conv(x, weight, bias, rung=rung), by_hand(x, weight, bias, torch.zeros(2, 3, CHANNELS)), FLOAT64, "conv"
    )
    linear = causal_conv(x, weight, bias, activation=False, rung=rung)
    assert_matches(causal_conv(x, weight, bias, rung=rung), F.silu(linear), FLOAT64, "silu")
    assert_matches(linear[:, 0], bias + weight[:, -1] * x[:, 0], FLOAT64, "first token")


@widths
def test_every_split_carries_the_window(rung, width):
    x, weight, bias = inputs(width)
    whole, last = causal_conv(x, weight, bias, return_state=True, rung=rung)
    assert_matches(last, x[:, x.shape[1] - (width - 1) :], 0, "window")

    def check(carry):
        for cut in range(1, x.shape[1]):
            first, state = causal_conv(x[:, :cut], weight, bias, return_state=True, rung=rung)
            rest, state = causal_conv(x[:, cut:], weight, bias, state=carry(state), return_state=True, rung=rung)
            assert_matches(torch.cat([first, rest], dim=1), whole, FLOAT64, f"split at {cut}")
            assert_matches(state, last, 0, f"window after a split at {cut}")

    check(lambda state: state)
    if width > 1:
        assert_rejects(check, lambda state: None, lambda state: state.roll(1, dims=2))


@widths
@pytest.mark.parametrize("bias", [True, False])
def test_steps_equal_the_whole(rung, width, bias):
    x, weight, bias = inputs(width, bias=bias)
    whole, last = causal_conv(x, weight, bias, return_state=True, rung=rung)

    def check(carry):
        window, tokens = torch.zeros(2, width - 1, CHANNELS).double(), []
        for token in x.unbind(1):
            tokens.append(causal_conv_step(carry(window), token, weight, bias, rung=rung))
        assert_matches(torch.stack(tokens, dim=1), whole, FLOAT64, "steps")
        assert_matches(window, last, 0, "window")

    check(lambda window: window)
    if width > 1:
        assert_rejects(check, torch.clone, torch.Tensor.zero_)


@widths
def test_packed_documents_equal_separate_runs(rung, width):
    x, weight, bias = inputs(width)

    def check(segments):
        y, window = causal_conv(x, weight, bias, segments=segments, return_state=True, rung=rung)
        for row, ids in enumerate(IDS.tolist()):
            for start, end in documents_of(ids):
                alone, alone_window = causal_conv(
                    x[row : row + 1, start:end], weight, bias, return_state=True, rung=rung
                )
                assert_matches(y[row, start:end], alone[0], FLOAT64, f"row {row}, document at {start}")
            assert_matches(window[row], alone_window[0], 0, f"row {row}, window of the last document")

    check(IDS)
    if width > 1:
        # The last variant takes the second 7 of row 0 for the first one's continuation: ids that differ are not enough.
        assert_rejects(check, None, torch.zeros_like(IDS), IDS.sort(dim=1).values)


@widths
def test_packed_documents_over_calls(rung, width):
    """The first token of a call continues the window; zeroing it in rows that start a document is the caller's."""
    x, weight, bias = inputs(width)
    whole, last = causal_conv(x, weight, bias, segments=IDS, return_state=True, rung=rung)

    def check(starts):
        for cut in range(1, x.shape[1]):
            first, state = causal_conv(x[:, :cut], weight, bias, segments=IDS[:, :cut], return_state=True, rung=rung)
            state = state.masked_fill(starts(cut)[:, None, None], 0)
            rest, state = causal_conv(
                x[:, cut:], weight, bias, segments=IDS[:, cut:], state=state, return_state=True, rung=rung
            )
            assert_matches(torch.cat([first, rest], dim=1), whole, FLOAT64, f"split at {cut}")
            assert_matches(state, last, 0, f"window after a split at {cut}")

    check(lambda cut: IDS[:, cut] != IDS[:, cut - 1])
    if width > 1:
        assert_rejects(check, lambda cut: torch.zeros(2, dtype=torch.bool))


@widths
@pytest.mark.parametrize("segments", [None, IDS])
def test_padding_on_the_right_stays_out_of_the_window(rung, width, segments):
    x, weight, bias = inputs(width)
    state = torch.randn(2, width - 1, CHANNELS).double()

    def check(lengths):
        for first, second in [(9, 9), (6, 1), (2, 8), (0, 3), (0, 0)]:
            y, window = causal_conv(
                x, weight, bias, state=state, segments=segments, lengths=lengths(first, second), return_state=True,
                rung=rung,
            )  # fmt: skip
            for row, length in enumerate([first, second]):
                if length == 0:
                    assert_matches(window[row], state[row], 0, f"row {row} of {length}")
                    continue
                ids = None if segments is None else segments[row : row + 1, :length]
                alone, alone_window = causal_conv(
                    x[row : row + 1, :length], weight, bias, state=state[row : row + 1], segments=ids,
                    return_state=True, rung=rung,
                )  # fmt: skip
                assert_matches(y[row, :length], alone[0], FLOAT64, f"row {row} of {length}")
                assert_matches(window[row], alone_window[0], 0, f"window of row {row} of {length}")

    check(lambda *lengths: torch.tensor(lengths))
    if width > 1:
        assert_rejects(check, lambda *lengths: None, lambda *lengths: torch.tensor(lengths[::-1]))


@settings(max_examples=25)
@given(data=st.data())
def test_any_cuts_packing_and_width(rung, data):
    width, steps = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 12))
    segments = torch.tensor([data.draw(st.lists(st.integers(0, 2), min_size=steps, max_size=steps))])
    cuts = sorted(data.draw(st.sets(st.integers(1, steps - 1))) if steps > 1 else [])
    x, weight, bias = inputs(width, steps, batch=1)
    whole = causal_conv(x, weight, bias, segments=segments, rung="naive")
    pieces, state = [], None
    for start, end in pairwise([0, *cuts, steps]):
        if start and segments[0, start] != segments[0, start - 1]:
            state = None
        y, state = causal_conv(
            x[:, start:end], weight, bias, segments=segments[:, start:end], state=state, return_state=True, rung=rung
        )
        pieces.append(y)
    assert_matches(torch.cat(pieces, dim=1), whole, FLOAT64, "conv")


@widths
@pytest.mark.parametrize("packed", [False, True])
def test_gradients(rung, width, packed):
    x, weight, bias = inputs(width)
    state = torch.randn(2, width - 1, CHANNELS).double()
    leaves = {"x": x, "weight": weight, "bias": bias, "state": state}

    def gradients(rung):
        fresh = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
        y, window = causal_conv(
            fresh["x"], fresh["weight"], fresh["bias"], state=fresh["state"], segments=IDS if packed else None,
            lengths=torch.tensor([9, 5]), return_state=True, rung=rung,
        )  # fmt: skip
        (y.sin().sum() + window.square().sum()).backward()
        return {name: leaf.grad for name, leaf in fresh.items() if leaf.numel()}

    expected = gradients("naive")
    assert_matches(gradients(rung), expected, FLOAT64, "gradients")
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, f"{name} has no gradient"
    if rung == "naive" and width == 2 and packed:
        assert torch.autograd.gradcheck(
            lambda *leaves: causal_conv(*leaves[:3], state=leaves[3], segments=IDS, rung=rung),
            [leaf.clone().requires_grad_() for leaf in leaves.values()],
        )


def test_bad_shapes_are_named(rung):
    x, weight, bias = inputs(4)
    for match, arguments in {
        r"x must be \(b, t, c\)": (x[0], weight),
        "no time steps": (x[:, :0], weight),
        r"weight must be \(3, 4\)": (x, weight[:2]),
        r"bias must be \(3,\)": (x, weight, bias[:2]),
    }.items():
        with pytest.raises(ValueError, match=match):
            causal_conv(*arguments, rung=rung)
    for window, token in (x[:, :4], x[:, 0]), (x[:, :3, :2], x[:, 0, :2]):
        with pytest.raises(ValueError, match=r"window must be \(2, 3, [23]\) beside x"):
            causal_conv_step(window, token, weight, rung=rung)
    with pytest.raises(ValueError, match=r"state must be \(2, 3, 3\)"):
        causal_conv(x, weight, bias, state=x[:, :4], rung=rung)
    with pytest.raises(ValueError, match=r"segments must be \(2, 9\)"):
        causal_conv(x, weight, bias, segments=IDS[:, :4], rung=rung)
    with pytest.raises(ValueError, match=r"lengths must be \(2,\)"):
        causal_conv(x, weight, bias, lengths=torch.tensor(9), rung=rung)
