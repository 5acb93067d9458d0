"""Routing of few tokens as two Triton kernels: the router with its choice, and the choices sorted by expert."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fused_linear import wide
from ..fused_overlap import gdc_launch_dependents, gdc_wait, overlap

COLUMNS = 4096  # inputs of the router that a program reads at a time


def route(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, routing: str, renormalise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The router's logits (tokens, e) of x (tokens, d), and what `router.route` makes of them: weights, indices.

    weight (e, d), bias (e,). Logits and weights have the dtype of x. Not Sinkhorn's choice of training.
    """
    tokens, inputs = x.shape
    experts = len(weight)
    logits, weights = x.new_empty(tokens, experts), x.new_empty(tokens, k)
    indices = torch.empty(tokens, k, dtype=torch.int64, device=x.device)
    _route[tokens,](
        x.contiguous(), weight, bias, logits, weights, indices, IN=inputs, EXPERTS=experts,
        PADDED=triton.next_power_of_2(experts), K=k, SOFTMAX=routing == "softmax", RENORMALISE=renormalise,
        COLUMNS=min(COLUMNS, triton.next_power_of_2(inputs)), WIDE=wide(x), num_warps=16, **overlap(x.device),
    )  # fmt: skip
    return logits, weights, indices


def sort(indices: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The function of `fused._sort`, for at most SORTED choices."""
    order = torch.empty(indices.numel(), dtype=torch.int64, device=indices.device)
    place, ends = torch.empty_like(indices), torch.empty(experts, dtype=torch.int32, device=indices.device)
    _sort[1,](
        indices, order, place, ends, indices.numel(), EXPERTS=experts, PADDED=triton.next_power_of_2(experts),
        CHOICES=triton.next_power_of_2(indices.numel()), num_warps=4, **overlap(indices.device),
    )  # fmt: skip
    return order, place, ends


@triton.jit
def _route(
    x, weight, bias, logits, weights, indices, IN: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr,
    K: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALISE: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One token: its logits, and K times the largest that is left."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    token, e, i = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED), tl.arange(0, COLUMNS)
    total = tl.zeros([PADDED, COLUMNS], WIDE)
    for first in range(0, IN, COLUMNS):
        here = first + i
        row = tl.load(x + token * IN + here, mask=here < IN, other=0).to(WIDE)
        real = (e < EXPERTS)[:, None] & (here < IN)[None, :]
        total += tl.load(weight + e[:, None] * IN + here[None, :], mask=real, other=0).to(WIDE) * row[None, :]
    logit = tl.sum(total, 1)
    if bias is not None:
        logit += tl.load(bias + e, mask=e < EXPERTS, other=0).to(WIDE)
    logit = logit.to(logits.dtype.element_ty)
    tl.store(logits + token * EXPERTS + e, logit, mask=e < EXPERTS)
    logit = tl.where(e < EXPERTS, logit.to(WIDE), -float("inf"))
    if SOFTMAX:
        score = tl.exp(logit - tl.max(logit, 0))
        score = score / tl.sum(score, 0)
    else:
        score = 1 / (1 + tl.exp(-logit))
    score = tl.where(e < EXPERTS, score, -1)
    chosen, left = tl.zeros([PADDED], tl.int32), score
    for j in tl.static_range(K):
        best = tl.minimum(tl.argmax(left, 0, tie_break_left=True), EXPERTS - 1)  # also where all are NaN
        tl.store(indices + token * K + j, best.to(tl.int64))
        chosen = tl.where(e == best, 1 + j, chosen)
        left = tl.where(e == best, -2, left)
    total = tl.sum(tl.where(chosen > 0, score, 0), 0) if RENORMALISE else 1
    tl.store(weights + token * K + chosen - 1, score / total, mask=chosen > 0)


@triton.jit(do_not_specialize=["choices"])
def _sort(
    indices, order, place, ends, choices,
    EXPERTS: tl.constexpr, PADDED: tl.constexpr, CHOICES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A choice's place: how many have an expert before its own, and how many of its own stand before it."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    n, e = tl.arange(0, CHOICES), tl.arange(0, PADDED)
    expert = tl.load(indices + n, mask=n < choices, other=EXPERTS)
    # The same again along the other axis: a choice is compared with each.
    other = tl.load(indices + n, mask=n < choices, other=EXPERTS)
    before = (other[None, :] < expert[:, None]) | ((other[None, :] == expert[:, None]) & (n[None, :] < n[:, None]))
    rank = tl.sum(before.to(tl.int32), 1)
    tl.store(place + n, rank.to(tl.int64), mask=n < choices)
    tl.store(order + rank, n.to(tl.int64), mask=n < choices)
    tl.store(ends + e, tl.sum((other[None, :] <= e[:, None]).to(tl.int32), 1), mask=e < EXPERTS)
