import doctest
import statistics

import numpy as np
import pytest
import torch

from minijamba import testing
from minijamba.testing import WrongAnswer, assert_explains, assert_matches, assert_rejects, attempt

NAN, INF = float("nan"), float("inf")


def accepts_closeness_of_allclose(actual, expected, tolerance, name="values"):
    """The usual shortcut, planted: broadcasts, ignores kinds, and has an absolute tolerance of its own."""
    assert np.allclose(actual, expected, rtol=tolerance), f"{name} differ"


def accepts_equal_shapes(actual, expected, tolerance, name="values"):
    assert np.shape(actual) == np.shape(expected)


DIFFERENT = {
    "beyond the tolerance": ([1.0, 2.0], [1.0, 2.0 + 3e-6]),
    "small values": ([1e-9, 2e-9], [1e-9, 3e-9]),
    "shape that broadcasts": (torch.ones(3), torch.ones(1, 3)),
    "integers against floats": (torch.ones(2, dtype=torch.int64), torch.ones(2)),
    "booleans against integers": (np.array([True]), np.array([1])),
    "real against complex": (np.array([1.0]), np.array([1.0 + 0j])),
    "NaN on both sides": (np.array([NAN]), np.array([NAN])),
    "NaN in the expected values": (np.array([1.0]), np.array([NAN])),
    "infinities of opposite sign": (np.array([-INF, 1.0]), np.array([INF, 1.0])),
    "infinity against a number": (np.array([INF, 1.0]), np.array([1.0, 1.0])),
    "all zero expected": (np.array([1e-5, 0]), np.array([0.0, 0])),
    "missing key": ({"y": np.ones(2)}, {"y": np.ones(2), "state": np.ones(2)}),
    "extra key": ({"y": np.ones(2), "state": np.ones(2)}, {"y": np.ones(2)}),
    "shorter list": ([np.ones(2)], [np.ones(2), np.ones(2)]),
    "array against list of arrays": (np.ones((2, 2)), [np.ones(2), np.ones(2)]),
    "an entry hidden by a larger one": ([np.full(2, 1e6), np.ones(2)], [np.full(2, 1e6), np.full(2, 1.01)]),
    "nothing to compare": ([], []),
    "large integers one apart": (np.array([2**60, 0]), np.array([2**60 + 1, 0])),
}  # fmt: skip


@pytest.mark.parametrize("case", DIFFERENT)
def test_differences_are_refused(case):
    actual, expected = DIFFERENT[case]
    tolerance = 0 if case.startswith("large integers") else 1e-6
    with pytest.raises(AssertionError, match="scan"):
        assert_matches(actual, expected, tolerance, "scan")


@pytest.mark.parametrize("shortcut", [accepts_closeness_of_allclose, accepts_equal_shapes])
def test_these_differences_slip_through_the_usual_shortcuts(shortcut):
    def refuses_all(assert_equal):
        for case in ("small values", "shape that broadcasts", "all zero expected", "integers against floats"):
            with pytest.raises(AssertionError):
                assert_equal(*DIFFERENT[case], 1e-6)

    refuses_all(assert_matches)
    with pytest.raises(pytest.fail.Exception):
        refuses_all(shortcut)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (torch.tensor([1.0, 2.0], dtype=torch.bfloat16), np.array([1.0, 2.0])),
        (torch.tensor([1.0], requires_grad=True), np.float64(1.0).reshape(1)),
        (np.array([1.0, 2.0]), [1, 2]),
        (np.array([1.0, 2.0]), [1.0, 2.0 + 1e-7]),
        (np.array([-INF, 3.0]), np.array([-INF, 3.0])),
        (torch.tensor([True, False]), np.array([True, False])),
        (torch.tensor([1 + 2j]).conj(), np.array([1 - 2j])),
        (np.zeros((2, 0)), torch.zeros(2, 0)),
        (np.zeros(3), np.zeros(3)),
        (3.0, torch.tensor(3.0)),
        ({"y": [torch.ones(2), (1.0, np.zeros(2))]}, {"y": [np.ones(2), (1.0, torch.zeros(2))]}),
    ],
)
def test_equal_values_are_accepted_whatever_holds_them(actual, expected):
    assert assert_matches(actual, expected, 1e-6) == "values: equal, error below 1e-06"


