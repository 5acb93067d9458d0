"""Part 4: attention with grouped queries and without positions, and its cache of keys and values."""

import torch
from einops import rearrange, repeat
from torch import Tensor, nn


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention; h / g query heads share one head of keys and values.

        y_t = sum_s softmax_s(q_t . k_s / sqrt(p)) v_s,   over the s that are not after t

    Query heads 0 .. h/g - 1 share key head 0, the next h/g share key head 1, and so on.

    Args:
        q:    (b, t, h, p)
        k, v: (b, s, g, p), h a multiple of g, s >= t. The queries are the last t of the s tokens.
    Returns: y (b, t, h, p).
    Source:  Vaswani et al., 2017; Ainslie et al., 2023, for the groups.
    """
    # <solution>
    k, v = (repeat(heads, "b s g p -> b s (g n) p", n=q.shape[2] // k.shape[2]) for heads in (k, v))
    scores = torch.einsum("b t h p, b s h p -> b h t s", q, k) / q.shape[-1] ** 0.5
    t, s = scores.shape[-2:]
    visible = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("b h t s, b s h p -> b t h p", weights, v)
    # </solution>


class AttentionMixer(nn.Module):
    """The attention mixer: x (b, t, d) -> y (b, t, d). No positions: Jamba leaves the order to its Mamba layers.

    The cache is the pair of keys and values (b, s, g, p) of all tokens so far; None before the first.
    Returns: y and the new cache. The old one must not be changed.
    Source: Jamba, section 6.5.
    """

    def __init__(self, d: int, h: int, g: int) -> None:
        super().__init__()
        self.p = d // h
        self.q_proj = nn.Linear(d, h * self.p, bias=False)
        self.k_proj = nn.Linear(d, g * self.p, bias=False)
        self.v_proj = nn.Linear(d, g * self.p, bias=False)
        self.o_proj = nn.Linear(h * self.p, d, bias=False)

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        # <solution>
        q, k, v = (
            rearrange(project(x), "b t (h p) -> b t h p", p=self.p)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            k, v = (torch.cat([past, new], dim=1) for past, new in zip(cache, (k, v), strict=True))
        return self.o_proj(rearrange(attention(q, k, v), "b t h p -> b t (h p)")), (k, v)
        # </solution>
