"""Part 6: a layer, and the schedule of the layers."""

import adapters
import torch
from judge import CONFIG, EXACT, draw, filled, given, in_pieces, points

from minijamba import preset
from minijamba.block import Block
from minijamba.cache import Layout
from minijamba.rungs import use_rung
from minijamba.testing import assert_matches

LAYERS = range(CONFIG.num_hidden_layers)


def parts(own):
    """The reference's mixer and feed-forward, x -> y, each without the norm in front of it."""
    routed = hasattr(own.feed_forward, "router")
    return lambda x: own.mixer(x, Layout()), lambda x: own.feed_forward(x)[0] if routed else own.feed_forward(x)


def layer(own, h):
    mixer, feed_forward = parts(own)
    h = h + mixer(own.input_layernorm(h))
    return h + feed_forward(own.pre_ff_layernorm(h))


def mistakes(own, h):
    mixer, feed_forward = parts(own)
    first, second = own.input_layernorm, own.pre_ff_layernorm
    mixed = h + mixer(first(h))
    after = first(h + mixer(h))
    return {
        "the norms stand behind: they belong in front of mixer and feed-forward": second(after + feed_forward(after)),
        "the stream is not added to what the mixer gives": (y := mixer(first(h))) + feed_forward(second(y)),
        "the stream is not added to what the feed-forward gives": feed_forward(second(mixed)),
        "the feed-forward sees the stream before the mixer": mixed + feed_forward(second(h)),
        "one norm serves twice: pre_ff_layernorm stands before the feed-forward": mixed + feed_forward(first(mixed)),
        "no norm stands before the feed-forward": mixed + feed_forward(mixed),
        "the stream that goes on is the normalised one": first(mixed) + feed_forward(second(first(mixed))),
    }


@points(2)
def test_the_schedule():
    for config in CONFIG, preset("tiny"), preset("tiny", num_experts=1):
        for i, wanted in enumerate(config.layers):
            yours = adapters.jamba_block(config.to_dict(), i)
            mixer = {"attention": "self_attn", "mamba": "mamba"}[wanted.mixer]
            names, modules = (
                {"input_layernorm", "pre_ff_layernorm", "feed_forward", mixer},
                dict(yours.named_children()),
            )
            here = f"layer {i} of {config.schedule} (the first is 0)"
            assert modules.keys() == names, f"{here} holds {sorted(modules)}: it should hold {sorted(names)}"
            experts = len(getattr(modules["feed_forward"], "experts", ()))
            due = config.num_experts if wanted.feed_forward == "moe" else 0
            assert experts == due, f"{here} has {experts} experts: it should have {due}"


@points(2)
def test_values_of_each_kind_of_layer():
    for i in LAYERS:
        own, h = filled(Block(CONFIG, i)), draw(2, 7, CONFIG.hidden_size, seed=50)
        yours = given(adapters.jamba_block(CONFIG.to_dict(), i), own)
        with torch.no_grad(), use_rung("naive"):
            name = f"layer {i} of {CONFIG.schedule}"
            assert_matches(yours(h, None)[0], layer(own, h), EXACT, name, mistakes(own, h))


@points(1)
def test_any_split_equals_the_whole():
    for i in LAYERS:
        own, h = filled(Block(CONFIG, i)), draw(2, 7, CONFIG.hidden_size, seed=50)
        yours = given(adapters.jamba_block(CONFIG.to_dict(), i), own)
        with torch.no_grad(), use_rung("naive"):
            alone = torch.cat([layer(own, piece) for piece in h.split([3, 4], dim=1)], dim=1)
            wrong = {"the cache does not reach the mixer, or is not returned": alone}
            assert_matches(in_pieces(yours, h, [3, 4]), layer(own, h), EXACT, f"layer {i} of {CONFIG.schedule}", wrong)
