"""Grouped-query attention, without positions as in Jamba or with rotary ones as in Transformers."""

from collections.abc import Callable
from functools import cache as remembered
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from .cache import KeyValues, Layout
from .config import JambaConfig
from .rungs import choose, cudnn_takes, why_no_kernels


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, *, rung: str = "auto") -> Tensor:
    """Softmax attention; h / g query heads share one head of keys and values.

        y_t = sum_s softmax_s(q_t . k_s / sqrt(p)) v_s,   over the visible s

    Args:
        q:       (b, t, h, p)
        k, v:    (b, s, g, p), h a multiple of g. The queries are the last t of the s tokens.
        visible: (b or 1, t, s) bool; causal when None. Every token must see at least one.
    Returns: y (b, t, h, p).
    Source:  Vaswani et al., 2017; Ainslie et al., 2023, for the groups; Jamba, section 6.5, for no positions.
    """
    return choose("attention", rung, rungs(q.device), q.device)(q, k, v, visible)


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary positions: number i and number i + p/2 of a head are turned together, by an angle that grows with time.

        angle = position theta^(-2i/p),   i = 0 .. p/2 - 1

    The product of a query and a key, both turned, depends on how far apart they are, and no longer on where.

    x: (b, t, h, p), positions: (b, t) or (t,) -> (b, t, h, p). Angles are float32 at least.
    Source: Su et al., 2021, in the order of halves that the released Llama, Mistral and Mixtral have.
    """
    wide, half = torch.promote_types(x.dtype, torch.float32), x.shape[-1] // 2
    angles = positions[..., None, None] * _rates(theta, half, wide, x.device)
    first, second = x.to(wide).split(half, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def _rates(theta: float, half: int, wide: torch.dtype, device: torch.device) -> Tensor:
    """(p / 2,) how far each pair of numbers is turned from one position to the next."""
    return 1 / theta ** (torch.arange(half, device=device, dtype=wide) / half)


def _naive(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = (heads.to(wide) for heads in (q, k, v))
    k, v = (repeat(heads, "b s g p -> b s (g n) p", n=q.shape[2] // k.shape[2]) for heads in (k, v))
    scores = torch.einsum("b t h p, b s h p -> b h t s", q, k) / q.shape[-1] ** 0.5
    seen = _causal(q, k) if visible is None else visible[:, None]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("b h t s, b s h p -> b t h p", weights, v).to(dtype)


def _parallel(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    from_start = visible is None and q.shape[1] == k.shape[1]
    mask = None if visible is None else visible[:, None]
    if visible is None and 1 < q.shape[1] < k.shape[1]:
        mask = _causal(q, k)
    if mask is not None and q.device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        # Of the kernels that take a mask, the one that adds in a fixed order knows no groups.
        k, v = (repeat(heads, "b s g p -> b s (g n) p", n=q.shape[2] // k.shape[2]) for heads in (k, v))
    q, k, v = (rearrange(heads, "b t h p -> b h t p") for heads in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=from_start, enable_gqa=True)
    return rearrange(y, "b h t p -> b t h p")


def _causal(q: Tensor, k: Tensor) -> Tensor:
    """(t, s) bool, True where query t may look at key s; the last query sees all keys."""
    steps, keys = q.shape[1], k.shape[1]
    return torch.ones(steps, keys, dtype=torch.bool, device=q.device).tril(keys - steps)


def _flash(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Without a mask where the queries are the last of many tokens: what came before them is seen in full.

    The softmax over all keys is that of the past and that of the call's own, weighted by their sums of exponentials.
    """
    steps, keys = q.shape[1], k.shape[1]
    if visible is not None or not 1 < steps < keys or torch.is_grad_enabled() or not _has_pieces(q):
        return _parallel(q, k, v, visible)
    q, k, v = (rearrange(heads, "b t h p -> b h t p") for heads in (q, k, v))
    y, weight = _piece(q, k[:, :, -steps:], v[:, :, -steps:], causal=True)
    y = y.float()
    for begin, end in _pieces(keys - steps):
        past, more = _piece(q, k[:, :, begin:end], v[:, :, begin:end], causal=False)
        y += (past.float() - y) * torch.sigmoid(more - weight)
        weight = torch.logaddexp(weight, more)
    return rearrange(y.to(q.dtype), "b h t p -> b t h p")


