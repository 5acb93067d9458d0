"""Parameters, memory and FLOPs against the published figures and against models that are built."""

import dataclasses
import itertools
import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minijamba.attention import attention
from minijamba.budget import (
    COMPARED,
    available_memory,
    budget,
    compare,
    flops_per_token,
    kv_bytes,
    kv_table,
    mean_context,
    refuse_if_too_large,
    weights,
)
from minijamba.cache import Cache
from minijamba.config import PRESETS, JambaConfig, preset
from minijamba.model import Jamba
from minijamba.packed_files import kept, pack_modules
from minijamba.quantize import SCHEMES, pack
from minijamba.testing import assert_rejects

GIB, MIB = 2**30, 2**20

# Parameters in all, those that one token uses, and tensors on disk.
RELEASED = {
    "jamba-v0.1": (51_570_323_328, 12_110_311_296, 1251),
    "jamba-1.5-mini": (51_570_323_328, 12_110_311_296, 1251),
    "jamba-1.5-large": (398_555_145_696, 94_149_338_592, 2811),
    "jamba-reasoning-3b": (3_029_337_472, 3_029_337_472, 462),
    "jamba-tiny-dev": (318_688_640, 167_693_696, 435),
    "jamba-tiny-random": (127_679_344, 83_639_152, 163),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_totals(name):
    def check(config):
        plan = budget(config)
        assert (plan.total_params, plan.active_params, plan.tensors) == RELEASED[name]

    def other_top_k(config):
        return dataclasses.replace(config, num_experts=max(2, config.num_experts), num_experts_per_tok=1)

    def other_tying(config):
        return dataclasses.replace(config, tie_word_embeddings=not config.tie_word_embeddings)

    def no_conv_bias(config):
        return dataclasses.replace(config, mamba_conv_bias=False)

    check(preset(name))
    assert_rejects(lambda wrong: check(wrong(preset(name))), other_top_k, other_tying, no_conv_bias)


def test_v01_by_part():
    plan = budget(preset("jamba-v0.1"))
    assert plan.params == {
        "embedding": 268_435_456,
        "mamba": 28 * 105_308_448,
        "attention": 4 * 41_943_040,
        "mlp": 16 * 176_160_768,
        "moe": 16 * 2_818_637_824,
        "norms": 266_240,
        "head": 268_435_456,
    }
    assert plan.active == plan.params | {"moe": 16 * (2 * 176_160_768 + 16 * 4096)}


def test_share_of_the_experts():
    """The Jamba-1.5 paper, section 3.1, speaks of over 85%, and with the dense MLPs of over 90%."""
    for name, share in {"jamba-v0.1": (87.4, 92.9), "jamba-1.5-large": (87.3, 92.7)}.items():
        plan = budget(preset(name))
        moe, mlp = (100 * plan.params[part] / plan.total_params for part in ("moe", "mlp"))
        assert (round(moe, 1), round(moe + mlp, 1)) == share


def test_mamba_mixer_formula():
    """h 2d + d w + d + d (R + 2N) + R d + d + d N + d + d h + R + 2N, with d the inner channels."""
    h, d, N, R, w = 32, 96, 8, 5, 3
    config = preset("tiny", mamba_expand=3, mamba_dt_rank=R, mamba_d_conv=w)
    one = h * 2 * d + d * w + d + d * (R + 2 * N) + R * d + d + d * N + d + d * h + R + 2 * N
    assert budget(config).params["mamba"] == 7 * one


# Built models as the judge

VARIANTS = {
    "no experts": {"num_experts": 1},
    "tied": {"tie_word_embeddings": True},
    "no conv bias": {"mamba_conv_bias": False},
    "projection bias": {"mamba_proj_bias": True},
    "pure mamba": {"attn_layer_period": 9, "attn_layer_offset": 8},
    "pure attention": {"attn_layer_period": 1, "attn_layer_offset": 0},
    "one part a layer": {"pattern": "m- -E A- -+"},
    "wide heads": {"head_width": 12},
    "every bias": {
        "attention_bias": True, "mlp_bias": True, "router_bias": True, "head_bias": True, "final_norm": "layer",
        "mamba_proj_bias": True,
    },
    "no inner norms": {"mamba_inner_layernorms": False},
    "odd sizes": {"hidden_size": 36, "intermediate_size": 47, "mamba_d_state": 5, "mamba_d_conv": 3},
}  # fmt: skip


def meta_model(config):
    with torch.device("meta"):
        return Jamba(config)


def released_shapes(model):
    """The model's tensors under the names on disk: stacked experts are one tensor each."""
    shapes = {}
    for name, weight in model.named_parameters():
        if ".experts." not in name:
            shapes[name] = tuple(weight.shape)
            continue
        prefix, projection = name.split(".experts.")
        projection, kind = projection.split("_")
        kind = {"proj": "weight", "bias": "bias"}[kind]
        for expert in range(len(weight)):
            shapes[f"{prefix}.experts.{expert}.{projection}_proj.{kind}"] = tuple(weight.shape[1:])
    return shapes


@pytest.mark.parametrize("name", ["jamba-v0.1", "jamba-reasoning-3b", "tiny", "tour"])
def test_names_and_shapes_of_a_built_model(name):
    config = preset(name)
    assert {weight.name: weight.shape for weight in weights(config)} == released_shapes(meta_model(config))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_names_and_shapes_of_variants(changes):
    config = preset("tiny", **changes)
    assert {weight.name: weight.shape for weight in weights(config)} == released_shapes(meta_model(config))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_weight_bytes_of_a_built_model(dtype):
    """In half precision A_log and delta's bias stay float32, which parameters times two bytes would miss."""
    model = meta_model(preset("tiny")).to(getattr(torch, dtype))
    built = sum(weight.nbytes for weight in model.parameters())
    plan = budget(preset("tiny"), dtype=dtype)
    assert plan.weight_bytes == built
    assert (plan.file_bytes == built) == (dtype != "bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_cache_bytes_of_a_built_cache(dtype):
    cache = Cache(preset("tiny"), batch=3, capacity=100, dtype=getattr(torch, dtype))
    tensors = [tensor for layer in cache.layers for tensor in vars(layer).values()]
    plan = budget(preset("tiny"), context=100, batch=3, dtype=dtype)
    assert plan.kv_bytes + plan.state_bytes == sum(tensor.nbytes for tensor in tensors)


# Caches


def test_kv_column_of_table_1():
    """LLAMA-2 7B, Mistral, Mixtral and Jamba at 256K tokens in 16 bits: 128, 32, 32 and 4 "GB", which are GiB."""

    def check(kv):
        shapes = [(32, 32, 128), (32, 8, 128), (32, 8, 128), (4, 8, 128)]
        assert [kv(*shape, 262144) / GIB for shape in shapes] == [128, 32, 32, 4]

    def keys_only(*shape):
        return kv_bytes(*shape) // 2

    def all_layers_attend(layers, *shape):
        return kv_bytes(32, *shape)

    check(kv_bytes)
    assert_rejects(check, keys_only, all_layers_attend)
    assert budget(preset("jamba-v0.1"), context=262144).kv_bytes == 4 * GIB


def test_kv_table():
    contexts = [4096, 8192, 32768, 131072, 262144]
    names = ["jamba-v0.1", "jamba-1.5-large", "jamba-reasoning-3b"]
    table = kv_table(contexts, {name: preset(name) for name in names})
    assert {name: [round(gib, 4) for gib in column] for name, column in table.items()} == {
        "Llama-2-7B": [2, 4, 16, 64, 128],
        "Llama-2-13B": [3.125, 6.25, 25, 100, 200],
        "Llama-2-70B": [1.25, 2.5, 10, 40, 80],
        "Mistral-7B": [0.5, 1, 4, 16, 32],
        "Mixtral-8x7B": [0.5, 1, 4, 16, 32],
        "jamba-v0.1": [0.0625, 0.125, 0.5, 2, 4],
        "jamba-1.5-large": [0.1406, 0.2812, 1.125, 4.5, 9],
        "jamba-reasoning-3b": [0.0039, 0.0078, 0.0312, 0.125, 0.25],
    }


def test_state_of_v01():
    plan = budget(preset("jamba-v0.1"))
    assert plan.ssm_bytes == 14 * MIB, "float32; 7 MiB would be bfloat16"
    assert plan.conv_bytes == 1.3125 * MIB
    assert budget(preset("jamba-v0.1"), context=1).state_bytes == plan.state_bytes, "it does not grow"
    assert budget(preset("jamba-v0.1"), batch=3).state_bytes == 3 * plan.state_bytes


# Activations


def peak_bytes(run):
    """The most bytes that the call holds at once beyond those held before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize(
    ("changes", "context", "chunk", "batch"),
    [
        ({}, 1024, 1024, 1),
        ({}, 512, 128, 4),
        ({"intermediate_size": 2048, "expert_layer_period": 1, "expert_layer_offset": 0}, 512, 512, 1),
        ({"intermediate_size": 2048, "num_experts": 1}, 512, 512, 1),
        ({"num_experts": 1, "attn_layer_period": 1, "attn_layer_offset": 0}, 2048, 512, 1),
        ({"pattern": "A+", "rope_theta": 1e4, "sliding_window": 300}, 2048, 512, 1),
        ({"pattern": "A+", "rope_theta": 1e4, "head_width": 48}, 1024, 512, 1),
        (
            {"pattern": "A+", "rope_theta": 1e4, "num_attention_heads": 8, "head_width": 64, "dtype": "bfloat16"},
            128, 128, 8,
        ),
        ({"pattern": "m- -E", "mamba_inner_layernorms": False, "hidden_act": "gelu"}, 1024, 1024, 1),
        ({"pattern": "m- -+", "residual_in_fp32": True, "dtype": "bfloat16"}, 1024, 1024, 1),
    ],
    ids=[
        "mamba", "batch", "moe", "mlp", "attention", "rotary, window", "wide heads", "wide heads, bfloat16",
        "BlackMamba", "float32 stream",
    ],
)  # fmt: skip
def test_activations_bound_what_a_prefill_allocates(changes, context, chunk, batch):
    config = preset("tour", **changes)
    model = Jamba(config).to(getattr(torch, config.dtype))
    tokens = torch.randint(config.vocab_size, (batch, context), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def prefill(cache):
        for piece in tokens.split(chunk, dim=1):
            model(piece, cache=cache, last_only=True)

    cache = Cache(config, batch, capacity=context, dtype=model.dtype)
    measured = peak_bytes(lambda: prefill(cache))

    def check(bound):
        # Five times: a bound may take a kernel for costlier than it is, but it must be of use.
        assert measured <= bound <= 5 * measured

    plan = budget(config, context=context, batch=batch, chunk=chunk)
    check(plan.activation_bytes)
    assert_rejects(check, plan.activation_bytes // 10, plan.activation_bytes * 10)


# Packed weights


def test_experts_in_int8():
    """With the experts alone in int8 54.1 GiB for v0.1 and 449 GB for 1.5-Large; 103,140,646,656 bytes in 16 bits."""

    def experts_alone(name):
        plain, plan = budget(preset(name)), budget(preset(name), quantize="int8")
        return plain.weight_bytes - plain.part_bytes["moe"] + plan.part_bytes["moe"]

    assert round(experts_alone("jamba-v0.1") / GIB, 1) == 54.1
    assert round(experts_alone("jamba-1.5-large") / 1e9) == 449
    assert budget(preset("jamba-v0.1"), quantize="int8").file_bytes == 103_140_646_656


def test_v01_packed():
    """A byte a weight and 4 bytes a row for experts and MLPs; half a byte and 2 bytes for 64 weights; the rest in 16
    bits, A_log and delta's bias in 32."""
    config = preset("jamba-v0.1")
    rows, weights_, groups = 16 * 17 * (2 * 14336 + 4096), 16 * 17 * 3 * 14336 * 4096, 16 * 17 * 3 * 14336 * 4096 // 64
    rest = 2 * (51_570_323_328 - weights_) + 2 * 28 * 8192 * (16 + 1)

    def check(sizes):
        assert sizes["int8"] == weights_ + 4 * rows + rest
        assert sizes["int4"] == weights_ // 2 + 2 * groups + rest

    sizes = {name: budget(config, quantize=name).weight_bytes for name in SCHEMES}
    check(sizes)
    assert_rejects(check, {name: sizes[f"{name}-all"] for name in ("int8", "int4")}, sizes | {"int8": sizes["int4"]})
    assert sizes["int4-all"] < sizes["int4"] < 31 * GIB < 48 * GIB < sizes["int8-all"] < sizes["int8"] < 52 * GIB


PARTS_BY_NAME = {
    "embedding": "embed_tokens", "norms": r"(input|pre_ff|final)_layernorm", "head": "lm_head", "mamba": r"\.mamba\.",
    "attention": "self_attn", "moe": r"feed_forward\.(experts|router)", "mlp": "feed_forward",
}  # fmt: skip


def packed_model(config, quantize, dtype="bfloat16"):
    """A model whose weights are packed, of random numbers."""
    model = Jamba(config).to(getattr(torch, dtype))
    weights_ = {name: model.get_parameter(name) for name, tensor in kept(config, quantize).items() if tensor.bits}
    pack_modules(model, quantize, model.dtype)
    for name, weight in weights_.items():
        held = model.get_submodule(name)
        packed = pack(weight, held.packed().bits)
        held.values.copy_(packed.values)
        held.scales.copy_(packed.scales)
    return model


@pytest.mark.parametrize("quantize", SCHEMES)
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_bytes_of_a_packed_model(changes, quantize):
    """Parameters and buffers, part by part: nothing else takes memory."""
    config = preset("tiny", **changes, dtype="bfloat16")
    model = packed_model(config, quantize)
    built = dict.fromkeys(PARTS_BY_NAME, 0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        built[next(part for part, pattern in PARTS_BY_NAME.items() if re.search(pattern, name))] += tensor.nbytes

    def check(scheme):
        assert budget(config, quantize=scheme).part_bytes == built

    check(quantize)
    assert_rejects(check, None, *(other for other in SCHEMES if other.partition("-")[0] != quantize.partition("-")[0]))


@pytest.mark.parametrize("quantize", SCHEMES)
def test_biases_are_not_quantised(quantize):
    config = preset("tiny")
    extra = budget(dataclasses.replace(config, mlp_bias=True), quantize=quantize).part_bytes
    plain = budget(config, quantize=quantize).part_bytes
    assert extra["moe"] - plain["moe"] == 4 * 4 * (48 + 48 + 32) * 4  # float32
    assert extra["mlp"] - plain["mlp"] == 4 * (48 + 48 + 32) * 4


def test_kernels_take_a_mask_where_rows_differ_or_a_window_ends():
    config = preset("mistral-7b")
    plan = {"context": 32768, "dtype": "bfloat16", "chunk": 1024}

    def check(mask, **options):
        free = budget(dataclasses.replace(config, sliding_window=None), kernels=True, **plan).activation_bytes
        masked = budget(config, kernels=True, **plan, **options).activation_bytes
        assert masked - free == mask

    values = 1024 * 32768 * (1 + 2) - 1024 * 2 * 4096 * 4
    check(values)
    check(values, ragged=True)
    config = dataclasses.replace(config, sliding_window=None)
    check(values, ragged=True)
    check(0)
    assert_rejects(lambda mask: check(mask, ragged=True), 0)


@pytest.mark.parametrize(("width", "heads"), [(4000, 40), (4096, 32), (4096, 16)])
def test_kernels_take_a_mask_for_heads_of_unusual_widths(width, heads):
    """100, 128 and 256 numbers a head."""
    config = preset("mistral-7b", sliding_window=None, hidden_size=width, num_attention_heads=heads)
    plan = {"context": 32768, "dtype": "bfloat16", "chunk": 1024, "kernels": True}

    def check(usual):
        same = budget(config, **plan).activation_bytes == budget(config, ragged=True, **plan).activation_bytes
        assert same != usual

    check(heads == 32)
    assert_rejects(check, heads != 32)


def test_int4_groups_of_64_in_blocks_of_256():
    config = preset("tiny", hidden_size=128, intermediate_size=260)
    gate_row, down_row = 256 // 2 + 2 * 4, 512 // 2 + 2 * 8
    expert = 2 * 260 * gate_row + 128 * down_row
    assert budget(config, quantize="int4").part_bytes["moe"] == 4 * 4 * (expert + 4 * 128)
    assert budget(config, quantize="int4").part_bytes["mlp"] == 4 * expert


@pytest.mark.parametrize("quantize", ["int8", "int4-all"])
@pytest.mark.parametrize("experts", [1, 4])
def test_activations_bound_what_a_prefill_of_packed_weights_allocates(quantize, experts):
    """The matrices are large and the tokens few, so that unpacking is most of it."""
    config = preset("tiny", hidden_size=256, intermediate_size=8192, num_experts=experts, num_hidden_layers=4)
    model = packed_model(config, quantize, "float32")
    tokens = torch.zeros(1, 32, dtype=torch.long)
    cache = Cache(config, 1, capacity=32, dtype=model.dtype)
    with torch.no_grad():
        measured = peak_bytes(lambda: model(tokens, cache=cache, last_only=True))

    def check(scheme):
        assert measured <= budget(config, context=32, quantize=scheme).activation_bytes <= 5 * measured

    check(quantize)
    assert_rejects(check, None)


# FLOPs


def test_flops_worked_by_hand():
    """One token, 10 keys: d 32, h p 32, g p 16, f 48, c 64, n 8, r 2, w 4, v 128, k 2 of e 4."""
    d, f, c, n, r, w = 32, 48, 64, 8, 2, 4
    mamba = 2 * (d * 2 * c + c * (r + 2 * n) + r * c + c * d) + c * (7 * n + 4 + 2 * w)
    attention = 2 * (d * 32 + 2 * d * 16 + 32 * d) + 4 * d * 10
    mlp, moe = 2 * 3 * d * f, 2 * (2 * 3 * d * f + 4 * d)
    assert flops_per_token(preset("tiny"), 10) == 7 * mamba + attention + 4 * mlp + 4 * moe + 2 * 128 * d


def test_flops_of_a_window():
    """A token sees no more than its window, and a sequence the mean over its tokens."""
    config = preset("tiny", sliding_window=4, head_width=12)
    free = dataclasses.replace(config, sliding_window=None)
    assert flops_per_token(config, 9) == flops_per_token(free, 4) == flops_per_token(free, 0) + 4 * 4 * 4 * 12
    plan = budget(config, context=9)
    assert plan.flops_per_token == flops_per_token(free, 4)
    exact = sum(flops_per_token(config, seen) for seen in range(1, 10)) / 9
    assert math.isclose(plan.training_flops_per_token, 3 * exact, rel_tol=1e-12)
    assert math.isclose(mean_context(config, 9), (1 + 2 + 3 + 6 * 4) / 9)


def test_comparison_of_all_families():
    """Table 1 of the Jamba paper, in its units: 52B and 12B, a cache of 4 GiB, where Mixtral has 32."""
    lines = {line[:16].strip(): line[16:].split() for line in compare().splitlines()}

    def check(rows):
        assert rows["Jamba-v0.1"][1:5] == ["51,570,323,328", "12,110,311,296", "4.00", "GiB"]
        assert rows["Mixtral-8x7B"][1:5] == ["46,702,792,704", "12,879,925,248", "32.00", "GiB"]
        assert rows["Llama-2-7B"][3] == "128.00" and rows["BlackMamba-2.8B"][3] == "-"

    check(lines)
    assert_rejects(check, lines | {"Jamba-v0.1": lines["Mixtral-8x7B"]})
    half = {line[:16].strip(): line[16:].split() for line in compare(context=131072).splitlines()}
    assert half["Jamba-v0.1"][3] == "2.00" and list(half)[2:] == list(COMPARED)


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"num_experts": 1}, {"tie_word_embeddings": True}, {"head_width": 12}, {"pattern": "m- -E A- -+"},
        {"mlp_bias": True, "router_bias": True, "attention_bias": True, "head_bias": True, "final_norm": "layer"},
    ],
    ids=str,
)  # fmt: skip
def test_matrix_products_against_torch(changes, monkeypatch):
    """torch's counter sees the products and the convolution of a run; scan and attention are checked apart."""
    monkeypatch.setattr("minijamba.mamba.selective_scan", lambda x, *_, state=None, **__: (x, state))
    monkeypatch.setattr("minijamba.attention.attention", lambda q, k, v, visible: q)
    config, steps = preset("tiny", **changes), 12

    def check(flops):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            Jamba(config)(torch.zeros(1, steps, dtype=torch.long))
        assert counter.get_total_flops() == steps * (flops(config) - scan_flops(config))

    def without_head(config):
        return flops_per_token(config, 0) - 2 * config.vocab_size * config.hidden_size

    def embedding_as_product(config):
        return flops_per_token(config, 0) + 2 * config.vocab_size * config.hidden_size

    check(lambda config: flops_per_token(config, 0))
    assert_rejects(check, without_head, embedding_as_product)


