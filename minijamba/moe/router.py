"""Which experts a token goes to, what each counts for, and the loss that keeps them evenly used."""

import torch
from torch import Tensor


def route(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Softmax over all experts, then the k largest.

    The k weights are not renormalised: they sum to less than one, and the rest is the router's doubt. Mixtral divides
    by their sum; a Jamba checkpoint run that way gives other logits.

    logits: (..., e) -> weights (..., k) float32, largest first, and indices (..., k) int64.
    """
    probabilities = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    weights, indices = probabilities.topk(k, dim=-1)
    return weights, indices


def balance_loss(router_logits: list[Tensor], k: int, mask: Tensor | None = None) -> Tensor:
    """The Switch loss over the tokens of all MoE layers together: e sum_i f_i p_i.

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


def expert_load(router_logits: list[Tensor], k: int) -> Tensor:
    """How often each expert of each layer was chosen, as a multiple of an even share: (layers, e), each row of mean 1.

    router_logits: one (b, t, e) a MoE layer, as collected by `Trace.router`; k experts a token.
    """
    logits = torch.stack([layer.flatten(0, -2) for layer in router_logits])
    chosen = torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, logits.topk(k, dim=-1).indices, 1.0)
    return chosen.mean(1) * (logits.shape[-1] / k)
