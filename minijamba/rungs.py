"""Which rung of a component's ladder runs. A user never has to choose, and always can.

Every component exists as functions of one signature: "naive" (the definition), "parallel" (the algorithm) and, where
there is a kernel for this device, "fused" (the hardware).
"""

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_default = "auto"
_told: set[str] = set()
_TRITON = importlib.util.find_spec("triton") is not None


@contextmanager
def use_rung(rung: str) -> Iterator[None]:
    """Run everything inside the block on one rung; with "fused", what has no kernel runs on its fastest.

    >>> with use_rung("naive"):
    ...     logits = model(tokens)
    """
    global _default
    before, _default = _default, rung
    try:
        yield
    finally:
        _default = before


def why_no_kernels(device: torch.device) -> str | None:
    """What keeps Triton's kernels from running on tensors of this device, with the remedy; None when they run."""
    if not _TRITON:
        return "Triton is not installed: pip install triton, on Linux with an NVIDIA GPU"
    if device.type != "cuda" and not interpreted():
        return (
            f"kernels need tensors on a GPU and these are on {device}: move them there, or start Python with "
            f"TRITON_INTERPRET=1 to run kernels on a CPU, slowly"
        )
    return None


def kernels_in_force(device: torch.device) -> bool:
    """Whether "auto" means kernels on tensors of this device, here and now."""
    return why_no_kernels(device) is None and _default in ("auto", "fused")


def cudnn_takes(head_dim: int, itemsize: int) -> bool:
    """Whether cuDNN has attention for heads of so many numbers, each of so many bytes."""
    return itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128


def find_device(device: str | torch.device) -> torch.device:
    """The device of that name; "auto" is the GPU where CUDA finds one, otherwise the CPU. Raises: ValueError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f'device is {device!r}, but must be "auto", "cpu", "cuda" or "cuda:1"') from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {device}, but CUDA finds {torch.cuda.device_count()} GPUs here: use device='auto'")
    return device


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, operation by operation in numpy."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def ceil_div(size: int, block: int) -> int:
    """How many blocks cover a size: the grids of kernels. triton.cdiv does the same and takes microseconds."""
    return -(-size // block)


def operator(name: str, function: Callable, shapes: Callable) -> Callable:
    """The function of a kernel, to be called inside an autograd.Function; also the operator minijamba::name.

    torch.compile sees the operator, and from `shapes` what it returns. So does a second differentiation, which it
    refuses. Everything else calls the function itself: an operator costs some ten microseconds more.
    """
    declared = torch.library.custom_op(f"minijamba::{name}", function, mutates_args=())
    declared.register_fake(shapes)

    def run(*arguments):
        # Inside an autograd.Function, gradients are on for the backward pass under create_graph=True alone.
        seen = torch.compiler.is_compiling() or torch.is_grad_enabled()
        return (declared if seen else function)(*arguments)

    return run


def choose(component: str, rung: str, implementations: dict[str, Callable], device: torch.device) -> Callable:
    """The implementation to run, from a dictionary ordered slowest first.

    "auto" takes the block's rung (`use_rung`), or else the fastest, where a kernel counts only on a GPU; there it says
    once when no kernel runs, and why.
    Raises: ValueError if the named rung does not exist here.
    """
    if rung == "auto":
        rung = _default
        # A block asks for kernels wherever there are some.
        if rung == "fused" and rung not in implementations and why_no_kernels(device) is None:
            rung = "auto"
    if rung == "auto":
        rung = fastest(implementations, device)
        if device.type == "cuda" and rung != "fused" and component not in _told:
            _told.add(component)
            reason = why_no_kernels(device) or "it has none yet"
            warnings.warn(f"{component}: the {rung} rung runs instead of a fused kernel; {reason}", stacklevel=3)
    if rung not in implementations:
        reason = why_no_kernels(device) if rung == "fused" else None
        choices = f"choose 'auto' or one of {list(implementations)}"
        raise ValueError(f"{component} has no rung {rung!r} here; {f'{reason}; or ' if reason else ''}{choices}")
    return implementations[rung]


def fastest(implementations: dict[str, Callable], device: torch.device) -> str:
    """The rung that "auto" takes. In the interpreter a kernel is the slowest of all: it has to be asked for."""
    return [rung for rung in implementations if rung != "fused" or device.type == "cuda"][-1]
