"""The mixture of experts as its definition: one token, one chosen expert after the other."""

import torch
import torch.nn.functional as F
from torch import Tensor


def mixture(x: Tensor, weights: Tensor, indices: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    rows = []
    for token, token_weights, token_experts in zip(x, weights, indices.tolist(), strict=True):
        y = torch.zeros_like(token)
        for weight, i in zip(token_weights, token_experts, strict=True):
            y = y + weight * (down[i] @ (F.silu(gate[i] @ token) * (up[i] @ token)))
        rows.append(y)
    return torch.stack(rows)
