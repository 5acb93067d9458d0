"""Equal to transformers' JambaForCausalLM, on tiny random checkpoints that transformers wrote."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from judging import gradients, in_our_names, same_routing
from torch import Tensor
from transformers import JambaForCausalLM
from transformers.models.jamba import modeling_jamba as jamba

import minijamba as mj
from minijamba import attention, moe
from minijamba.cache import KeyValues, MambaState
from minijamba.mamba import Mamba
from minijamba.scan import selective_scan_fn
from minijamba.testing import assert_matches, assert_rejects

# Both run in float32 and add the same numbers in another order: a few units in the last place (6e-8) for each of the
# some twenty operations that a value passes through.
FLOAT32 = 1e-5
NEW = 10  # tokens that greedy generation adds

BASE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_layer_period": 4,
    "attn_layer_offset": 2,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "mamba_d_state": 8,
    "mamba_dt_rank": 6,
}

GRID = {
    "m+ mE A+ mE": {},
    "m+ mE m+ mE A+ mE m+ mE": {"num_hidden_layers": 8, "attn_layer_period": 8, "attn_layer_offset": 4},
    "A+ mE m+ AE m+ mE": {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 0},
    "mE A+ m+ AE m+": {
        "num_hidden_layers": 5, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 3, "expert_layer_offset": 0,
    },
    "A+ AE A+ AE": {"attn_layer_period": 1, "attn_layer_offset": 0},
    "m+ mE m+ mE": {"attn_layer_period": 5, "attn_layer_offset": 4},
    "mE mE AE mE": {"expert_layer_period": 1, "expert_layer_offset": 0},
    "m+ m+ A+ m+": {"num_experts": 1},
    "4 experts, top 1": {"num_experts_per_tok": 1},
    "16 experts, top 1": {"num_experts": 16, "num_experts_per_tok": 1},
    "16 experts, top 2": {"num_experts": 16},
    "tied": {"tie_word_embeddings": True},
    "no convolution bias": {"mamba_conv_bias": False},
    "projection bias": {"mamba_proj_bias": True},
    "1 KV head": {"num_key_value_heads": 1},
    "a KV head for each query head": {"num_key_value_heads": 4},
    "odd widths": {
        "vocab_size": 53, "hidden_size": 30, "intermediate_size": 37, "num_attention_heads": 3,
        "num_key_value_heads": 1, "num_experts": 5, "num_experts_per_tok": 3,
        "mamba_d_state": 5, "mamba_d_conv": 3, "mamba_expand": 3, "mamba_dt_rank": 7,
    },
    "other epsilon": {"rms_norm_eps": 1e-3},
}  # fmt: skip


@dataclass
class Pair:
    theirs: JambaForCausalLM
    ours: mj.Jamba

    @property
    def config(self) -> mj.JambaConfig:
        return self.ours.config


@pytest.fixture(scope="module")
def make_pair(randomise, tmp_path_factory):
    """A function: changes to BASE -> their model, and ours loaded from the checkpoint that theirs wrote."""

    def make(dtype: torch.dtype = torch.float32, **changes) -> Pair:
        # "eager" is the code of their model file; their grouped product refuses odd widths.
        eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
        config = transformers.JambaConfig(**{**BASE, **changes, **eager})
        theirs = randomise(JambaForCausalLM(config)).to(dtype)
        folder = tmp_path_factory.mktemp("checkpoint")
        theirs.save_pretrained(folder)
        return Pair(theirs, mj.load(folder, device="cpu"))

    return make


@pytest.fixture(scope="module", params=GRID)
def pair(request, make_pair) -> Pair:
    return make_pair(**GRID[request.param])


@pytest.fixture(scope="module")
def base(make_pair) -> Pair:
    return make_pair()


def draw(config: mj.JambaConfig, *shape: int) -> Tensor:
    """Random tokens without 0: transformers gives the embedding of the padding token no gradient."""
    return torch.randint(1, config.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def left_padded(config: mj.JambaConfig) -> tuple[Tensor, Tensor]:
    """Rows of 11, 6 and 1 real tokens, and their mask."""
    tokens = draw(config, 3, 11)
    mask = torch.arange(11) >= 11 - torch.tensor([11, 6, 1])[:, None]
    return tokens.masked_fill(~mask, config.pad_token_id), mask


def same_values(pair: Pair) -> None:
    """Logits, the router's logits and every layer's hidden state."""
    tokens, trace, routed = draw(pair.config, 2, 19), mj.Trace(), "E" in pair.config.schedule
    with torch.no_grad():
        logits = pair.ours(tokens, trace=trace)
        theirs = pair.theirs(tokens, use_cache=False, output_hidden_states=True, output_router_logits=routed)
        # Their last hidden state has already passed the last norm.
        hidden = [*trace.hidden[:-1], pair.ours.model.final_layernorm(trace.hidden[-1])]
    assert_matches(hidden, theirs.hidden_states, FLOAT32, "hidden state")
    assert_matches(logits, theirs.logits, FLOAT32, "logits")
    if routed:
        same_routing(trace, theirs, pair.config.num_experts_per_tok, FLOAT32)


def same_gradients(pair: Pair) -> None:
    tokens = draw(pair.config, 2, 19)
    ours = gradients(pair.ours, pair.ours(tokens), tokens)
    theirs = gradients(pair.theirs, pair.theirs(tokens, use_cache=False).logits, tokens)
    assert_matches(ours, in_our_names(theirs), FLOAT32, "gradient")


def same_greedy(pair: Pair) -> None:
    tokens = draw(pair.config, 4, 5)
    assert_matches(mj.generate(pair.ours, tokens, max_new_tokens=NEW), their_greedy(pair, tokens), 0, "tokens")


def their_greedy(pair: Pair, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    # transformers 5.23 has no cache for a schedule without attention.
    cached = "A" in pair.config.schedule
    mask = torch.ones_like(tokens) if mask is None else mask.long()
    whole = pair.theirs.generate(tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False, use_cache=cached)
    return whole[:, tokens.shape[1] :]


@torch.no_grad()
def same_padded_rows(pair: Pair) -> None:
    """A batch padded on the left: each row as theirs gives it alone."""
    tokens, mask = left_padded(pair.config)
    logits, replies = pair.ours(tokens, mask=mask), mj.generate(pair.ours, tokens, mask=mask, max_new_tokens=NEW)
    for row, real, actual, reply in zip(tokens, mask, logits, replies, strict=True):
        alone = row[real][None]
        assert_matches(actual[real], pair.theirs(alone, use_cache=False).logits[0], FLOAT32, "logits of a padded row")
        expected = their_greedy(pair, alone)[0]
        assert_matches(reply[: len(expected)], expected, 0, "tokens of a padded row")


CHECKS = [same_values, same_gradients, same_greedy, same_padded_rows]


@pytest.mark.parametrize("check", CHECKS)
def test_equal(pair, check):
    check(pair)


def test_naive_rungs_are_equal(pair):
    with mj.use_rung("naive"):
        same_values(pair)


# Under a projection bias their padding is no longer zero where it enters the convolution, and changes the row.
@pytest.mark.parametrize("pair", sorted(GRID.keys() - {"projection bias"}), indirect=True)
def test_equal_to_their_padded_batch(pair):
    tokens, mask = left_padded(pair.config)
    with torch.no_grad():
        theirs = pair.theirs(tokens, attention_mask=mask.long(), use_cache=False).logits
        assert_matches(pair.ours(tokens, mask=mask)[mask], theirs[mask], FLOAT32, "logits")
    replies = mj.generate(pair.ours, tokens, mask=mask, max_new_tokens=NEW)
    assert_matches(replies, their_greedy(pair, tokens, mask), 0, "tokens")


def test_the_grid_is_what_its_ids_say(pair, request):
    case = request.node.callspec.params["pair"]
    assert pair.config.schedule == case or "+" not in case


def test_no_router_is_near_a_tie(pair):
    """Else two experts could change places within the tolerance, and equality would be luck."""
    trace, k = mj.Trace(), pair.config.num_experts_per_tok
    pair.ours(draw(pair.config, 2, 19), trace=trace)
    for logits in trace.router:
        ranked = logits.sort(descending=True).values
        assert (ranked[..., k - 1] - ranked[..., k]).min() > 2 * FLOAT32 * logits.abs().max()


def test_stops_where_theirs_stops(base, make_pair):
    tokens = draw(base.config, 4, 5)
    unstopped = mj.generate(base.ours, tokens, max_new_tokens=NEW, stop=())
    pair = make_pair(eos_token_id=[int(row[4 + i]) for i, row in enumerate(unstopped)])
    assert len(pair.config.stop_tokens) == 4
    assert their_greedy(pair, tokens).shape[1] < NEW
    same_greedy(pair)


# Wrong variants: each turns our model into one that a careless reading of the papers would give.


def renormalised_router(model: mj.Jamba, patch: pytest.MonkeyPatch) -> mj.Jamba:
    route = moe.router.route
    patch.setattr(moe, "route", lambda *given, **options: route(*given, **options | {"renormalise": True}))
    return model


def selected(self: Mamba, x: Tensor) -> tuple[Tensor, ...]:
    norms = (self.dt_layernorm, self.b_layernorm, self.c_layernorm)
    return self.x_proj(x).split([len(norm.weight) for norm in norms], dim=-1)


def norm_after_dt_proj(model: mj.Jamba, patch: pytest.MonkeyPatch) -> mj.Jamba:
    def select(self: Mamba, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        delta, B, C = selected(self, x)
        delta = F.linear(self.dt_layernorm.weight * delta, self.dt_proj.weight)
        return F.rms_norm(delta, delta.shape[-1:]), self.b_layernorm(B), self.c_layernorm(C)

    patch.setattr(Mamba, "select", select)
    return model


def no_inner_norms(model: mj.Jamba, patch: pytest.MonkeyPatch) -> mj.Jamba:
    def select(self: Mamba, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        delta, B, C = selected(self, x)
        delta = F.linear(self.dt_layernorm.weight * delta, self.dt_proj.weight)
        return delta, self.b_layernorm.weight * B, self.c_layernorm.weight * C

    patch.setattr(Mamba, "select", select)
    return model


@torch.no_grad()
def swapped_halves_of_in_proj(model: mj.Jamba, patch: pytest.MonkeyPatch) -> mj.Jamba:
    for name, parameter in model.named_parameters():
        if "in_proj" in name:
            parameter.copy_(parameter.roll(model.config.d_inner, dims=0))
    return model


def A_log_without_exp(model: mj.Jamba, patch: pytest.MonkeyPatch) -> mj.Jamba:
    patch.setattr(Mamba, "A", property(lambda self: -self.A_log))
    return model


def rotary_positions(model: mj.Jamba, patch: pytest.MonkeyPatch) -> mj.Jamba:
    plain = attention.attention

    def rotate(x: Tensor, first: int) -> Tensor:
        half = x.shape[-1] // 2
        times = torch.arange(first, first + x.shape[1])[:, None, None]
        angle = (times * 10_000 ** (-torch.arange(half) / half)).to(x.dtype)
        left, right = x.chunk(2, dim=-1)
        return torch.cat([left * angle.cos() - right * angle.sin(), left * angle.sin() + right * angle.cos()], dim=-1)

    def rotated(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
        return plain(rotate(q, k.shape[1] - q.shape[1]), rotate(k, 0), v, visible)

    patch.setattr(attention, "attention", rotated)
    return model


def attention_one_layer_late(model: mj.Jamba, patch: pytest.MonkeyPatch) -> mj.Jamba:
    late = mj.Jamba(replace(model.config, attn_layer_offset=3)).to(model.dtype)
    moved = {"layers.2.self_attn": "layers.3.self_attn", "layers.3.mamba": "layers.2.mamba"}
    weights = model.state_dict()
    for here, there in moved.items():
        weights = {name.replace(here, there): weight for name, weight in weights.items()}
    late.load_state_dict(weights)
    return late


def deaf_to_the_mask(model: mj.Jamba, patch: pytest.MonkeyPatch) -> mj.Jamba:
    forward = mj.Jamba.forward
    patch.setattr(mj.Jamba, "forward", lambda self, tokens, mask=None, **others: forward(self, tokens, **others))
    return model


WRONG = [
    renormalised_router,
    norm_after_dt_proj,
    no_inner_norms,
    swapped_halves_of_in_proj,
    A_log_without_exp,
    rotary_positions,
    attention_one_layer_late,
]


@pytest.mark.parametrize("check", CHECKS)
def test_wrong_variants_are_rejected(base, check):
    def judge(spoil):
        with pytest.MonkeyPatch.context() as patch:
            check(Pair(base.theirs, spoil(copy.deepcopy(base.ours), patch)))

    wrong = [*WRONG, deaf_to_the_mask] if check is same_padded_rows else WRONG
    assert_rejects(judge, *wrong)
    check(base)


@torch.no_grad()
def test_bfloat16(make_pair):
    """Some fifty roundings in a row by up to 2^-9 each: as a random walk, 1.4 %. We allow twice that.

    All experts are used, since near ties between experts fall by rounding; renormalising then changes nothing.
    """
    pair = make_pair(torch.bfloat16, num_experts_per_tok=BASE["num_experts"])
    tokens = draw(pair.config, 2, 19)
    exact = copy.deepcopy(pair.ours).float()(tokens)

    def check(spoil):
        with pytest.MonkeyPatch.context() as patch:
            logits = spoil(copy.deepcopy(pair.ours), patch)(tokens)
        assert logits.dtype == torch.bfloat16
        for name, reference in {"float32": exact, "theirs": pair.theirs(tokens, use_cache=False).logits}.items():
            error = (logits - reference).float().norm() / exact.norm()
            assert error < 0.03, f"{error:.3f} from {name}"

    def unchanged(model, patch):
        return model

    check(unchanged)
    assert_rejects(check, *(spoil for spoil in WRONG if spoil is not renormalised_router))


@torch.no_grad()
def test_theirs_runs_on_our_kernels(base, monkeypatch):
    """With the line that `selective_scan_fn` documents: logits, and generation that goes on from our state."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    line = next(line.strip() for line in selective_scan_fn.__doc__.splitlines() if "mamba_selective_scan =" in line)
    theirs, tokens = copy.deepcopy(base.theirs).to(device), draw(base.config, 2, 5).to(device)
    pair = Pair(theirs, base.ours)
    logits, replies = theirs(tokens, use_cache=False).logits, their_greedy(pair, tokens)

    def check(scan):
        calls = []

        def counted(*args, **kwargs):
            calls.append(scan)
            return scan(*args, **kwargs)

        monkeypatch.setattr(jamba, "mamba_selective_scan", None)
        exec(line, {"jamba": jamba, "selective_scan_fn": counted})
        assert_matches(theirs(tokens, use_cache=False).logits, logits, FLOAT32, "logits")
        assert len(calls) == base.config.schedule.count("m")
        assert_matches(their_greedy(pair, tokens), replies, 0, "tokens")

    def B_and_C_exchanged(u, delta, A, B, C, **kwargs):
        return selective_scan_fn(u, delta, A, C, B, **kwargs)

    with mj.use_rung("fused"):
        check(selective_scan_fn)
    assert_rejects(check, B_and_C_exchanged)