def _has_pieces(q: Tensor) -> bool:
    """Whether cuDNN computes a piece: in half precision, for usual widths of a head, on Ampere GPUs and newer."""
    usual = cudnn_takes(q.shape[-1], q.dtype.itemsize)
    return usual and torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(q.device)[0] >= 8


def _pieces(keys: int) -> list[tuple[int, int]]:
    """Cuts into powers of two, longest first: cuDNN prepares itself for every length that it meets."""
    ends = [0]
    while keys > ends[-1]:
        ends.append(ends[-1] + (1 << (keys - ends[-1]).bit_length() - 1))
    return list(pairwise(ends))


def _piece(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention (b, h, t, p) and the logarithm of each query's sum of exponentials (b, h, t, 1)."""
    run = torch.ops.aten._scaled_dot_product_cudnn_attention
    y, weight, *_ = run(q, k, v, None, True, 0.0, causal, False)
    return y, weight.view(*q.shape[:-1], 1)


def rungs(device: torch.device) -> dict[str, Callable]:
    """The implementations that run on tensors of this device, slowest first."""
    implementations = {"naive": _naive, "parallel": _parallel}
    # On a GPU, scaled_dot_product_attention is itself a flash kernel: one call serves both upper rungs.
    return implementations | {"fused": _flash} if device.type == "cuda" else implementations


class Attention(nn.Module):
    """The attention mixer: x (b, t, d) -> (b, t, d)."""

    def __init__(self, config: JambaConfig) -> None:
        super().__init__()
        width, queries = config.hidden_size, config.num_attention_heads * config.head_dim
        groups = config.num_key_value_heads * config.head_dim
        self.head_dim, self.theta, self.sliding_window = config.head_dim, config.rope_theta, config.sliding_window
        self.q_proj = nn.Linear(width, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(width, groups, bias=config.attention_bias)
        self.v_proj = nn.Linear(width, groups, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, width, bias=config.attention_bias)

    def heads(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (b, t, h, p), keys and values (b, t, g, p); the first two turned where there are positions."""
        q, k, v = (
            rearrange(project(x), "b t (h p) -> b t h p", p=self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.theta is not None:
            places = layout.places
            if places is None:
                places = layout.past + torch.arange(x.shape[1], device=x.device)
            q, k = rotate(q, places, self.theta), rotate(k, places, self.theta)
        return q, k, v

    def forward(self, x: Tensor, layout: Layout, cache: KeyValues | None = None) -> Tensor:
        if layout.ends is not None:
            attend = choose("attention", "auto", _next_rungs(x.device), x.device)
            return self.o_proj(attend(self, x, layout, cache))
        q, k, v = self.heads(x, layout)
        if cache is not None:
            k, v = cache.extend(k, v, layout)
        return self.o_proj(rearrange(attention(q, k, v, layout.visible), "b t h p -> b t (h p)"))


def _next_rungs(device: torch.device) -> dict[str, Callable]:
    """One token of each row in a cache of fixed size: (attention, x (b, 1, d), layout, cache) -> y (b, 1, h p)."""
    implementations = {"naive": _next, "parallel": _next}
    fused = _next if torch.is_grad_enabled() else _fused_next  # the kernel has no gradient
    return implementations if why_no_kernels(device) else implementations | {"fused": fused}


def _next(own: Attention, x: Tensor, layout: Layout, cache: KeyValues) -> Tensor:
    q, k, v = own.heads(x, layout)
    k, v = cache.extend(k, v, layout)
    slots = torch.arange(k.shape[1], device=x.device)
    visible = slots < layout.ends[:, None, None]
    if own.sliding_window is not None:
        visible = visible & (slots >= layout.ends[:, None, None] - own.sliding_window)
    return rearrange(attention(q, k, v, visible), "b t h p -> b t (h p)")


def _fused_next(own: Attention, x: Tensor, layout: Layout, cache: KeyValues) -> Tensor:
    from .fused_attention import attend, place

    q, k, v = (
        rearrange(project(x), "b 1 (h p) -> b h p", p=own.head_dim) for project in (own.q_proj, own.k_proj, own.v_proj)
    )
    rates = None
    if own.theta is not None:
        rates = _kept_rates(own.theta, own.head_dim // 2, torch.promote_types(x.dtype, torch.float32), x.device)
    slots = tuple(vars(cache).values())
    q = place(q, k, v, *slots, positions=layout.positions[:, 0], rates=rates)
    return rearrange(attend(q, *slots, ends=layout.ends, window=own.sliding_window), "b h p -> b 1 (h p)")


_kept_rates = remembered(_rates)
