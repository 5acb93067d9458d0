"""Which experts a token goes to, what each counts for, and what keeps them evenly used: a loss, or Sinkhorn's plan."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import ROUTINGS

SHARPNESS = 2.0  # of the logits, before Sinkhorn balances them
SWEEPS = 2


class Routing(NamedTuple):
    """How a layer routed its tokens."""

    logits: Tensor  # (b, t, e)
    indices: Tensor  # (b, t, k) int64, the experts that were chosen


def route(
    logits: Tensor, k: int, routing: str = "softmax", *,
    renormalise: bool = False, training: bool = False, real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The k experts of every token, and the weight of each.

    "softmax", as Jamba: softmax over all experts, then the k largest. The weights are not renormalised: they sum to
    less than one, and the rest is the router's doubt. Mixtral divides by their sum (`renormalise`); a Jamba checkpoint
    run that way gives other logits.

    "sigmoid": the weights are sigmoids of the logits, each expert by itself, and the largest are chosen.

    "sinkhorn", as BlackMamba with k = 1: the same, except that in training the choice is that of `sinkhorn`, which is
    even over all tokens; it has no gradient, the router learns through the weights alone.

    Args:
        logits: (..., e);  in training with Sinkhorn (tokens, e).
        real:   (tokens,) bool, False for padding, which takes no share of the experts.
    Returns: weights (..., k), float32 at least, and indices (..., k) int64.
    Source:  Jamba, section 2; BlackMamba (arXiv 2402.01771) and its code.
    """
    if routing not in ROUTINGS or not 1 <= k <= logits.shape[-1]:
        raise ValueError(
            f"routing is {routing!r}, to {k} of {logits.shape[-1]} experts, but must be one of {', '.join(ROUTINGS)}, "
            f"to 1 of them or more"
        )
    wide = torch.promote_types(logits.dtype, torch.float32)
    scores = logits.softmax(-1, dtype=wide) if routing == "softmax" else logits.to(wide).sigmoid()
    if routing == "sinkhorn" and training:
        indices = sinkhorn(logits, real=real).topk(k, dim=-1).indices
        weights = scores.gather(-1, indices)
    else:
        weights, indices = scores.topk(k, dim=-1)
    return (weights / weights.sum(-1, keepdim=True) if renormalise else weights), indices


@torch.no_grad()
def sinkhorn(
    logits: Tensor, sweeps: int = SWEEPS, *, better_start: bool = True, real: Tensor | None = None
) -> Tensor:
    """The plan that is nearest to the logits among those that give each token and each expert an even share.

        plan_te = u_t exp(2 logits_te) v_e,   sum_e plan_te = 1 / T,   sum_t plan_te = 1 / E

    A sweep makes the tokens' shares even (a new u), then the experts' (a new v); so the experts' are even to rounding,
    and the tokens' nearly so. v starts at one, or better at what u = 1 asks for. What makes an expert more popular with
    all tokens alike is then gone from the beginning.

    Args:
        logits: (tokens, e).
        sweeps: at least 1. On trained routers two, the default, bring the busiest expert below 1.7 times its share.
        real:   (tokens,) bool, False for tokens that take no share; some must.
    Returns: plan (tokens, e), of sum 1, float32 at least.
    Source:  Sinkhorn, 1967; BlackMamba (arXiv 2402.01771) for the start; its code for the factor 2.
    """
    if sweeps < 1:
        raise ValueError(f"sweeps is {sweeps}, but a plan takes one at least")
    plan = SHARPNESS * logits.to(torch.promote_types(logits.dtype, torch.float32))  # its logarithm, until the end
    tokens, experts = logits.shape
    if real is None:
        real = torch.ones(tokens, dtype=torch.bool, device=logits.device)
    absent, share = ~real[:, None], -real.sum().log()
    plan = plan.masked_fill(absent, -torch.inf)
    if better_start:
        plan = plan - plan.logsumexp(0)
    for _ in range(sweeps):
        plan = (plan - plan.logsumexp(1, keepdim=True) + share).masked_fill(absent, -torch.inf)
        plan = plan - plan.logsumexp(0) - math.log(experts)
    return plan.exp()


def balance_loss(router_logits: list[Tensor], k: int, mask: Tensor | None = None) -> Tensor:
    """The Switch loss over the tokens of all MoE layers together: e sum_i f_i p_i.

    It judges the softmax of the logits and its k largest, whatever the routing.

    f_i: choices of expert i a token (they sum to k); p_i: mean router probability of expert i. Perfect balance gives k,
    all tokens on the same k experts gives up to e.

    Args:
        router_logits: one (b, t, e) a MoE layer, as collected by `Trace.router`.
        k:    experts a token.
        mask: (b, t) bool, True for real tokens; padding does not count.
    Raises: ValueError if there is no MoE layer.
    Source: Fedus et al., 2021, with the k choices summed, as in transformers' Jamba.
    """
    if not router_logits:
        raise ValueError("there are no router logits: the model has no MoE layer, leave the balance loss out")
    logits = torch.cat([layer[mask] if mask is not None else layer.flatten(0, -2) for layer in router_logits])
    experts = logits.shape[-1]
    probabilities = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    chosen = torch.zeros_like(probabilities).scatter_(-1, probabilities.topk(k, dim=-1).indices, 1.0)
    return experts * (chosen.mean(0) * probabilities.mean(0)).sum()


def expert_load(indices: list[Tensor], experts: int) -> Tensor:
    """How often each expert of each layer was chosen, as a multiple of an even share: (layers, e), each row of mean 1.

    indices: one (b, t, k) a MoE layer, as collected by `Trace.experts`.
    """
    chosen = torch.stack([layer.flatten(0, -2) for layer in indices])
    counted = torch.zeros(*chosen.shape[:2], experts, device=chosen.device).scatter_(-1, chosen, 1.0)
    return counted.mean(1) * (experts / chosen.shape[-1])
