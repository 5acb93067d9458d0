from collections.abc import Callable

import pytest
import torch
from torch import nn


@pytest.fixture(scope="session")
def randomise(long_memory) -> Callable[[nn.Module], nn.Module]:
    """`randomise(model, seed=9)`: `long_memory`, and B and C large enough for the state to say as much as the skip D x.

    With that seed no router of these tests comes near a tie.
    """

    @torch.no_grad()
    def randomise(model: nn.Module, seed: int = 9) -> nn.Module:
        for name, parameter in long_memory(model, seed=seed).named_parameters():
            if name.lower().endswith(("b_layernorm.weight", "c_layernorm.weight")):
                parameter.mul_(2)
        return model.eval()

    return randomise
