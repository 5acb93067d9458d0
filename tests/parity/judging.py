"""Measures that several comparisons with transformers share."""

import torch.nn.functional as F
from torch import Tensor, nn

import minijamba as mj
from minijamba.testing import assert_matches


def gradients(model: nn.Module, logits: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def same_routing(trace: mj.Trace, theirs, k: int, tolerance: float) -> None:
    """The routers' logits and the balance loss of their output."""
    assert_matches([router.flatten(0, 1) for router in trace.router], theirs.router_logits, tolerance, "router logits")
    assert_matches(mj.balance_loss(trace.router, k), theirs.aux_loss, tolerance, "balance loss")


def in_our_names(tensors: dict[str, Tensor], names: dict[str, str] | None = None) -> dict[str, Tensor]:
    """Tensors in memory under our names; their experts' gate and up projections share one tensor.

    names: part of their name -> part of ours.
    """
    ours = {}
    for name, tensor in tensors.items():
        for theirs, new in (names or {}).items():
            name = name.replace(theirs, new)
        if name.endswith("gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            ours |= {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}
        else:
            ours[name] = tensor
    return ours
