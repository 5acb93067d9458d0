"""Shared by all tests: one thread, repeatable property tests, and tiny models with a long memory."""

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

# Without a GPU, kernels run in Triton's interpreter, which has to be known before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import settings
from torch import nn

from minijamba import conformance
from minijamba.config import JambaConfig

# The tensors are tiny: a second thread would only wait for the first, and tests run side by side.
torch.set_num_threads(1)

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def hybrid() -> JambaConfig:
    """Four tiny layers, "mE A+ m+ AE": every kind of layer, and each mixer above and below the other."""
    return replace(conformance.CONFIG, intermediate_size=12, num_experts_per_tok=2)


@pytest.fixture
def poisoned_memory(monkeypatch) -> None:
    """New tensors of kernels are full of NaN, so that an output that is not wholly written shows."""
    new_empty = torch.Tensor.new_empty

    def poisoned(tensor, *shape, **options):
        new = new_empty(tensor, *shape, **options)
        return new.fill_(torch.nan) if new.is_floating_point() and "device" not in options else new

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.fixture(scope="session")
def long_memory() -> Callable[..., nn.Module]:
    """`long_memory(module, seed=0, delta_bias=-4.6)`: random weights that hide no bug; returns the module."""
    return conformance.long_memory
