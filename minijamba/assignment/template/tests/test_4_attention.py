"""Part 4: attention with grouped queries and without positions, and its cache."""

import adapters
import torch
from einops import rearrange, repeat
from judge import CONFIG, EXACT, draw, filled, given, in_pieces, points

from minijamba.attention import Attention, attention, rotate
from minijamba.cache import Layout
from minijamba.rungs import use_rung
from minijamba.testing import assert_matches

D, H, G = CONFIG.hidden_size, CONFIG.num_attention_heads, CONFIG.num_key_value_heads


def reference(q, k, v, visible=None):
    return attention(q, k, v, visible, rung="naive")


def heads(t, s, h=6, g=3, p=5):
    return draw(2, t, h, p), draw(2, s, g, p, seed=1), draw(2, s, g, p, seed=2)


def mistakes(q, k, v):
    t, s, p = q.shape[1], k.shape[1], q.shape[-1]
    everything = torch.ones(1, t, s, dtype=torch.bool)
    interleaved = [repeat(x, "b s g p -> b s (n g) p", n=q.shape[2] // k.shape[2]) for x in (k, v)]
    wrong = {
        "the scores are not divided by sqrt(p)": reference(q * p**0.5, k, v),
        "the scores are divided by p: divide by sqrt(p)": reference(q / p**0.5, k, v),
        "your heads are paired in turns: query heads 0 .. h/g - 1 share key head 0": reference(q, *interleaved),
        "all query heads read key head 0": reference(q, k[:, :, :1], v[:, :, :1]),
    }
    if t > 1:
        wrong["a token sees those after it: mask the scores before the softmax"] = reference(q, k, v, everything)
    if t < s:
        wrong["the queries are the last t of the s tokens: query 0 sees key 0 alone in yours"] = reference(
            q, k, v, everything.tril()
        )
    return wrong


@points(6)
def test_values():
    q, k, v = heads(7, 7)
    assert_matches(adapters.run_attention(q, k, v), reference(q, k, v), EXACT, "y", mistakes(q, k, v))


@points(3)
def test_the_queries_are_the_last_of_the_tokens():
    for t in 1, 3:
        q, k, v = heads(t, 7)
        found = adapters.run_attention(q, k, v)
        assert_matches(found, reference(q, k, v), EXACT, f"{t} queries after {7 - t} tokens", mistakes(q, k, v))


@points(3)
def test_the_mixer_has_no_positions():
    own, x = filled(Attention(CONFIG)), draw(2, 7, D, seed=50)
    yours = given(adapters.attention_mixer(D, H, G), own)
    with torch.no_grad(), use_rung("naive"):
        q, k, v = own.heads(x, Layout())
        turned = (rotate(part, torch.arange(7), 10_000.0) for part in (q, k))
        wrong = {
            "that is with rotary positions: Jamba's attention has none":
                own.o_proj(rearrange(reference(*turned, v), "b t h p -> b t (h p)")),
            "the output goes without o_proj": rearrange(reference(q, k, v), "b t h p -> b t (h p)"),
            "the heads are put together in the wrong order: head by head, p numbers each":
                own.o_proj(rearrange(reference(q, k, v), "b t h p -> b t (p h)")),
        }  # fmt: skip
        y, _ = yours(x, None)
        assert_matches(y, own(x, Layout()), EXACT, "the mixer", wrong)
        shuffled, _ = yours(torch.cat([x[:, [3, 0, 5, 2, 1, 4]], x[:, 6:]], dim=1), None)
        assert_matches(shuffled[:, -1], y[:, -1], EXACT, "the last token, its past in another order")


@points(6)
def test_any_split_equals_the_whole():
    own, x = filled(Attention(CONFIG)), draw(2, 7, D, seed=50)
    yours = given(adapters.attention_mixer(D, H, G), own)
    with torch.no_grad(), use_rung("naive"):
        for lengths in [4, 3], [3, 1, 3], [1] * 7:
            alone = torch.cat([own(piece, Layout()) for piece in x.split(lengths, dim=1)], dim=1)
            wrong = {"the tokens of earlier calls are forgotten: put the cache in front of the new keys": alone}
            found = in_pieces(yours, x, lengths)
            assert_matches(found, own(x, Layout()), EXACT, f"y in pieces of {lengths}", wrong)


@points(2)
def test_the_cache_holds_g_heads_and_is_not_changed():
    yours = given(adapters.attention_mixer(D, H, G), filled(Attention(CONFIG)))
    with torch.no_grad():
        _, cache = yours(draw(2, 5, D, seed=50), None)
        kept = [part.clone() for part in cache]
        for part in cache:
            assert part.shape[2] != H, f"the cache holds {H} heads: keep the {G} of keys and values, repeat them later"
            assert part.shape == (2, 5, G, D // H), f"keys or values are {tuple(part.shape)}, not {(2, 5, G, D // H)}"
        yours(draw(2, 2, D, seed=51), cache)
    same = all(torch.equal(part, before) for part, before in zip(cache, kept, strict=True))
    assert same, "your mixer writes into the cache it was given: a kept one would change; return a new one"
