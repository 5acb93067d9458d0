"""Part 1: the selective scan over a sequence."""

import adapters
import torch
import torch.nn.functional as F
from judge import EXACT, draw, points

from minijamba.scan import naive
from minijamba.testing import assert_matches


def inputs(b=2, t=11, c=5, n=3):
    delta = F.softplus(0.3 * draw(b, t, c, seed=1) - 4.6)
    A, B, C, D = -draw(c, n, seed=2).exp(), draw(b, t, n, seed=3), draw(b, t, n, seed=4), draw(c, seed=5)
    return {"x": draw(b, t, c), "delta": delta, "A": A, "B": B, "C": C, "D": D, "state": draw(b, c, n, seed=6)}


def reference(x, delta, A, B, C, D, state):
    return naive.scan(x, delta, A, B, C, D, None, None, False, state, None)


def recurrence(decay, written, C, state, read_early=False):
    """y_t = <C_t, state_t> with state_t = decay_t state_{t-1} + written_t, all (b, t, c, n) but C (b, t, n)."""
    y = []
    for decay_t, written_t, C_t in zip(decay.unbind(1), written.unbind(1), C.unbind(1), strict=True):
        before, state = state, decay_t * state + written_t
        y.append(((before if read_early else state) * C_t[:, None]).sum(-1))
    return torch.stack(y, dim=1)


def mistakes(x, delta, A, B, C, D, state):
    """What y is if one thing is wrong, by the idea that was missed."""
    grown = delta[..., None] * A
    pushed = B[:, :, None] * x[..., None]
    decay, written, skip = grown.exp(), delta[..., None] * pushed, D * x
    zero_order_hold = (decay - 1) / A * pushed
    return {
        "your state is read before it is updated: y_t reads state_t, which holds x_t already; compare step 0":
            recurrence(decay, written, C, state, read_early=True) + skip,
        "the skip connection D x_t is missing": recurrence(decay, written, C, state),
        "the skip is x_t alone: each channel has its own factor D": recurrence(decay, written, C, state) + x,
        "x enters the state without its step length: delta_t B_t x_t": recurrence(decay, pushed, C, state) + skip,
        "the decay forgets the step length: exp(delta_t A), not exp(A)":
            recurrence(A.exp().expand_as(decay), written, C, state) + skip,
        "1 + delta_t A is only the beginning of exp(delta_t A)": recurrence(1 + grown, written, C, state) + skip,
        "A is negative already: exp(-delta_t A) lets the state grow": recurrence(1 / decay, written, C, state) + skip,
        "the state keeps nothing of before: decay it and add to it": recurrence(0 * decay, written, C, state) + skip,
        "the state never decays: multiply it by exp(delta_t A) first": recurrence(decay**0, written, C, state) + skip,
        "B is held by zero order, but Jamba's checkpoints take Euler's rule, delta_t B_t":
            recurrence(decay, zero_order_hold, C, state) + skip,
        "B and C are swapped: a token writes with B and reads with C":
            recurrence(decay, delta[..., None] * C[:, :, None] * x[..., None], B, state) + skip,
        "softplus is applied to delta, which is a step length already":
            reference(x, F.softplus(delta), A, B, C, D, state)[0],
    }  # fmt: skip


@points(3)
def test_two_steps_by_hand():
    """exp(delta A) = 1/2 and delta B x = x: from 4 the state goes to 2 + 3 = 5, and then to 2.5 - 1 = 1.5."""
    x, C = (torch.tensor(values, dtype=torch.float64).view(1, 2, 1) for values in ([3.0, -1.0], [2.0, 10.0]))
    A, ones = torch.tensor([[0.5]], dtype=torch.float64).log(), torch.ones_like(x)
    y, state = adapters.run_scan(x, ones, A, ones, C, ones[0, 0], 4 * ones[:, :1])
    early = {"your state is read before it is updated": [2 * 4 + 3.0, 10 * 5 - 1]}
    assert_matches(y.flatten(), [2 * 5 + 3.0, 10 * 1.5 - 1], EXACT, "y_0, y_1", early)
    assert_matches(state.flatten(), [1.5], EXACT, "the last state")


@points(6)
def test_values_from_a_state_of_zeros():
    given = inputs()
    zeros = given | {"state": torch.zeros_like(given["state"])}
    y, _ = adapters.run_scan(**given | {"state": None})
    assert_matches(y, reference(**zeros)[0], EXACT, "y", mistakes(**zeros))


@points(4)
def test_the_given_state_is_continued_and_the_last_returned():
    given = inputs()
    before = given["state"].clone()
    expected, last = reference(**given)
    from_zeros = reference(**given | {"state": torch.zeros_like(before)})
    y, state = adapters.run_scan(**given)
    assert torch.equal(given["state"], before), "your scan writes into the state it was given: return a new one"
    ignored = "the state that was given is ignored: the loop starts from zeros"
    assert_matches(y, expected, EXACT, "y", mistakes(**given) | {ignored: from_zeros[0]})
    first = reference(**{name: tensor[:, :1] if name in "x delta B C" else tensor for name, tensor in given.items()})
    wrong = {
        ignored: from_zeros[1],
        "that is the state after the first step": first[1],
        "that is the state you were given": before,
    }
    assert_matches(state, last, EXACT, "the returned state", wrong)


@points(4)
def test_any_split_equals_the_whole():
    given = inputs() | {"state": torch.zeros(2, 5, 3, dtype=torch.float64)}
    whole, _ = reference(**given)
    for lengths in [1, 10], [4, 1, 6], [1] * 11:
        found, lost, state = [], [], None
        for x, delta, B, C in zip(*(given[name].split(lengths, 1) for name in ("x", "delta", "B", "C")), strict=True):
            y, state = adapters.run_scan(x, delta, given["A"], B, C, given["D"], state)
            found.append(y)
            lost.append(reference(**given | {"x": x, "delta": delta, "B": B, "C": C})[0])
        wrong = {"each call starts from zeros: it must continue the state of the one before": torch.cat(lost, 1)}
        assert_matches(torch.cat(found, 1), whole, EXACT, f"y in pieces of {lengths}", wrong)


@points(2)
def test_gradients_reach_every_argument():
    given = {name: tensor.requires_grad_() for name, tensor in inputs().items()}

    def gradients(run):
        y, state = run(**given)
        loss = (y * draw(*y.shape, seed=7)).sum() + (state * draw(*state.shape, seed=8)).sum()
        assert loss.requires_grad, "y has no gradient: leave torch.no_grad, .data and .detach out of the scan"
        return dict(zip(given, torch.autograd.grad(loss, list(given.values()), allow_unused=True), strict=True))

    for name, expected in gradients(reference).items():
        actual = gradients(adapters.run_scan)[name]
        assert actual is not None, f"no gradient reaches {name}: something cuts it off, such as .detach or .item"
        assert_matches(actual, expected, EXACT, f"the gradient of {name}")


@points(1)
def test_the_state_is_wider_than_half_precision():
    given = {name: tensor.bfloat16() for name, tensor in inputs(t=200).items()} | {"state": None}
    y, state = adapters.run_scan(**given)
    assert state.dtype == torch.float32, f"the state is {state.dtype}: a sum of hundreds of steps needs float32"
    assert y.dtype == torch.bfloat16, f"y is {y.dtype}, but x is bfloat16"
    # float32, sums of 200 terms; bfloat16 anywhere within would give 1e-3
    assert_matches(state, reference(**given)[1], 1e-5, "the state of bfloat16 inputs")
