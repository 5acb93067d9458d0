"""The causal convolution as its definition: one tap after the other."""

import torch
import torch.nn.functional as F
from torch import Tensor


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, documents: Tensor | None, activation: bool
) -> Tensor:
    """y of `causal_conv`. documents (b, w-1+t): which one each input belongs to, the carried ones first."""
    steps, width = x.shape[1], weight.shape[1]
    window = with_past(x, state, width - 1)
    y = torch.zeros_like(x)
    for tap in range(width):
        seen = window[:, tap : tap + steps]
        if documents is not None:
            seen = seen * (documents[:, tap : tap + steps] == documents[:, width - 1 :])[:, :, None]
        y = y + weight[:, tap] * seen
    y = y if bias is None else y + bias
    return F.silu(y) if activation else y


def with_past(x: Tensor, state: Tensor | None, past: int) -> Tensor:
    """The carried inputs, or zeros, and then the new ones: (b, w-1+t, c)."""
    return F.pad(x, (0, 0, past, 0)) if state is None else torch.cat([state.to(x.dtype), x], dim=1)


@torch.no_grad()
def step(
    window: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: bool, real: Tensor | None
) -> Tensor:
    """The function of `causal_conv_step`."""
    inputs = torch.cat([window, x[:, None].to(window.dtype)], dim=1)
    window.copy_(inputs[:, 1:] if real is None else torch.where(real[:, None, None], inputs[:, 1:], window))
    y = torch.einsum("b w c, c w -> b c", inputs, weight)
    y = y if bias is None else y + bias
    return F.silu(y) if activation else y
