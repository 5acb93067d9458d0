"""Which rung of a component's ladder runs. A user never has to choose, and always can.

Every component exists as functions of one signature: "naive" (the definition), "parallel" (the algorithm) and, where
there is a kernel for this device, "fused" (the hardware).
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_default: ContextVar[str] = ContextVar("rung", default="auto")
_told: set[str] = set()


@contextmanager
def use_rung(rung: str) -> Iterator[None]:
    """Run everything inside the block on one rung.

    >>> with use_rung("naive"):
    ...     logits = model(tokens)
    """
    token = _default.set(rung)
    try:
        yield
    finally:
        _default.reset(token)


def choose(component: str, rung: str, implementations: dict[str, Callable], device: torch.device) -> Callable:
    """The implementation to run, from a dictionary ordered slowest first.

    "auto" takes the block's rung (`use_rung`), or else the fastest; on a GPU it says once when that is not a kernel.
    Raises: ValueError if the named rung does not exist here.
    """
    if rung == "auto":
        rung = _default.get()
    if rung == "auto":
        rung = list(implementations)[-1]
        if device.type == "cuda" and rung != "fused" and component not in _told:
            _told.add(component)
            warnings.warn(f"{component}: no fused kernel is available here, the {rung} rung runs", stacklevel=3)
    if rung not in implementations:
        raise ValueError(f"{component} has no rung {rung!r} here; choose 'auto' or one of {list(implementations)}")
    return implementations[rung]
