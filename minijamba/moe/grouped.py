"""The mixture of experts grouped: sort the choices by expert, then one matrix product for each expert."""

import torch
import torch.nn.functional as F
from torch import Tensor


def mixture(x: Tensor, weights: Tensor, indices: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    tokens, k = indices.shape
    order = indices.flatten().argsort(stable=True)
    counts = indices.flatten().bincount(minlength=gate.shape[0]).tolist()
    groups = x[order // k].split(counts)
    outputs = [_feed_forward(rows, gate[i], up[i], down[i]) for i, rows in enumerate(groups) if len(rows)]
    by_choice = torch.cat(outputs)[order.argsort()].view(tokens, k, -1)
    return (weights[:, :, None] * by_choice).sum(1)


def _feed_forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
