"""Equal to transformers' Mixtral, Mistral, Llama and Mamba, on tiny random checkpoints that transformers wrote."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import transformers
from judging import gradients, in_our_names, same_routing
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import minijamba as mj
from minijamba import attention, checkpoint, cli
from minijamba.attention import Attention
from minijamba.cache import KeyValues, MambaState
from minijamba.families import FAMILIES
from minijamba.testing import assert_matches, assert_rejects

# Both run in float32 and add the same numbers in another order: a few units in the last place (6e-8) for each of the
# some twenty operations that a value passes through.
FLOAT32 = 1e-5
NEW = 10  # tokens that greedy generation adds

TRANSFORMER = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
MAMBA = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "state_size": 6, "time_step_rank": 5}
BASES = {
    "mixtral": TRANSFORMER | {"num_local_experts": 4},
    "mistral": TRANSFORMER,
    "llama": TRANSFORMER,
    "mamba": MAMBA,
}
MODELS = {name: getattr(transformers, f"{name.capitalize()}ForCausalLM") for name in BASES}
# "eager" is the code of their model files; their grouped product of experts refuses odd widths.
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}

ODD = {
    "vocab_size": 53, "hidden_size": 30, "intermediate_size": 37, "num_hidden_layers": 3, "num_attention_heads": 3,
    "num_key_value_heads": 1,
}  # fmt: skip
GRID = {
    "mixtral": {},
    "mixtral, odd widths": ODD | {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 3},
    "mixtral, 1 KV head": {"num_key_value_heads": 1},
    "mixtral, a KV head for each query head": {"num_key_value_heads": 4},
    "mixtral, wide heads": {"head_dim": 14},
    "mixtral, tied": {"tie_word_embeddings": True},
    "mixtral, other theta": {"rope_theta": 150.0},
    "mixtral, window 1": {"sliding_window": 1},
    "mixtral, window 3": {"sliding_window": 3},
    "mixtral, window beyond the text": {"sliding_window": 64},
    "mixtral, 3 experts, top 1": {"num_local_experts": 3, "num_experts_per_tok": 1},
    "mixtral, 3 experts, top 3": {"num_local_experts": 3, "num_experts_per_tok": 3},
    "mixtral, 5 experts, top 2": {"num_local_experts": 5},
    "mixtral, 8 experts, top 1": {"num_local_experts": 8, "num_experts_per_tok": 1},
    "mixtral, 8 experts, top 3": {"num_local_experts": 8, "num_experts_per_tok": 3},
    "mixtral, gelu": {"hidden_act": "gelu"},
    "mixtral, other epsilon": {"rms_norm_eps": 1e-3},
    "mistral, no window": {"sliding_window": None},
    "mistral, odd widths": ODD | {"sliding_window": 4},
    "mistral, 1 KV head": {"num_key_value_heads": 1, "sliding_window": None},
    "mistral, a KV head for each query head": {"num_key_value_heads": 4, "sliding_window": 6},
    "mistral, narrow heads": {"head_dim": 6, "sliding_window": 5},
    "mistral, tied": {"tie_word_embeddings": True},
    "mistral, other theta": {"rope_theta": 150.0},
    "mistral, window 1": {"sliding_window": 1},
    "mistral, window 2": {"sliding_window": 2},
    "mistral, window 3": {"sliding_window": 3},
    "mistral, window 7": {"sliding_window": 7},
    "mistral, window beyond the text": {"sliding_window": 64},
    "mistral, gelu": {"hidden_act": "gelu"},
    "llama": {},
    "llama, odd widths": ODD | {"attention_bias": True, "mlp_bias": True},
    "llama, 1 KV head": {"num_key_value_heads": 1},
    "llama, as many KV heads as query heads": {"num_key_value_heads": None},
    "llama, wide heads": {"head_dim": 14},
    "llama, heads of 2": {"num_attention_heads": 16},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, other theta": {"rope_theta": 5e5},
    "llama, attention bias": {"attention_bias": True},
    "llama, MLP bias": {"mlp_bias": True},
    "llama, gelu": {"hidden_act": "gelu"},
    "llama, no padding token": {"pad_token_id": None, "eos_token_id": None},
    "mamba": {},
    "mamba, odd widths": {
        "vocab_size": 53, "hidden_size": 15, "state_size": 5, "conv_kernel": 3, "expand": 3, "time_step_rank": 7,
    },
    "mamba, projection bias": {"use_bias": True},
    "mamba, no convolution bias": {"use_conv_bias": False},
    "mamba, both changed": {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False},
    "mamba, 2 taps": {"conv_kernel": 2},
    "mamba, 7 taps": {"conv_kernel": 7},
    "mamba, 1 state": {"state_size": 1},
    "mamba, not widened": {"expand": 1},
    "mamba, rank 1": {"time_step_rank": 1},
    "mamba, usual rank": {"time_step_rank": "auto"},
    "mamba, untied": {"tie_word_embeddings": False},
    "mamba, other epsilon": {"layer_norm_epsilon": 1e-3},
    "mamba, stream of the model's width": {"residual_in_fp32": False},
}  # fmt: skip
# What the wrong variants are judged on: every feature that one of them spoils is on.
JUDGES = {
    "mixtral": {"sliding_window": 5, "num_local_experts": 5},
    "mistral": {"sliding_window": 5},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mamba": {"use_bias": True},
}


@dataclass
class Pair:
    family: str
    theirs: PreTrainedModel
    ours: mj.Jamba
    folder: Path  # what theirs wrote

    @property
    def config(self) -> mj.JambaConfig:
        return self.ours.config


@pytest.fixture(scope="module")
def make_pair(randomise, tmp_path_factory):
    """A function: a family and changes to its base -> their model, and ours loaded from the checkpoint it wrote."""

    @torch.no_grad()
    def make(family: str, dtype: torch.dtype = torch.float32, **changes) -> Pair:
        values = BASES[family] | changes
        theirs = randomise(MODELS[family](MODELS[family].config_class(**values, **EAGER)))
        for name, parameter in theirs.named_parameters():
            if name.endswith("x_proj.weight"):
                # B and C, so that the state says as much as the skip D x.
                parameter[theirs.config.time_step_rank :] *= 4
        folder = tmp_path_factory.mktemp("checkpoint")
        theirs.to(dtype).save_pretrained(folder)
        if dtype != torch.float32:
            theirs = load_in_transformers(folder)  # with the rates of the rotation in float32 again
        return Pair(family, theirs, mj.load(folder, device="cpu"), folder)

    return make


@pytest.fixture(scope="module", params=GRID)
def pair(request, make_pair) -> Pair:
    return make_pair(request.param.split(",")[0], **GRID[request.param])


@pytest.fixture(scope="module")
def judge_of(make_pair) -> Callable[[str], Pair]:
    made = {}

    def get(family: str) -> Pair:
        if family not in made:
            made[family] = make_pair(family, **JUDGES[family])
        return made[family]

    return get


def draw(config: mj.JambaConfig, *shape: int) -> Tensor:
    """Random tokens without 0: transformers gives the embedding of the padding token no gradient."""
    return torch.randint(1, config.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def left_padded(config: mj.JambaConfig) -> tuple[Tensor, Tensor]:
    """Rows of 11, 6 and 1 real tokens, and their mask."""
    mask = torch.arange(11) >= 11 - torch.tensor([11, 6, 1])[:, None]
    return draw(config, 3, 11).masked_fill(~mask, 0), mask


@torch.no_grad()
def their_logits(pair: Pair, tokens: Tensor, **options) -> Tensor:
    return pair.theirs(tokens, use_cache=False, **options).logits


def their_greedy(pair: Pair, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    # transformers 5.24 keeps all tokens in the cache of a window of 1, and then fails on its own mask.
    cached = pair.config.sliding_window != 1
    mask = torch.ones_like(tokens) if mask is None else mask.long()
    whole = pair.theirs.generate(tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False, use_cache=cached)
    return whole[:, tokens.shape[1] :]


# Checks: each takes a pair, raises AssertionError where ours gives something else, and must reject wrong variants.


@torch.no_grad()
def same_values(pair: Pair) -> None:
    """Logits, the router's logits and every layer's hidden state."""
    tokens, trace = draw(pair.config, 2, 19), mj.Trace()
    routed = {"output_router_logits": True} if "E" in pair.config.schedule else {}
    logits = pair.ours(tokens, trace=trace)
    theirs = pair.theirs(tokens, use_cache=False, output_hidden_states=True, **routed)
    # Their last hidden state has already passed the last norm; their Mamba leaves the embeddings out.
    hidden = [*trace.hidden[:-1], pair.ours.model.final_layernorm(trace.hidden[-1])]
    if pair.family == "mamba":
        assert_matches(theirs.hidden_states[-2], trace.hidden[-1], FLOAT32, "last layer")
        hidden = [*trace.hidden[1:], hidden[-1]]
    assert_matches(hidden, theirs.hidden_states, FLOAT32, "hidden state")
    assert_matches(logits, theirs.logits, FLOAT32, "logits")
    if routed:
        same_routing(trace, theirs, pair.config.num_experts_per_tok, FLOAT32)


# Part of their name in memory -> part of ours; written out, so that it judges the table that loading uses.
THEIR_NAMES = {
    "model.norm.": "model.final_layernorm.",
    "backbone.embeddings": "model.embed_tokens",
    "backbone.layers": "model.layers",
    "backbone.norm_f": "model.final_layernorm",
    ".mixer.": ".mamba.",
    ".norm.": ".input_layernorm.",
    "post_attention_layernorm": "pre_ff_layernorm",
    "mlp.gate.": "feed_forward.router.",
    "mlp.": "feed_forward.",
}


def same_gradients(pair: Pair) -> None:
    tokens = draw(pair.config, 2, 13)
    ours = gradients(pair.ours, pair.ours(tokens), tokens)
    theirs = gradients(pair.theirs, pair.theirs(tokens, use_cache=False).logits, tokens)
    theirs = in_our_names(theirs, THEIR_NAMES)
    if pair.config.norm_topk_prob and pair.config.num_experts_per_tok == 1:
        # The one weight is divided by itself: nothing reaches the router but rounding.
        largest = max(gradient.abs().max() for gradient in theirs.values())
        for name in [name for name in theirs if "router" in name]:
            assert max(found.pop(name).abs().max() for found in (ours, theirs)) < FLOAT32 * largest
    assert_matches(ours, theirs, FLOAT32, "gradient")


@torch.no_grad()
def same_from_a_cache(pair: Pair) -> None:
    """A text in two pieces, at every split, and token by token."""
    tokens = draw(pair.config, 2, 9)
    whole = their_logits(pair, tokens)
    for sizes in [*([split, 9 - split] for split in range(1, 9)), [1] * 9, [3, 3, 3]]:
        cache = pair.ours.new_cache(2)
        logits = torch.cat([pair.ours(piece, cache=cache) for piece in tokens.split(sizes, dim=1)], dim=1)
        assert_matches(logits, whole, FLOAT32, f"logits of pieces of {sizes}")


def same_greedy(pair: Pair) -> None:
    tokens = draw(pair.config, 4, 5)
    assert_matches(mj.generate(pair.ours, tokens, max_new_tokens=NEW), their_greedy(pair, tokens), 0, "tokens")


@torch.no_grad()
def same_padded_rows(pair: Pair) -> None:
    """Padded on the left and padded anywhere, whole and from a cache: each row as theirs gives it alone."""
    tokens, mask = left_padded(pair.config)
    replies = mj.generate(pair.ours, tokens, mask=mask, max_new_tokens=NEW, chunk=4)
    for row, real, reply in zip(tokens, mask, replies, strict=True):
        expected = their_greedy(pair, row[real][None])[0]
        assert_matches(reply[: len(expected)], expected, 0, "tokens of a padded row")
    anywhere = torch.rand(mask.shape, generator=torch.Generator().manual_seed(2)) < 0.6
    for name, real in {"left": mask, "anywhere": anywhere}.items():
        cache = pair.ours.new_cache(3)
        pieces = zip(tokens.split([4, 1, 6], dim=1), real.split([4, 1, 6], dim=1), strict=True)
        found = {
            "whole": pair.ours(tokens, mask=real),
            "in pieces": torch.cat([pair.ours(piece, cache=cache, mask=here) for piece, here in pieces], dim=1),
        }
        for i, row in enumerate(tokens):
            expected = their_logits(pair, row[real[i]][None])[0]
            for how, logits in found.items():
                assert_matches(logits[i][real[i]], expected, FLOAT32, f"logits of row {i}, padded {name}, {how}")


# Lengths of the documents of each row.
DOCUMENTS = [[4, 1, 6], [7, 4]]


@torch.no_grad()
def same_packed_documents(pair: Pair) -> None:
    """Documents side by side, whole and in two calls at every split: each as theirs gives it alone."""
    tokens = draw(pair.config, 2, 11)
    segments = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in DOCUMENTS])
    expected = torch.stack(
        [
            torch.cat([their_logits(pair, document[None])[0] for document in row.split(lengths)])
            for row, lengths in zip(tokens, DOCUMENTS, strict=True)
        ]
    )
    assert_matches(pair.ours(tokens, segments=segments), expected, FLOAT32, "logits")
    for split in range(1, 11):
        cache = pair.ours.new_cache(2)
        first = pair.ours(tokens[:, :split], cache=cache, segments=segments[:, :split])
        rest = pair.ours(tokens[:, split:], cache=cache, segments=segments[:, split:])
        assert_matches(torch.cat([first, rest], dim=1), expected, FLOAT32, f"logits of a split at {split}")


CHECKS = [same_values, same_gradients, same_from_a_cache, same_greedy, same_padded_rows, same_packed_documents]


@pytest.mark.parametrize("check", CHECKS)
def test_equal(pair, check):
    check(pair)


def test_naive_rungs_are_equal(pair):
    with mj.use_rung("naive"):
        same_values(pair)
        same_from_a_cache(pair)


# Under a projection bias their padding is no longer zero where it enters the convolution, and changes the row.
WITH_PROJECTION_BIAS = {"mamba, projection bias", "mamba, both changed"}


@pytest.mark.parametrize("pair", [name for name in GRID if name not in WITH_PROJECTION_BIAS], indirect=True)
def test_equal_to_their_padded_batch(pair):
    tokens, mask = left_padded(pair.config)
    theirs = their_logits(pair, tokens, attention_mask=mask.long())
    assert_matches(pair.ours(tokens, mask=mask)[mask], theirs[mask], FLOAT32, "logits")
    replies = mj.generate(pair.ours, tokens, mask=mask, max_new_tokens=NEW)
    if pair.config.pad_token_id is not None:
        assert_matches(replies, their_greedy(pair, tokens, mask), 0, "tokens")


def test_the_grid_is_what_its_ids_say(pair, request):
    family = request.node.callspec.params["pair"].split(",")[0]
    assert pair.config.family == FAMILIES[family]
    code = {"mixtral": "AE", "mistral": "A+", "llama": "A+", "mamba": "m-"}[family]
    assert set(pair.config.schedule.split()) == {code}


@pytest.mark.parametrize("pair", [name for name in GRID if name.startswith("mixtral")], indirect=True)
def test_no_router_is_near_a_tie(pair):
    """Else two experts could change places within the tolerance, and equality would be luck."""
    trace, k = mj.Trace(), pair.config.num_experts_per_tok
    pair.ours(draw(pair.config, 2, 19), trace=trace)
    for logits in trace.router if k < pair.config.num_experts else ():
        ranked = logits.sort(descending=True).values
        assert (ranked[..., k - 1] - ranked[..., k]).min() > 2 * FLOAT32 * logits.abs().max()


# Wrong variants: each turns our model into one that a careless reading of papers or files would give.


def rebuilt(model: mj.Jamba, **changes) -> mj.Jamba:
    """The model's weights under another config; norms that it adds have weights of one."""
    new = mj.Jamba(replace(model.config, model_type=None, **changes)).to(model.dtype).eval()
    missing, extra = new.load_state_dict(model.state_dict(), strict=False)
    if extra or not all("layernorm" in name for name in missing):
        raise ValueError(f"the new config has other tensors: {missing}, {extra}")
    return new


