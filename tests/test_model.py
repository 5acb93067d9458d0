from dataclasses import replace

import pytest
import torch

from minijamba.cache import Layout
from minijamba.config import JambaConfig
from minijamba.model import Jamba, Trace
from minijamba.moe import MoE
from minijamba.testing import assert_matches, assert_rejects

# float64: other orders of summation, over some hundred terms and four layers.
FLOAT64 = 1e-12
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 0, 1, 1], [1, 1, 1, 0, 0, 0, 0], [0] * 7]).bool()


@pytest.fixture(scope="module")
def model(hybrid, long_memory):
    return long_memory(Jamba(hybrid)).double().requires_grad_(False)


def draw(*shape, seed=0):
    return torch.randint(0, 41, shape, generator=torch.Generator().manual_seed(seed))


def traced(model, tokens, **options):
    trace = Trace()
    return model(tokens, trace=trace, **options), trace


def test_parameters_have_the_released_names(hybrid):
    """As in the released checkpoints, except that the experts of a layer are stacked."""
    d, c, n, r, w, f, e, v = 16, 32, 4, 3, 4, 12, 4, 41
    mamba = {
        "mamba.in_proj.weight": (2 * c, d),
        "mamba.conv1d.weight": (c, 1, w),
        "mamba.conv1d.bias": (c,),
        "mamba.x_proj.weight": (r + 2 * n, c),
        "mamba.dt_layernorm.weight": (r,),
        "mamba.b_layernorm.weight": (n,),
        "mamba.c_layernorm.weight": (n,),
        "mamba.dt_proj.weight": (c, r),
        "mamba.dt_proj.bias": (c,),
        "mamba.A_log": (c, n),
        "mamba.D": (c,),
        "mamba.out_proj.weight": (d, c),
    }
    attention = {
        "self_attn.q_proj.weight": (d, d),
        "self_attn.k_proj.weight": (d // 2, d),
        "self_attn.v_proj.weight": (d // 2, d),
        "self_attn.o_proj.weight": (d, d),
    }
    mlp = {
        "feed_forward.gate_proj.weight": (f, d),
        "feed_forward.up_proj.weight": (f, d),
        "feed_forward.down_proj.weight": (d, f),
    }
    moe = {
        "feed_forward.router.weight": (e, d),
        "feed_forward.experts.gate_proj": (e, f, d),
        "feed_forward.experts.up_proj": (e, f, d),
        "feed_forward.experts.down_proj": (e, d, f),
    }
    norms = {"input_layernorm.weight": (d,), "pre_ff_layernorm.weight": (d,)}
    expected = {"model.embed_tokens.weight": (v, d), "model.final_layernorm.weight": (d,), "lm_head.weight": (v, d)}
    for i, parts in enumerate([mamba | moe, attention | mlp, mamba | mlp, attention | moe]):
        expected |= {f"model.layers.{i}.{name}": shape for name, shape in (parts | norms).items()}

    def check(config):
        actual = {name: tuple(tensor.shape) for name, tensor in Jamba(config).state_dict().items()}
        assert actual == expected

    check(hybrid)
    assert_rejects(check, replace(hybrid, expert_layer_offset=1), replace(hybrid, mamba_proj_bias=True))


def test_every_layer_adds_its_mixer_then_its_feed_forward(model):
    logits, trace = traced(model, draw(2, 9))
    assert_matches(trace.hidden[0], model.model.embed_tokens(draw(2, 9)), 0, "embeddings")
    assert_matches(logits, model.lm_head(model.model.final_layernorm(trace.hidden[-1])), 0, "head")

    def check(layer):
        for i, block in enumerate(model.model.layers):
            assert_matches(layer(block, trace.hidden[i]), trace.hidden[i + 1], FLOAT64, f"layer {i}")

    def feed_forward(block, h):
        y = block.feed_forward(h)
        return y[0] if isinstance(block.feed_forward, MoE) else y

    def by_hand(block, x):
        h = x + block.mixer(block.input_layernorm(x), Layout())
        return h + feed_forward(block, block.pre_ff_layernorm(h))

    def side_by_side(block, x):
        y = feed_forward(block, block.pre_ff_layernorm(x))
        return x + block.mixer(block.input_layernorm(x), Layout()) + y

    def norms_exchanged(block, x):
        h = x + block.mixer(block.pre_ff_layernorm(x), Layout())
        return h + feed_forward(block, block.input_layernorm(h))

    check(by_hand)
    assert_rejects(check, side_by_side, norms_exchanged)


def test_trace_counts_embeddings_layers_and_routers(model):
    logits, trace = traced(model, draw(2, 9))
    assert [tuple(h.shape) for h in trace.hidden] == [(2, 9, 16)] * 5
    assert [tuple(r.shape) for r in trace.router] == [(2, 9, 4)] * 2
    for i, router_logits in zip((0, 3), trace.router, strict=True):
        block = model.model.layers[i]
        h = trace.hidden[i]
        h = h + block.mixer(block.input_layernorm(h), Layout())
        assert_matches(router_logits, block.feed_forward.router(block.pre_ff_layernorm(h)), FLOAT64, f"router {i}")
    assert_matches(logits, model(draw(2, 9)), 0, "logits without a trace")


def test_trace_under_padding_is_that_of_the_real_tokens_and_zero_elsewhere(model):
    tokens = draw(4, 7)
    _, trace = traced(model, tokens, mask=MASK)
    assert (len(trace.hidden), len(trace.router)) == (5, 2)

    def check(mask):
        for row in range(3):
            _, alone = traced(model, tokens[row : row + 1, MASK[row]])
            for name in ("hidden", "router"):
                for i, (actual, expected) in enumerate(zip(vars(trace)[name], vars(alone)[name], strict=True)):
                    assert_matches(actual[row, mask[row]], expected[0], FLOAT64, f"{name} {i} of row {row}")
                    assert (actual[row, ~mask[row]] == 0).all()

    check(MASK)
    assert_rejects(check, MASK.flip(1))


def test_last_only_is_each_rows_last_real_token(model):
    tokens = draw(4, 7)
    assert_matches(model(tokens, last_only=True), model(tokens)[:, -1:], FLOAT64, "no padding")
    whole = model(tokens, mask=MASK)
    last = model(tokens, mask=MASK, last_only=True)
    assert last.shape == (4, 1, 41)

    def check(columns):
        for row, column in enumerate(columns):
            assert_matches(last[row, 0], whole[row, column], FLOAT64, f"row {row}")

    check([6, 6, 2, 0])
    assert_rejects(check, [6, 6, 6, 0], [4, 4, 2, 0])
    assert (last[3] == 0).all(), "a row of padding has no last token"
    cache = model.new_cache(4)
    model(tokens[:, :3], cache=cache, mask=MASK[:, :3])
    assert_matches(model(tokens[:, 3:], cache=cache, mask=MASK[:, 3:], last_only=True)[:2], last[:2], FLOAT64, "cached")


def test_no_token_sees_a_later_one_and_every_token_sees_all_earlier(model):
    tokens = draw(1, 12)
    logits = model(tokens)

    def check(changed):
        for at in range(12):
            other = tokens.clone()
            other[0, at] = (other[0, at] + 1) % 41
            difference = (model(other) - logits)[0].abs().amax(-1)
            # Other groups of tokens at the experts: rounding. A change felt over twelve tokens: far above it.
            assert (difference[:at] < 1e-12).all()
            assert (difference[changed(at)] > 1e-6).all()

    check(lambda at: slice(at, None))
    assert_rejects(check, lambda at: slice(None))


def test_every_parameter_has_a_gradient(hybrid, long_memory):
    model = long_memory(Jamba(replace(hybrid, mamba_proj_bias=True)))
    model(draw(4, 20)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_tied_embeddings_are_one_parameter(hybrid):
    def check(model):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert "lm_head.weight" not in dict(model.named_parameters())

    check(Jamba(replace(hybrid, tie_word_embeddings=True)))
    check(Jamba(replace(hybrid, tie_word_embeddings=True)).bfloat16())
    assert_rejects(check, Jamba(hybrid))


def test_a_new_model_is_initialised_for_training():
    config = JambaConfig(
        vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, num_experts=4, mamba_proj_bias=True,
    )  # fmt: skip
    torch.manual_seed(0)

    def check(model):
        for name, p in model.named_parameters():
            if name.endswith(("A_log", "D")) or "conv1d" in name or "dt_proj" in name:
                continue
            if "norm" in name:
                assert (p == 1).all(), name
            elif p.dim() == 1:
                assert (p == 0).all(), name
            else:
                to_residual = any(part in name for part in ("o_proj", "out_proj", "down_proj"))
                # The deviation of at least 256 draws is known to five standard errors of 1 / sqrt(2 x 256).
                assert_matches(p.std(), 0.02 / (4 if to_residual else 1), 5 / (2 * p.numel()) ** 0.5, name)

    def without_scaling(model):
        for name, p in model.named_parameters():
            if "o_proj" in name:
                torch.nn.init.normal_(p, std=0.02)
        return model

    check(Jamba(config))
    assert_rejects(check, without_scaling(Jamba(config)), Jamba(replace(config, initializer_range=0.03)))


def test_first_loss_is_that_of_a_guess(hybrid):
    """Small weights: every token as likely as any other, log 41 nats."""
    torch.manual_seed(0)
    tokens = draw(8, 20)
    logits = Jamba(hybrid)(tokens)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    # Logits of size 0.02 sqrt(16) = 0.08.
    assert_matches(loss, torch.tensor(41.0).log(), 0.05, "loss")


def test_half_precision_follows_the_model(hybrid, long_memory):
    model = long_memory(Jamba(hybrid))
    expected, _ = traced(model, draw(2, 9))
    actual, trace = traced(model.bfloat16(), draw(2, 9))
    assert model.dtype == actual.dtype == trace.hidden[-1].dtype == trace.router[0].dtype == torch.bfloat16
    # Some dozen roundings of 2^-9 through four layers.
    assert_matches(actual, expected, 0.05, "bfloat16")
    assert_rejects(lambda logits: assert_matches(logits, expected, 0.05), actual.roll(1, dims=1))


BAD = {
    "token 41 is outside the vocabulary 0 .. 40": (torch.tensor([[1, 41]]), {}),
    "token -1 is outside the vocabulary 0 .. 40": (torch.tensor([[1, -1]]), {}),
    r"tokens must be \(b, t\) with at least one token, not \(1, 0\)": (torch.zeros(1, 0).long(), {}),
    r"at least one token, not \(0, 3\)": (torch.zeros(0, 3).long(), {}),
    r"tokens must be \(b, t\) with at least one token, not \(3,\)": (torch.zeros(3).long(), {}),
    r"mask must have the shape of tokens \(1, 3\), not \(1, 2\)": (draw(1, 3), {"mask": MASK[:1, :2]}),
    r"segments must have the shape of tokens \(1, 3\), not \(3,\)": (draw(1, 3), {"segments": draw(3)}),
    r"mask must be bool, True for real tokens, not torch.int64": (draw(1, 3), {"mask": torch.ones(1, 3).long()}),
}


@pytest.mark.parametrize(("match", "call"), BAD.items(), ids=BAD)
def test_bad_calls_are_refused_and_leave_the_cache_alone(model, match, call):
    tokens, options = call
    cache = model.new_cache(1)
    model(draw(1, 4), cache=cache)
    for kept in (None, cache):
        with pytest.raises(ValueError, match=match):
            model(tokens, kept, **options)
    assert_matches(model(draw(1, 2), cache=cache), model(torch.cat([draw(1, 4), draw(1, 2)], 1))[:, 4:], FLOAT64)
