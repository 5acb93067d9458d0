"""Cross-entropy of the next token."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import IGNORED
from .rungs import choose, why_no_kernels


def cross_entropy(logits: Tensor, targets: Tensor, *, rung: str = "auto") -> Tensor:
    """Mean of -ln p(target) over the judged targets, nats; NaN where there are none.

    Args:
        logits:  (n, v). Half precision is raised to float32: the loss is a small difference of large numbers.
        targets: (n,) int64, 0 .. v-1, or `IGNORED` = not judged.
    Returns: a scalar, float32 or float64 if the logits are.
    """
    return choose("loss", rung, rungs(logits.device), logits.device)(logits, targets, IGNORED)


def rungs(device: torch.device) -> dict[str, Callable]:
    """The implementations that run on tensors of this device, slowest first."""
    implementations = {"naive": _plain, "parallel": _plain}
    if why_no_kernels(device) is None:
        from . import fused_loss

        implementations["fused"] = fused_loss.cross_entropy
    return implementations


def _plain(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, ignore_index=ignored)
