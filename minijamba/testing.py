"""Checks shared by the tests and the notebooks: equality within a tolerance, rejection of wrong variants, exercises."""

from collections.abc import Callable, Mapping

import numpy as np
import torch


def assert_matches(actual, expected, tolerance: float, name: str = "values") -> str:
    """Assert that two values, or two equal structures of values, agree to a relative error.

        error = max |actual - expected| / max |expected|      (only max |actual - expected| where expected is all zero)

    Each array is judged against its own largest value. Infinities must stand in the same places; NaN never matches.

    Args:
        actual, expected: tensor, array, number, list of numbers, or a dict or sequence of these. Widths may differ
            (float32 against float64), kinds may not (bool, integer, float, complex). Plain Python numbers have no kind.
        tolerance: largest error allowed, no unit. 0 asks for identical values.
        name: what the verdict and the failure call the values; entries of a structure add their key: `scan['state']`.
    Returns: the verdict, built from the tolerance and so the same on every machine: "scan: equal, error below 1e-12".
    Raises:  AssertionError naming the entry, its error, and the first and the worst place that are off.

    >>> assert_matches([1.0, 2.0], np.array([1.0, 2.0]), 1e-12, "pair")
    'pair: equal, error below 1e-12'
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance {tolerance} must lie in [0, 1): from 1 on, an answer of all zeros would pass")
    _assert_entries_match(actual, expected, tolerance, name)
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


def attempt(name: str, fn: Callable, check: Callable) -> None:
    """Judge an exercise: print "correct", or "not attempted yet" on NotImplementedError; a wrong answer raises."""
    try:
        check(fn)
    except NotImplementedError:
        print(f"{name}: not attempted yet")
    else:
        print(f"{name}: correct")


def _assert_entries_match(actual, expected, tolerance, name):
    if not _is_structure(actual) and not _is_structure(expected):
        return _assert_array_matches(actual, expected, tolerance, name)
    actual, expected = _entries(actual, name), _entries(expected, name)
    assert actual.keys() == expected.keys(), f"{name}: has entries {list(actual)}, expected {list(expected)}"
    assert expected, f"{name}: nothing to compare"
    for key, value in expected.items():
        _assert_entries_match(actual[key], value, tolerance, f"{name}[{key!r}]")


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