def scan_flops(config):
    mamba = sum(layer.mixer == "mamba" for layer in config.layers)
    return mamba * config.d_inner * (7 * config.mamba_d_state + 4)


def test_attention_against_torch():
    """4 d context a token and attention layer; without a mask every query meets every key."""
    config, steps = preset("tiny"), 12
    q, k = torch.randn(1, steps, 4, 8), torch.randn(1, steps, 2, 8)
    with FlopCounterMode(display=False) as counter:
        attention(q, k, k, rung="naive")
    assert counter.get_total_flops() == steps * (flops_per_token(config, steps) - flops_per_token(config, 0))


def test_training_costs_three_forward_passes_at_the_mean_context():
    plan = budget(preset("tiny"), context=9)
    exact = sum(flops_per_token(plan.config, seen) for seen in range(1, 10)) / 9
    assert plan.training_flops_per_token == 3 * exact
    assert plan.flops_per_token == flops_per_token(plan.config, 9)


# The whole budget


def test_total_is_the_sum_of_its_parts():
    plan = budget(preset("jamba-v0.1"), context=140_000, quantize="int8")
    assert plan.total_bytes == sum(plan.memory().values()) == plan.weight_bytes + plan.working_bytes
    assert plan.fits(plan.total_bytes) and not plan.fits(plan.total_bytes - 1)