def test_error_is_relative_to_the_largest_expected_value():
    expected = np.array([0.0, 200.0])
    assert_matches(expected + [1.9e-4, 0], expected, 1e-6)
    with pytest.raises(AssertionError, match="1.05e-06"):
        assert_matches(expected + [2.1e-4, 0], expected, 1e-6)


def test_verdict_shows_the_tolerance_and_never_the_error():
    verdicts = {assert_matches([1.0 + error], [1.0], 1e-12, "scan") for error in (0.0, 2e-16, 5e-13)}
    assert verdicts == {"scan: equal, error below 1e-12"}
    assert assert_matches([1], [1], 0, "tokens") == "tokens: identical"


def test_failure_names_entry_error_first_and_worst_place():
    expected = {"y": np.ones((2, 3)), "state": np.ones((2, 3))}
    actual = {"y": np.ones((2, 3)), "state": np.array([[1, 1, 1.5], [1, 3.0, 1]])}
    with pytest.raises(AssertionError) as failure:
        assert_matches(actual, expected, 1e-12, "scan")
    assert str(failure.value).startswith(
        "scan['state']: error 2.00e+00 is above the tolerance 1e-12; "
        "first off at [0, 2]: 1.5, expected 1.0; worst at [1, 1]: 3.0, expected 1.0"
    )


@pytest.mark.parametrize("tolerance", [-1e-9, 1, 2.0, NAN])
def test_a_tolerance_that_cannot_reject_is_refused(tolerance):
    with pytest.raises(ValueError, match="tolerance"):
        assert_matches([1.0], [1.0], tolerance)


def check_square(square):
    assert_matches([square(x) for x in (-2.0, 3.0)], [4.0, 9.0], 0, "square")


def doubles(x):
    return 2 * x


def loses_the_sign_of(x):
    return x * abs(x)


def test_assert_rejects():
    check_square(lambda x: x * x)
    assert assert_rejects(check_square, doubles, loses_the_sign_of) == "rejected: doubles, loses_the_sign_of"
    with pytest.raises(AssertionError, match="accepts 0.0001"):
        assert_rejects(lambda x: assert_matches(x, 0.0, 1e-3), 1.0, 1e-4)
    assert assert_rejects(lambda x: assert_matches(x, [1.0], 0), np.zeros(1)) == "rejected: variant 0"
    with pytest.raises(ValueError, match="at least one"):
        assert_rejects(check_square)


def test_a_variant_that_crashes_was_not_judged():
    with pytest.raises(ZeroDivisionError):
        assert_rejects(check_square, lambda x: x / 0)


def open_exercise(x):
    raise NotImplementedError  # what an exercise without an answer does; attempt() must say so, not fail


def test_attempt(capsys):
    attempt("Square", open_exercise, check_square)
    attempt("Square", lambda x: x * x, check_square)
    assert capsys.readouterr().out == "Square: not attempted yet\nSquare: correct\n"
    assert_rejects(lambda answer: attempt("Square", answer, check_square), doubles)
    assert capsys.readouterr().out == ""


def test_a_wrong_answer_is_shown_without_a_traceback():
    with pytest.raises(WrongAnswer) as failure:
        attempt("Square", doubles, check_square)
    (shown,) = failure.value._render_traceback_()
    assert shown.startswith("Square: square: error") and failure.value.__cause__ is None
    with pytest.raises(ZeroDivisionError):
        attempt("Square", lambda x: x / 0, check_square)


def test_a_common_mistake_is_called_by_its_idea():
    def check(mean):
        found = mean([1.0, 2.0, 6.0])
        assert_matches(found, 3.0, 1e-12, "mean", {"divide by the number of values": 9.0, "this is the median": 2.0})

    def total(values):
        return sum(values)

    def middle(values):
        return values[1]

    def first(values):
        return values[0]

    check(lambda values: sum(values) / len(values))
    assert assert_explains(check, {total: "divide by the number", middle: "mean: this is the median"}) == (
        "total: divide by the number\nmiddle: mean: this is the median"
    )
    with pytest.raises(AssertionError, match="worst at"):
        check(first)
    with pytest.raises(AssertionError, match="middle is told 'mean: this is the median'"):
        assert_explains(check, {middle: "divide by"})
    for passes in (statistics.mean, open_exercise):
        with pytest.raises((AssertionError, NotImplementedError)):
            assert_explains(check, {passes: ""})


def test_docstring_example():
    failed, tried = doctest.testmod(testing)
    assert failed == 0 and tried > 0
