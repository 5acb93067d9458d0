"""Part 3: the router, the feed-forward and the mixture of experts."""

from functools import partial

import adapters
import torch
import torch.nn.functional as F
from judge import CONFIG, EXACT, draw, filled, given, points

from minijamba.mlp import MLP
from minijamba.moe import MoE, naive, router
from minijamba.rungs import use_rung
from minijamba.testing import assert_matches

D, K, E, INNER = CONFIG.hidden_size, CONFIG.num_experts_per_tok, CONFIG.num_experts, CONFIG.intermediate_size


def mixed(moe, x, weights, indices):
    """The definition: one token, one chosen expert after the other."""
    stacks = moe.experts.gate_proj, moe.experts.up_proj, moe.experts.down_proj
    return naive.mixture(x.flatten(0, 1), weights, indices, *stacks).view_as(x)


def routed(moe, x, k=K, **options):
    return router.route(moe.router(x.flatten(0, 1)), k, **options)


@points(4)
def test_weights_and_choices():
    logits = draw(13, E)
    weights, indices = adapters.run_route(logits, K)
    expected, chosen = router.route(logits, K)
    wrong = {
        "they sum to one: take the softmax over all experts and do not divide by the sum of the chosen":
            router.route(logits, K, renormalise=True)[0],
        "these are logits: the softmax is missing": logits.topk(K).values,
        "these are sigmoids: the experts compete in a softmax": router.route(logits, K, "sigmoid")[0],
        "the softmax runs over the tokens: its axis is the last": logits.softmax(0).topk(K).values,
        "they come smallest first": expected.flip(1),
    }  # fmt: skip
    assert_matches(weights, expected, EXACT, "weights", wrong)
    assert_matches(
        indices, chosen, 0, "indices", {"these are the experts that the router likes least": (-logits).topk(K).indices}
    )


@points(1)
def test_the_softmax_is_wider_than_half_precision():
    weights, _ = adapters.run_route(draw(13, E).bfloat16(), K)
    assert weights.dtype == torch.float32, f"weights are {weights.dtype}: take the softmax in float32"


@points(2)
def test_the_feed_forward():
    reference, x = filled(MLP(CONFIG)), draw(2, 7, D, seed=50)
    yours = given(adapters.feed_forward(D, INNER), reference)
    gate, up, down = reference.gate_proj(x), reference.up_proj(x), reference.down_proj
    wrong = {
        "silu belongs to the gate, not to the other half": down(gate * F.silu(up)),
        "silu is missing": down(gate * up),
        "silu covers the product: it belongs to the gate alone": down(F.silu(gate * up)),
        "that is gelu: Jamba's gate is silu": down(F.gelu(gate) * up),
    }
    assert_matches(yours(x), down(F.silu(gate) * up), EXACT, "feed-forward", wrong)


@points(5)
def test_the_mixture():
    reference, x = filled(MoE(CONFIG)), draw(2, 7, D, seed=50)
    yours = given(adapters.mixture(D, INNER, E, K), reference)
    with torch.no_grad():
        mix, (weights, indices) = partial(mixed, reference, x), routed(reference, x)
        last = indices.argmax(1, keepdim=True)
        wrong = {
            "its weights sum to one: do not divide them by their sum": mix(*routed(reference, x, renormalise=True)),
            "the chosen experts are added without their weights": mix(torch.ones_like(weights), indices),
            "each expert has the other one's weight": mix(weights.flip(1), indices),
            "only the first choice counts": mix(weights[:, :1], indices[:, :1]),
            "only the last of the experts counts: add to y, do not overwrite it":
                mix(weights.gather(1, last), indices.gather(1, last)),
            "all experts take part: only the k chosen ones do": mix(*routed(reference, x, k=E)),
        }  # fmt: skip
        assert_matches(yours(x), mix(weights, indices), EXACT, "mixture", wrong)


@points(2)
def test_no_token_is_dropped():
    """All tokens choose the same experts, as they may; each gets what it would get alone."""
    reference = filled(MoE(CONFIG))
    yours = given(adapters.mixture(D, INNER, E, K), reference)
    x = draw(1, 1, D, seed=51) + 0.01 * draw(1, 20, D, seed=52)
    with torch.no_grad(), use_rung("naive"):
        assert len(routed(reference, x)[1].sort(1).values.unique(dim=0)) == 1
        alone = torch.cat([reference(token)[0] for token in x.split(1, dim=1)], dim=1)
        together = yours(x)
    dropped = (together - alone).abs().amax(-1) > EXACT * alone.abs().max()
    assert not dropped.any(), f"{int(dropped.sum())} of 20 tokens get less when all choose the same expert: drop none"


@points(1)
def test_the_router_learns():
    yours = given(adapters.mixture(D, INNER, E, K), filled(MoE(CONFIG)))
    yours(draw(1, 5, D, seed=50)).square().sum().backward()
    gradient = yours.router.weight.grad
    assert gradient is not None and gradient.abs().sum() > 0, "no gradient reaches the router: weigh with its softmax"