@pytest.mark.parametrize("quantize", [None, *SCHEMES])
def test_max_context_is_the_last_that_fits(quantize):
    plan = budget(preset("jamba-v0.1"), quantize=quantize)
    longest = plan.max_context(120 * GIB)
    assert dataclasses.replace(plan, context=longest).fits(120 * GIB)
    assert not dataclasses.replace(plan, context=longest + 1).fits(120 * GIB)


def test_max_context_at_the_ends():
    assert budget(preset("jamba-v0.1")).max_context(80 * GIB) == 0, "the weights alone are 96 GiB"
    pure_mamba = preset("tiny", attn_layer_period=9, attn_layer_offset=8)
    assert budget(pure_mamba).max_context(GIB) == math.inf


def test_the_claims_of_the_paper_about_one_80_gib_gpu():
    v01 = preset("jamba-v0.1")
    assert not budget(v01, context=1).fits(80 * GIB)
    assert budget(v01, context=140_000, quantize="int8").fits(80 * GIB)


def test_table():
    text = str(budget(preset("jamba-v0.1"), context=262144, quantize="int8"))
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert text.startswith("bfloat16, weights in int8, context 262,144, batch 1")
    assert "51,570,323,328" in rows["weights"] and "12,110,311,296" in rows["weights"]
    assert rows["KV cache"].endswith("4.00 GiB") and rows["Mamba state"].endswith("15.31 MiB")
    assert "1,251 tensors" in text and max(map(len, text.splitlines())) <= 120


