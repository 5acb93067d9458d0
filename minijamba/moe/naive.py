"""The mixture of experts as its definition: one token, one chosen expert after the other."""

import torch
import torch.nn.functional as F
from torch import Tensor


def mixture(
    x: Tensor, weights: Tensor, indices: Tensor, gate: Tensor, up: Tensor, down: Tensor,
    act: str = "silu", biases: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """y (t, d): for each token the sum over its k experts i of weight_i down_i(act(gate_i x) * (up_i x))."""
    activate = getattr(F, act)
    gate_bias, up_bias, down_bias = biases or [x.new_zeros(stack.shape[:2]) for stack in (gate, up, down)]
    rows = []
    for token, token_weights, token_experts in zip(x, weights, indices.tolist(), strict=True):
        y = torch.zeros_like(token)
        for weight, i in zip(token_weights, token_experts, strict=True):
            inner = activate(gate[i] @ token + gate_bias[i]) * (up[i] @ token + up_bias[i])
            y = y + weight * (down[i] @ inner + down_bias[i])
        rows.append(y)
    return torch.stack(rows)
