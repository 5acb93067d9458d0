"""The causal convolution as its definition: one tap after the other."""

import torch
from torch import Tensor


def conv(window: Tensor, weight: Tensor, bias: Tensor | None, documents: Tensor | None) -> Tensor:
    """y_t = bias + sum_j weight_j window_{t+j}.

    window (b, w-1+t, c): the carried inputs, then the new ones; weight (c, w); documents (b, w-1+t). Returns (b, t, c).
    """
    width = weight.shape[1]
    steps = window.shape[1] - (width - 1)
    y = torch.zeros_like(window[:, :steps])
    for tap in range(width):
        seen = window[:, tap : tap + steps]
        if documents is not None:
            seen = seen * (documents[:, tap : tap + steps] == documents[:, width - 1 :])[:, :, None]
        y = y + weight[:, tap] * seen
    return y if bias is None else y + bias