def no_rotation(pair, patch):
    return rebuilt(pair.ours, rope_theta=None)


def rotation_of_interleaved_pairs(pair, patch):
    rotate = attention.rotate

    def interleaved(x, positions, theta):
        halves = torch.cat([x[..., ::2], x[..., 1::2]], dim=-1)
        return torch.stack(rotate(halves, positions, theta).chunk(2, dim=-1), dim=-1).flatten(-2)

    patch.setattr(attention, "rotate", interleaved)
    return pair.ours


def theta_of_another_family(pair, patch):
    return rebuilt(pair.ours, rope_theta=1e4 if pair.config.rope_theta == 1e6 else 1e6)


def keys_not_rotated(pair, patch):
    heads = Attention.heads
    patch.setattr(Attention, "heads", lambda self, *call: (heads(self, *call)[0], *plain_heads(self, *call)))

    def plain_heads(self, *call):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self, "theta", None)
            return heads(self, *call)[1:]

    return pair.ours


def window_one_longer(pair, patch):
    return rebuilt(pair.ours, sliding_window=pair.config.sliding_window + 1)


def window_one_shorter(pair, patch):
    return rebuilt(pair.ours, sliding_window=pair.config.sliding_window - 1)


def no_window(pair, patch):
    return rebuilt(pair.ours, sliding_window=None)


