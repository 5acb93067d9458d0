"""The mixture of experts grouped: sort the choices by expert, then one matrix product for each expert."""

import torch
import torch.nn.functional as F
from torch import Tensor


def mixture(
    x: Tensor, weights: Tensor, indices: Tensor, gate: Tensor, up: Tensor, down: Tensor,
    act: str = "silu", biases: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """As the definition in `minijamba.moe.naive`, with one product for all the tokens of an expert."""
    tokens, k = indices.shape
    order = indices.flatten().argsort(stable=True)
    counts = indices.flatten().bincount(minlength=gate.shape[0]).tolist()
    groups = x[order // k].split(counts)
    experts = zip(groups, gate, up, down, *(biases or [[None] * len(gate)] * 3), strict=True)
    outputs = [_feed_forward(*expert, getattr(F, act)) for expert in experts if len(expert[0])]
    by_choice = torch.cat(outputs)[order.argsort()].view(tokens, k, -1)
    return (weights[:, :, None] * by_choice).sum(1)


def _feed_forward(x, gate, up, down, gate_bias, up_bias, down_bias, activate) -> Tensor:
    return F.linear(activate(F.linear(x, gate, gate_bias)) * F.linear(x, up, up_bias), down, down_bias)