@torch.no_grad()
def test_continuing_from_a_cache(base, record_property):
    """By several tokens, at every split. transformers 5.23 starts its recurrence anew there: recorded, not judged."""
    tokens = draw(base.config, 1, 24)
    whole = base.theirs(tokens, use_cache=False).logits

    def check(forget):
        for split in range(1, 24):
            cache = base.ours.new_cache()
            base.ours(tokens[:, :split], cache=cache)
            for layer in cache.layers:
                forget(layer)
            assert_matches(base.ours(tokens[:, split:], cache=cache), whole[:, split:], FLOAT32, f"split at {split}")

    def nothing(layer):
        pass

    def state(layer):
        if isinstance(layer, MambaState):
            layer.state.zero_()

    def window(layer):
        if isinstance(layer, MambaState):
            layer.window.zero_()

    def keys(layer):
        if isinstance(layer, KeyValues):
            layer.keys.zero_()

    check(nothing)
    assert_rejects(check, state, window, keys)

    past = base.theirs(tokens[:, :12], use_cache=True).past_key_values
    rest = base.theirs(tokens[:, 12:], past_key_values=past).logits
    error = (rest - whole[:, 12:]).abs().max() / whole.abs().max()
    record = f"transformers {transformers.__version__}, continued by 12 tokens: off by {error:.1%} of the largest logit"
    record_property("continuation", record)
    print(record)