def another_activation(pair, patch):
    return rebuilt(pair.ours, hidden_act="gelu")


def router_not_renormalised(pair, patch):
    return rebuilt(pair.ours, norm_topk_prob=False)


@torch.no_grad()
def experts_in_another_order(pair, patch):
    model = copy.deepcopy(pair.ours)
    for layer in model.model.layers:
        for parameter in layer.feed_forward.experts.parameters():
            parameter.copy_(parameter.roll(1, dims=0))
    return model


def w1_and_w3_swapped(pair, patch):
    """Read from the file the wrong way round."""
    family = FAMILIES[pair.family]
    gate, up = (family.names.get(part, part) for part in ("gate_proj", "up_proj"))
    names = {part: name for part, name in family.names.items() if part not in ("gate_proj", "up_proj")}
    names |= {"gate_proj": "~", "up_proj": gate, "~": up}
    patch.setitem(FAMILIES, pair.family, replace(family, names=names))
    return mj.load(pair.folder, device="cpu")


def inner_norms_left_in(pair, patch):
    return rebuilt(pair.ours, mamba_inner_layernorms=True)


def changed_weights(end: str, change: Callable[[Tensor], Tensor]) -> Callable:
    @torch.no_grad()
    def spoil(pair, patch):
        model = copy.deepcopy(pair.ours)
        changed = [parameter for name, parameter in model.named_parameters() if name.endswith(end)]
        if not changed:
            raise ValueError(f"nothing is called {end}")
        for parameter in changed:
            parameter.copy_(change(parameter))
        return model

    spoil.__name__ = f"another {end}"
    return spoil


