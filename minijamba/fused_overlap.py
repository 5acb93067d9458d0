"""Kernels that start before the one ahead of them has ended: programmatic dependent launch, on Hopper and newer.

A token takes some three hundred kernels, each of a few microseconds: starting one while the last programs of the one
before still run hides what a start costs. A kernel that is launched so must wait (`gdc_wait`) before it reads what
others wrote or writes what others read, and may let the next one start (`gdc_launch_dependents`) at any time.
"""

from functools import cache

import torch

from .rungs import interpreted

if interpreted():
    gdc_launch_dependents = gdc_wait = None
else:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["gdc_launch_dependents", "gdc_wait", "overlap"]


@cache
def overlap(device: torch.device) -> dict[str, bool]:
    """Arguments of a kernel's launch: its constant EARLY, and the launch's own where EARLY is true."""
    if interpreted() or torch.cuda.get_device_capability(device)[0] < 9:
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}
