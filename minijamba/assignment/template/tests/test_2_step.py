"""Part 2: one step of the scan."""

import adapters
import torch
from judge import EXACT, points
from test_1_scan import inputs, mistakes, reference

from minijamba.testing import assert_matches


def first_token(given):
    return {name: tensor[:, 0] if name in ("x", "delta", "B", "C") else tensor for name, tensor in given.items()}


@points(4)
def test_one_token():
    given = inputs(t=1)
    y, _ = adapters.run_step(**first_token(given))
    wrong = {idea: value[:, 0] for idea, value in mistakes(**given).items()}
    assert_matches(y, reference(**given)[0][:, 0], EXACT, "y", wrong)


@points(3)
def test_the_state_is_returned_anew():
    given = inputs(t=1)
    before = given["state"].clone()
    _, state = adapters.run_step(**first_token(given))
    assert torch.equal(given["state"], before), "your step writes into the state it was given: a kept one would change"
    kept = (given["delta"][:, 0, :, None] * given["A"]).exp() * before
    pushed = given["x"][:, 0, :, None] * given["B"]
    written = given["delta"][:, 0, :, None] * pushed
    wrong = {
        "that is the state you were given": before,
        "what was there does not decay: multiply it by exp(delta A) first": before + written,
        "what was there is gone: decay it and add to it": written,
        "x enters the state without its step length: delta B x": kept + pushed,
    }
    assert_matches(state, reference(**given)[1], EXACT, "the new state", wrong)


@points(3)
def test_steps_in_a_row_equal_the_scan():
    given, found = inputs(), []
    state = given["state"]
    for x, delta, B, C in zip(*(given[name].unbind(1) for name in ("x", "delta", "B", "C")), strict=True):
        y, state = adapters.run_step(state, x, delta, given["A"], B, C, given["D"])
        found.append(y)
    expected, last = reference(**given)
    assert_matches(torch.stack(found, 1), expected, EXACT, "y", mistakes(**given))
    assert_matches(state, last, EXACT, "the last state")