def called_without(argument: str) -> Callable:
    """A model that does not listen to one of its arguments."""

    def spoil(pair, patch):
        forward = mj.Jamba.forward
        patch.setattr(
            mj.Jamba, "forward", lambda self, tokens, **given: forward(self, tokens, **given | {argument: None})
        )
        return pair.ours

    spoil.__name__ = f"called without {argument}"
    return spoil


def positions_restart_at_each_call(pair, patch):
    heads = Attention.heads
    patch.setattr(Attention, "heads", lambda self, x, layout: heads(self, x, replace(layout, past=0, places=None)))
    return pair.ours


def forgetful(kind: type, name: str) -> Callable:
    """A model whose cache has lost something when it is continued."""

    def spoil(pair, patch):
        forward = mj.Jamba.forward

        def forgetting(self, tokens, cache=None, **options):
            for layer in cache.layers if cache is not None else ():
                getattr(layer, name).zero_()
            return forward(self, tokens, cache=cache, **options)

        patch.setattr(mj.Jamba, "forward", forgetting)
        return pair.ours

    spoil.__name__ = f"{kind.__name__} without {name}"
    return spoil


ROTARY = [no_rotation, rotation_of_interleaved_pairs, theta_of_another_family, keys_not_rotated]
WINDOW = [window_one_longer, window_one_shorter, no_window]
WRONG = {
    "mixtral": [
        *ROTARY, *WINDOW, w1_and_w3_swapped, another_activation, router_not_renormalised, experts_in_another_order,
    ],
    "mistral": [*ROTARY, *WINDOW, w1_and_w3_swapped, another_activation],
    "llama": [
        *ROTARY, w1_and_w3_swapped, another_activation, changed_weights("o_proj.bias", torch.zeros_like),
        changed_weights("down_proj.bias", torch.zeros_like),
    ],
    "mamba": [
        inner_norms_left_in,
        changed_weights("in_proj.weight", lambda weight: weight.roll(len(weight) // 2, dims=0)),
        changed_weights("conv1d.weight", lambda weight: weight.flip(-1)),
        changed_weights("out_proj.bias", torch.zeros_like),
    ],
}  # fmt: skip
LOST = {
    "mamba": [forgetful(MambaState, "state"), forgetful(MambaState, "window")],
    **dict.fromkeys(["mixtral", "mistral", "llama"], [forgetful(KeyValues, "keys"), positions_restart_at_each_call]),
}


def judged(check: Callable, pair: Pair) -> Callable:
    """The check of a model that one of the wrong variants has spoiled."""

    def judge(spoil: Callable) -> None:
        with pytest.MonkeyPatch.context() as patch:
            check(replace(pair, ours=spoil(pair, patch)))

    return judge


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("check", CHECKS)
def test_wrong_variants_are_rejected(judge_of, check, family):
    pair, wrong = judge_of(family), list(WRONG[family])
    if check is same_padded_rows:
        wrong += [called_without("mask")]
    if check is same_packed_documents:
        wrong += [called_without("segments")]
    if check in (same_from_a_cache, same_greedy, same_padded_rows, same_packed_documents):
        wrong += LOST[family]
    check(pair)
    assert_rejects(judged(check, pair), *wrong)


# Files in both directions


def load_in_transformers(folder: Path, **options) -> PreTrainedModel:
    """AutoModelForCausalLM on a folder; AssertionError if its report names any tensor."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **EAGER, **options)
    assert not any(report.values()), report
    return model.eval()


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_meaning(ours: transformers.PretrainedConfig, theirs: transformers.PretrainedConfig) -> None:
    """Every entry of theirs, but by whom it was written, and a width of heads that is only said by us."""
    found, expected = ours.to_dict(), theirs.to_dict()
    if "head_dim" in expected and expected["head_dim"] is None:
        expected["head_dim"] = theirs.hidden_size // theirs.num_attention_heads
    for name in expected.keys() - {"transformers_version", "_name_or_path"}:
        assert found[name] == expected[name], name


def loads_as(folder: Path, pair: Pair) -> PreTrainedModel:
    """What transformers loads from a folder: the pair's model, with the same logits bit for bit."""
    again, tokens = load_in_transformers(folder), draw(pair.config, 2, 9)
    assert type(again) is type(pair.theirs)
    assert_matches(their_logits(replace(pair, theirs=again), tokens), their_logits(pair, tokens), 0, "logits")
    return again


def same_files(pair: Pair, folder: Path, **options) -> None:
    """Saved by us: the tensors that theirs wrote, bit for bit, and a folder that they load as the same model."""
    mj.save(pair.ours, folder, **options)
    assert_matches(tensors(folder), tensors(pair.folder), 0, "file")
    same_meaning(loads_as(folder, pair).config, pair.theirs.config)
    assert mj.load(folder, device="cpu").config == pair.config


def test_saved_here_is_what_theirs_wrote(pair, tmp_path):
    same_files(pair, tmp_path / "ours")


@pytest.mark.parametrize("family", BASES)
def test_wrong_files_are_rejected(judge_of, tmp_path, family):
    pair = judge_of(family)

    def check(spoil):
        with pytest.MonkeyPatch.context() as patch:
            same_files(replace(pair, ours=spoil(pair, patch)), tmp_path / "ours")

    def gate_and_up_exchanged(pair, patch):
        model = w1_and_w3_swapped(pair, patch)
        patch.undo()  # else saving would exchange them back
        return model

    def another_epsilon(pair, patch):
        return rebuilt(pair.ours, rms_norm_eps=1e-3)

    def another_first_token(pair, patch):
        return rebuilt(pair.ours, bos_token_id=3)

    check(lambda pair, patch: pair.ours)
    assert_rejects(check, another_epsilon, another_first_token, changed_weights("norm.weight", lambda w: w + 1e-6))
    if family == "mamba":
        assert_rejects(check, inner_norms_left_in)
    else:
        assert_rejects(check, gate_and_up_exchanged, theta_of_another_family)


@pytest.mark.parametrize("family", BASES)
def test_converting_gives_the_same_files(judge_of, tmp_path, family, capsys):
    """From one file to shards and back, by the function and by the verb; and from their shards."""
    pair = judge_of(family)
    pair.theirs.save_pretrained(tmp_path / "shards of theirs", max_shard_size="10KB")
    checkpoint.convert(pair.folder, tmp_path / "shards", shard_bytes=10_000)
    for name in ("shards", "shards of theirs"):
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 3
        assert cli.main(["convert", str(tmp_path / name), str(tmp_path / f"{name} as one")]) == 0

    def check(folder):
        assert_matches(tensors(folder), tensors(pair.folder), 0, "file")
        again = replace(pair, theirs=load_in_transformers(folder), ours=mj.load(folder, device="cpu"))
        same_values(again)
        same_values(replace(again, theirs=pair.theirs))

    for name in ("shards", "shards as one", "shards of theirs as one"):
        check(tmp_path / name)
    mj.save(changed_weights("norm.weight", lambda weight: weight + 1e-6)(pair, None), tmp_path / "wrong")
    assert_rejects(check, tmp_path / "wrong")


@torch.no_grad()
def same_in_half_precision(pair: Pair) -> None:
    """Logits within the rounding.

    Some thirty roundings in a row by up to 2^-9 each: as a random walk, 1.1 %. We allow three times that.
    """
    tokens = draw(pair.config, 2, 19)
    logits, exact = pair.ours(tokens), copy.deepcopy(pair.ours).float()(tokens)
    assert logits.dtype == pair.theirs.dtype
    for name, reference in {"float32": exact, "theirs": their_logits(pair, tokens)}.items():
        error = (logits - reference).float().norm() / exact.norm()
        assert error < 0.03, f"{error:.3f} from {name}"


HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("family", BASES)
def test_half_precision(make_pair, tmp_path, family, dtype):
    # All experts: which of two nearly equal ones is chosen would hang on the rounding.
    changes = JUDGES[family] | ({"num_experts_per_tok": 5} if family == "mixtral" else {})
    pair = make_pair(family, dtype, **changes)
    same_in_half_precision(pair)
    mj.save(pair.ours, tmp_path / "ours")
    assert loads_as(tmp_path / "ours", pair).dtype == dtype
    ours, theirs = tensors(tmp_path / "ours"), tensors(pair.folder)
    assert_matches(ours, theirs, 0, "file")
    # The same numbers in a wider type.
    wider = {name for name in ours if ours[name].dtype != theirs[name].dtype}
    assert wider == {name for name in ours if name.endswith(("A_log", "dt_proj.bias"))}
    wrong = [spoil for spoil in WRONG[family] if spoil is not router_not_renormalised]
    assert_rejects(judged(same_in_half_precision, pair), *wrong)


@pytest.mark.parametrize("wide", [True, False], ids=["float32 stream", "bfloat16 stream"])
def test_stream_of_mamba_in_bfloat16(make_pair, wide):
    """residual_in_fp32: the stream is float32 with values that bfloat16 cannot hold, as theirs is behind each layer."""
    pair = make_pair("mamba", torch.bfloat16, residual_in_fp32=wide)
    tokens = draw(pair.config, 2, 19)

    @torch.no_grad()
    def check(model):
        trace = mj.Trace()
        logits = model(tokens, trace=trace)
        theirs = pair.theirs(tokens, use_cache=False, output_hidden_states=True).hidden_states[:-1]
        assert [h.dtype for h in trace.hidden] == [theirs[0].dtype] * (len(theirs) + 1)
        assert logits.dtype == torch.bfloat16
        for ours, reference in zip(trace.hidden[1:], theirs, strict=True):
            assert torch.equal(ours, ours.bfloat16()) == torch.equal(reference, reference.bfloat16())
            assert (ours - reference).float().norm() / reference.float().norm() < 0.01
        whole = logits
        cache = model.new_cache(2)
        parts = torch.cat([model(piece, cache=cache) for piece in tokens.split([11, 1, 7], dim=1)], dim=1)
        assert (parts - whole).float().norm() / whole.float().norm() < 0.02

    check(pair.ours)
    assert pair.ours.dtype == torch.bfloat16 and pair.ours.model.layers[0].mamba.A_log.dtype == torch.float32
    same_in_half_precision(pair)
    assert_rejects(check, rebuilt(pair.ours, residual_in_fp32=not wide))


# Files of other writers


def test_state_spaces_own_checkpoint(make_pair, tmp_path):
    """A pickle under their own names: config.json of other fields, and an embedding padded to a multiple of 8 rows."""
    pair = make_pair("mamba", vocab_size=64)
    own = {
        "d_model": 24, "n_layer": 3, "vocab_size": 61, "ssm_cfg": {"d_state": 6, "dt_rank": 5}, "rms_norm": True,
        "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8,
    }  # fmt: skip
    stored = {name.replace("embeddings", "embedding"): tensor for name, tensor in pair.theirs.state_dict().items()}
    assert {"backbone.embedding.weight", "lm_head.weight", "backbone.layers.2.mixer.A_log"} <= stored.keys()
    (tmp_path / "config.json").write_text(json.dumps(own))

    def check(changed):
        torch.save(stored | changed, tmp_path / "pytorch_model.bin")
        ours = mj.load(tmp_path, device="cpu")
        same_values(replace(pair, ours=ours))
        assert ours.config == pair.config
        checkpoint.convert(tmp_path, tmp_path.parent / "converted")
        assert_matches(tensors(tmp_path.parent / "converted"), tensors(pair.folder), 0, "file")
        loads_as(tmp_path.parent / "converted", pair)

    check({})
    conv = "backbone.layers.1.mixer.conv1d.weight"
    assert_rejects(check, {conv: stored[conv].flip(-1)})


def test_rotation_rates_stored_in_early_llamas_are_passed_over(judge_of, tmp_path):
    """The first files of Llama 2 hold the rates of the rotation in every layer, which are known from the config."""
    pair = judge_of("llama")
    pair.theirs.save_pretrained(tmp_path)
    rates = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": 1e4 ** (-torch.arange(4) / 4) for i in range(2)}
    save_file(tensors(pair.folder) | rates, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loads_as(tmp_path, pair)
    same_values(replace(pair, ours=mj.load(tmp_path, device="cpu")))
