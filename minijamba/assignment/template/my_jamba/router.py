"""Part 3: the feed-forward, and a mixture of them from which a router picks k for every token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def route(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k experts of every token, and the weight of each: softmax over all experts, then the k largest.

    The weights are not divided by their sum: they sum to less than one, and the rest is the router's doubt.

    Args: logits (..., e).
    Returns: weights (..., k), largest first, float32 at least; indices (..., k) int64, the experts that were chosen.
    Source: Jamba (arXiv 2403.19887), section 2, and its released code. Mixtral does divide.
    """
    # <solution>
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).topk(k, dim=-1)
    # </solution>


class FeedForward(nn.Module):
    """y = down_proj(silu(gate_proj(x)) * up_proj(x)):   x, y (..., d), and (..., f) inside."""

    def __init__(self, d: int, f: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d, f, bias=False)
        self.up_proj = nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # <solution>
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        # </solution>


class MixtureOfExperts(nn.Module):
    """y = sum over the k chosen experts i of  weight_i expert_i(x),   with weights from `route`(router(x), k).

    x, y: (b, t, d). No token is ever dropped, however many choose the same expert. A loop over the experts, each with
    the tokens that chose it, is fast enough.
    """

    def __init__(self, d: int, f: int, e: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.router = nn.Linear(d, e, bias=False)
        self.experts = nn.ModuleList(FeedForward(d, f) for _ in range(e))

    def forward(self, x: Tensor) -> Tensor:
        # <solution>
        tokens = x.flatten(0, 1)
        weights, indices = route(self.router(tokens), self.k)
        y = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            token, choice = torch.where(indices == i)
            y = y.index_add(0, token, weights[token, choice, None].to(x.dtype) * expert(tokens[token]))
        return y.view_as(x)
        # </solution>