def test_table_does_not_claim_to_quantise_what_is_not_there():
    assert "int8" not in str(budget(preset("mamba-130m"), quantize="int8"))
    assert "weights in int8-all" in str(budget(preset("mamba-130m"), quantize="int8-all"))
    assert "weights in int8" in str(budget(preset("jamba-reasoning-3b"), quantize="int8"))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_prints(name):
    assert f"{budget(preset(name)).total_params:,}" in str(budget(preset(name)))


def test_draw(tmp_path):
    file = tmp_path / "budget.png"
    figure = budget(preset("jamba-v0.1"), quantize="int8").draw(80, file)
    assert file.read_bytes().startswith(b"\x89PNG")
    assert "80 GiB" in figure.axes[0].get_title(loc="left")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 0}, "context is 0.*at least 1"),
        ({"context": 1e6}, "context is 1000000.0.*whole number"),
        ({"batch": -1}, "batch is -1"),
        ({"chunk": 0}, "chunk is 0"),
        ({"quantize": "int2"}, "quantize is 'int2'.*None or one of int8, int4, int8-all, int4-all"),
        ({"dtype": "int8"}, "dtype is 'int8'.*bfloat16"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        budget(preset("tiny"), **arguments)


def test_dtype_by_name_or_by_torch():
    assert budget(preset("tiny"), dtype=torch.bfloat16) == budget(preset("tiny"), dtype="bfloat16")
    assert budget(JambaConfig()).dtype == "bfloat16"


# Refusing before allocating


def test_available_memory_is_that_of_the_machine():
    import psutil

    assert 0 < available_memory("cpu") <= psutil.virtual_memory().total


def test_refusal(monkeypatch):
    monkeypatch.setitem(refuse_if_too_large.__globals__, "available_memory", lambda device: 3 * GIB)
    refuse_if_too_large(3 * GIB, "cpu", "a context of 10 tokens")
    refuse_if_too_large(2**60, "meta", "nothing is held on meta")
    with pytest.raises(ValueError, match="a context of 10 tokens needs 5.00 GiB, but cpu has 3.00 GiB free: use"):
        refuse_if_too_large(5 * GIB, "cpu", "a context of 10 tokens")


def test_gpu_memory_is_asked_of_the_gpu(monkeypatch):
    """What is free there or reserved by this process and not in use, and no more than the process may take."""

    def check(answer):
        def gpu(device, **facts):
            facts |= {"memory_reserved": 30, "memory_allocated": 20}
            # Not all of torch's take "cuda" without a number; the fraction's does not.
            asked = {name: lambda index, fact=fact: {7: fact}[index] for name, fact in facts.items()}
            monkeypatch.setattr(torch, "cuda", SimpleNamespace(**asked, current_device=lambda: 7))
            return available_memory(device)

        for device in ("cuda", "cuda:7", torch.device("cuda")):
            assert gpu(device, mem_get_info=(40, 100), get_per_process_memory_fraction=1.0) == answer
            assert gpu(device, mem_get_info=(70, 100), get_per_process_memory_fraction=0.5) == 50 - 20

    check(40 + 30 - 20)
    assert_rejects(check, 40, 50 - 30)
