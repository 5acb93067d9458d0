"""The causal convolution as one `conv1d`; with packed documents, as one product over windows."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .naive import with_past


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, documents: Tensor | None, activation: bool
) -> Tensor:
    """The function of `naive.conv`, same arguments."""
    window = with_past(x, state, weight.shape[1] - 1)
    if documents is None:
        y = F.conv1d(rearrange(window, "b t c -> b c t"), weight[:, None], bias, groups=weight.shape[0])
        y = rearrange(y, "b c t -> b t c")
    else:
        y = _packed(window, weight, bias, documents)
    return F.silu(y) if activation else y


def _packed(window: Tensor, weight: Tensor, bias: Tensor | None, documents: Tensor) -> Tensor:
    width = weight.shape[1]
    near = documents.unfold(1, width, 1)
    same = (near == near[:, :, -1:]).to(window.dtype)
    y = torch.einsum("b t c w, c w, b t w -> b t c", window.unfold(1, width, 1), weight, same)
    return y if bias is None else y + bias
