"""What the tests share: random numbers that hide no mistake, and a fair way to give your modules their weights.

The references are minijamba's definitions, in float64. Steps of softplus(-4.6) = 0.01 make the memory a hundred tokens
long, so that a lost state shows; the axes of a tensor differ in size, so that two cannot be taken for each other.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from minijamba import JambaConfig
from minijamba.packed_files import shares

CHECKPOINT = Path(__file__).parents[1] / "checkpoint"
EXACT = 1e-10  # float64, sums of some dozens of terms in another order

# Layers "mE A+ m+ AE": each mixer with each feed-forward.
CONFIG = JambaConfig(
    vocab_size=41, hidden_size=24, intermediate_size=10, num_hidden_layers=4, num_attention_heads=6,
    num_key_value_heads=3, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=3, expert_layer_offset=0,
    num_experts=5, mamba_d_state=3, mamba_dt_rank=7, max_position_embeddings=64, dtype="float32",
)  # fmt: skip


def points(n: int) -> Callable:
    """What a test is worth."""

    def worth(test: Callable) -> Callable:
        test.points = n
        return test

    return worth


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def filled(reference: nn.Module) -> nn.Module:
    """The reference in float64 with random weights: outputs of size one, long memory, every norm and bias in play."""
    for seed, (name, parameter) in enumerate(reference.double().named_parameters()):
        noise = draw(*parameter.shape, seed=seed)
        if name.endswith("A_log"):
            parameter.add_(0.1 * noise)
        elif "norm" in name or name.endswith("D"):
            parameter.copy_(1 + 0.2 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.3 * noise - 4.6 * ("dt_proj" in name))
        else:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return reference


def released(reference: nn.Module) -> dict[str, Tensor]:
    """Its weights under the released names, in which the experts of a layer are not stacked."""
    found = {}
    for name, parameter in reference.named_parameters():
        found |= shares(name, parameter.detach())
    return found


def given(module: nn.Module, reference: nn.Module) -> nn.Module:
    """Your module with the reference's weights, in float64."""
    wanted, yours = released(reference), module.state_dict()
    missing, more = sorted(wanted.keys() - yours.keys()), sorted(yours.keys() - wanted.keys())
    assert not missing and not more, f"your parameters need the released names: missing {missing}, unknown {more}"
    module.double().load_state_dict(wanted)
    return module


def in_pieces(call, x: Tensor, lengths: list[int]) -> Tensor:
    """Outputs of call(piece, cache) -> (y, cache) for pieces along time, put together."""
    cache, found = None, []
    for piece in x.split(lengths, dim=1):
        y, cache = call(piece, cache)
        found.append(y)
    return torch.cat(found, dim=1)
