"""Checks shared by the tests and the notebooks: equality within a tolerance, rejection of wrong variants, exercises.

An exercise is a function that the learner writes and a check that judges it. The check fails in terms of the idea: it
asserts properties, each with the sentence that a learner needs, and it knows the values of the common mistakes.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch


def assert_matches(actual, expected, tolerance: float, name: str = "values", mistakes: Mapping | None = None) -> str:
    """Assert that two values, or two equal structures of values, agree to a relative error.

        error = max |actual - expected| / max |expected|      (only max |actual - expected| where expected is all zero)

    Each array is judged against its own largest value. Infinities must stand in the same places; NaN never matches.

    Args:
        actual, expected: tensor, array, number, list of numbers, or a dict or sequence of these. Widths may differ
            (float32 against float64), kinds may not (bool, integer, float, complex). Plain Python numbers have no kind.
        tolerance: largest error allowed, no unit. 0 asks for identical values.
        name: what the verdict and the failure call the values; entries of a structure add their key: `scan['state']`.
        mistakes: idea -> the values that a common mistake gives. Where the values are these, the failure is the idea.
    Returns: the verdict, built from the tolerance and so the same on every machine: "scan: equal, error below 1e-12".
    Raises:  AssertionError naming the entry, its error, and the first and the worst place that are off; or the mistake.

    >>> assert_matches([1.0, 2.0], np.array([1.0, 2.0]), 1e-12, "pair")
    'pair: equal, error below 1e-12'
    >>> assert_matches(9.0, 3.0, 1e-12, "mean", {"divide by the number of values": 9.0})
    Traceback (most recent call last):
    AssertionError: mean: divide by the number of values
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance {tolerance} must lie in [0, 1): from 1 on, an answer of all zeros would pass")
    try:
        _assert_entries_match(actual, expected, tolerance, name)
    except AssertionError:
        for idea, mistaken in (mistakes or {}).items():
            if _agree(actual, mistaken, tolerance):
                raise AssertionError(f"{name}: {idea}") from None
        raise
    return f"{name}: identical" if tolerance == 0 else f"{name}: equal, error below {tolerance:g}"


def assert_rejects(check: Callable, *wrong) -> str:
    """Assert that `check(variant)` fails with AssertionError for each wrong variant: only then does it prove anything.

    Any other exception goes through: a variant that crashes has not been judged.

    Returns: "rejected: " and the variants (functions by name). Raises: AssertionError naming the variant that passed.
    """
    if not wrong:
        raise ValueError("assert_rejects needs at least one wrong variant after the check")
    names = [
        str(variant) if isinstance(variant, int | float | str) else getattr(variant, "__name__", f"variant {index}")
        for index, variant in enumerate(wrong)
    ]
    for variant, name in zip(wrong, names, strict=True):
        try:
            check(variant)
        except AssertionError:
            continue
        raise AssertionError(f"the check accepts {name}, which is wrong")
    return f"rejected: {', '.join(names)}"


def assert_explains(check: Callable, wrong: Mapping[Callable, str]) -> str:
    """Assert that `check` refuses each wrong answer, and in the words that are given for it.

    wrong: answer -> words that the failure must contain.
    Returns: a line for each answer, "its_name: the words".
    Raises:  AssertionError naming the answer that passed, or that was refused in other words.
    """
    for answer, words in wrong.items():
        assert_rejects(check, answer)
        said = verdict(answer, check)
        assert words in said, f"{answer.__name__} is told {said!r}, which does not contain {words!r}"
    return "\n".join(f"{answer.__name__}: {words}" for answer, words in wrong.items())


def verdict(answer: Callable, check: Callable) -> str:
    """What an exercise is told: "correct", "not attempted yet", or what is wrong. Errors of the answer go through."""
    try:
        check(answer)
    except NotImplementedError:
        return "not attempted yet"
    except AssertionError as error:
        return str(error) or "wrong"
    return "correct"


class WrongAnswer(AssertionError):
    """An exercise was answered wrongly. A notebook shows the message alone, not its way through the check."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def attempt(name: str, answer: Callable, check: Callable) -> None:
    """Judge an exercise: print "correct", or "not attempted yet" on NotImplementedError.

    Raises: WrongAnswer, which says what is wrong. Errors of the answer itself go through, with their traceback.
    """
    said = verdict(answer, check)
    if said not in ("correct", "not attempted yet"):
        raise WrongAnswer(f"{name}: {said}")
    print(f"{name}: {said}")


def _assert_entries_match(actual, expected, tolerance, name):
    if not _is_structure(actual) and not _is_structure(expected):
        return _assert_array_matches(actual, expected, tolerance, name)
    actual, expected = _entries(actual, name), _entries(expected, name)
    assert actual.keys() == expected.keys(), f"{name}: has entries {list(actual)}, expected {list(expected)}"
    assert expected, f"{name}: nothing to compare"
    for key, value in expected.items():
        _assert_entries_match(actual[key], value, tolerance, f"{name}[{key!r}]")


def _agree(actual, expected, tolerance) -> bool:
    try:
        _assert_entries_match(actual, expected, tolerance, "")
    except AssertionError:
        return False
    return True


def _is_structure(value) -> bool:
    """A dict, or a sequence that holds more than plain numbers; [1.0, 2.0] is an array."""
    if isinstance(value, list | tuple):
        return not value or any(isinstance(x, torch.Tensor | np.ndarray) or _is_structure(x) for x in value)
    return isinstance(value, Mapping)


def _entries(value, name) -> dict:
    holds_entries = isinstance(value, Mapping | list | tuple)
    assert holds_entries, f"{name}: entries on one side only, the other is {type(value).__name__}"
    return dict(value) if isinstance(value, Mapping) else dict(enumerate(value))


def _assert_array_matches(actual, expected, tolerance, name):
    (actual, kind), (expected, expected_kind) = _array(actual), _array(expected)
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    same_kind = None in (kind, expected_kind) or kind == expected_kind
    assert same_kind, f"{name}: holds {kind} values, expected {expected_kind}"
    for side, values in ("actual", actual), ("expected", expected):
        assert not np.isnan(values).any(), f"{name}: {side} is NaN at {_index(np.isnan(values))}"

    with np.errstate(invalid="ignore"):  # inf - inf, replaced by 0 where both are the same infinity
        difference = np.where(actual == expected, 0.0, np.abs(actual - expected))
    scale = np.abs(expected[np.isfinite(expected)]).max(initial=0.0) or 1.0
    error = difference / scale
    if error.max(initial=0.0) > tolerance:
        first, worst = _index(error > tolerance), _index(error == error.max())
        places = "; ".join(
            f"{label} at {list(index)}: {actual[index]!s}, expected {expected[index]!s}"
            for label, index in (("first off", first), ("worst", worst))
        )
        raise AssertionError(f"{name}: error {error.max():.2e} is above the tolerance {tolerance:g}; {places}")


def _array(value) -> tuple[np.ndarray, str | None]:
    """The value in the widest type of its kind, and the kind's name (None for plain Python numbers)."""
    has_kind = isinstance(value, torch.Tensor | np.ndarray | np.generic)
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value).resolve_conj().numpy()  # NumPy has no bfloat16
    array = np.asarray(value)
    kind, widest = {
        "b": ("bool", np.int64), "i": ("integer", np.int64), "u": ("integer", np.int64),
        "f": ("float", np.float64), "c": ("complex", np.complex128),
    }[array.dtype.kind]  # fmt: skip
    return array.astype(widest), kind if has_kind else None


def _index(where: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(np.argmax(where), where.shape))
