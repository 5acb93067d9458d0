"""BlackMamba's released files: logits of a reference written from the paper and its code's description alone.

The reference below uses nothing of the package: plain products, and loops over layers, tokens and taps.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from refusals import assert_names, refusal
from safetensors.torch import load_file
from torch import Tensor

import minijamba as mj
from minijamba import checkpoint
from minijamba.testing import assert_matches, assert_rejects

# float64, sums of some dozens of terms through four layers, in another order.
FLOAT64 = 1e-10
# Odd widths, and a rank of 2: ceil(19 / 16).
CONFIG = {
    "num_layers": 4, "hidden_size": 19, "state_size": 5, "conv_dimension": 3, "vocab_size": 43, "expansion_factor": 2,
    "mamba_moe_layers": ["r", "8", "r", "8"], "ffn_hidden_size": 11, "bias": False, "add_bias_linear": False,
    "swiglu": True, "max_sequence_length": 2048,
}  # fmt: skip
LAYERS = {
    "r8r8": ["r", "8", "r", "8"],
    "r1r3": ["r", "1", "r", "3"],
    "8r1": ["8", "r", "1"],
    "rr22r": ["r", "r", "2", "2", "r"],
    "r1r": ["r", "1", "r"],
    "r": ["r"],
}
TOKENS = torch.tensor([7, 41, 0, 0, 19, 3, 7, 7, 26, 42, 11, 3, 30])


def config_of(layers: list[str], **changes) -> dict:
    return CONFIG | {"mamba_moe_layers": layers, "num_layers": len(layers)} | changes


def shapes_of(config: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of a released state dict."""
    d, v, f = config["hidden_size"], config["vocab_size"], config["ffn_hidden_size"]
    c, n, r = config["expansion_factor"] * d, config["state_size"], math.ceil(d / 16)
    mlp = {"linear_fc1.weight": (2 * f, d), "linear_fc2.weight": (d, f)}
    mamba = {
        "in_proj.weight": (2 * c, d), "conv1d.weight": (c, 1, config["conv_dimension"]), "conv1d.bias": (c,),
        "x_proj.weight": (r + 2 * n, c), "dt_proj.weight": (c, r), "dt_proj.bias": (c,), "A_log": (c, n), "D": (c,),
        "out_proj.weight": (d, c),
    }  # fmt: skip
    if config["add_bias_linear"]:
        mlp |= {"linear_fc1.bias": (2 * f,), "linear_fc2.bias": (d,)}
        mamba |= {"in_proj.bias": (2 * c,), "out_proj.bias": (d,)}
    shapes = {"embedding.word_embeddings.weight": (v, d)}
    for i, code in enumerate(config["mamba_moe_layers"]):
        mixer = mamba if code == "r" else mlp
        if code not in "r1":
            mixer = {"router.weight": (int(code), d), "router.bias": (int(code),)}
            mixer |= {f"local_experts.{e}.{name}": shape for e in range(int(code)) for name, shape in mlp.items()}
        shapes[f"decoder.layers.{i}.norm.weight"] = (d,)
        shapes |= {f"decoder.layers.{i}.mixer.{name}": shape for name, shape in mixer.items()}
    shapes |= {"decoder.final_layernorm.weight": (d,), "decoder.final_layernorm.bias": (d,)}
    return shapes | ({"output_layer.bias": (v,)} if config["add_bias_linear"] else {})


def random_state(config: dict, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights that hide no bug: a memory of a hundred tokens, and nothing at its usual start."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        if name.endswith("A_log"):
            return torch.arange(1.0, shape[1] + 1).log() + 0.1 * noise
        if name.endswith(("norm.weight", ".D")):
            return 1 + 0.2 * noise
        if name.endswith("dt_proj.bias"):
            return -4.6 + 0.3 * noise
        if name.endswith("bias"):
            return 0.3 * noise
        return noise if "embedding" in name else noise * shape[-1] ** -0.5

    return {name: draw(name, shape).to(dtype) for name, shape in shapes_of(config).items()}


def write(folder: Path, config: dict, state: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"model": state}, folder / "pytorch_model.bin")
    return folder


# The reference


def rms(x: Tensor, weight: Tensor | float, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean() + eps)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


GATES = {
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": silu,
}


def reference(
    config: dict, state: dict[str, Tensor], tokens: Tensor, *,
    gate: str = "gelu", up_first: bool = False, score: str | None = None, weighted: bool = True, last: str = "layer",
    inner_norms: bool = False, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Logits (t, v) of one text, in float64. Every argument after `tokens` makes it another model."""
    state = {name: tensor.double() for name, tensor in state.items()}
    d, n, rank = config["hidden_size"], config["state_size"], math.ceil(config["hidden_size"] / 16)
    inner = config["expansion_factor"] * d
    score = score or {"sinkhorn": "sigmoid", "top1": "softmax"}[config.get("routing_mode", "sinkhorn")]

    def linear(name: str, x: Tensor) -> Tensor:
        y = state[f"{name}.weight"] @ x
        return y + state[f"{name}.bias"] if f"{name}.bias" in state else y

    def mlp(name: str, x: Tensor) -> Tensor:
        rows = linear(f"{name}.linear_fc1", x)
        half = len(rows) // 2
        first, second = rows[:half], rows[half:]
        product = first * GATES[gate](second) if up_first else GATES[gate](first) * second
        return linear(f"{name}.linear_fc2", product)

    def mixture(name: str, x: Tensor) -> Tensor:
        logits = linear(f"{name}.router", x)
        exp = torch.exp(logits)
        scores = 1 / (1 + torch.exp(-logits)) if score == "sigmoid" else exp / exp.sum()
        best = max(range(len(scores)), key=lambda e: float(scores[e]))
        y = mlp(f"{name}.local_experts.{best}", x)
        return scores[best] * y if weighted else y

    def mamba(name: str, xs: list[Tensor]) -> list[Tensor]:
        taps, bias = state[f"{name}.conv1d.weight"][:, 0], state[f"{name}.conv1d.bias"]
        a, skip = -torch.exp(state[f"{name}.A_log"]), state[f"{name}.D"]
        memory = torch.zeros(inner, n, dtype=torch.float64)
        inputs, ys = [], []
        for x in xs:
            both = linear(f"{name}.in_proj", x)
            inputs.append(both[:inner])
            conv = bias
            for back in range(min(taps.shape[1], len(inputs))):
                conv = conv + taps[:, -1 - back] * inputs[-1 - back]
            u, z = silu(conv), both[inner:]
            selected = state[f"{name}.x_proj.weight"] @ u
            dt, b, c = selected[:rank], selected[rank : rank + n], selected[rank + n :]
            if inner_norms:
                dt, b, c = rms(dt, 1.0, eps), rms(b, 1.0, eps), rms(c, 1.0, eps)
            step = torch.log1p(torch.exp(linear(f"{name}.dt_proj", dt)))
            memory = torch.exp(step[:, None] * a) * memory + (step * u)[:, None] * b[None, :]
            ys.append(linear(f"{name}.out_proj", (memory @ c + skip * u) * silu(z)))
        return ys

    stream = [state["embedding.word_embeddings.weight"][int(token)] for token in tokens]
    for i, code in enumerate(config["mamba_moe_layers"]):
        name = f"decoder.layers.{i}.mixer"
        normed = [rms(h, state[f"decoder.layers.{i}.norm.weight"], eps) for h in stream]
        feed_forward = mlp if code == "1" else mixture
        ys = mamba(name, normed) if code == "r" else [feed_forward(name, x) for x in normed]
        stream = [h + y for h, y in zip(stream, ys, strict=True)]
    rows = []
    for h in stream:
        h = h - h.mean() if last == "layer" else h
        h = rms(h, state["decoder.final_layernorm.weight"], eps) + state["decoder.final_layernorm.bias"]
        rows.append(state["embedding.word_embeddings.weight"] @ h + state.get("output_layer.bias", 0.0))
    return torch.stack(rows)


def without(state: dict[str, Tensor], ending: str) -> dict[str, Tensor]:
    """The state dict with zeros for all tensors whose name ends so."""
    return {name: torch.zeros_like(tensor) if name.endswith(ending) else tensor for name, tensor in state.items()}


# The wrong variant -> a code that a schedule must have for it to show, the reference's argument, the end of a name.
WRONG = {
    "silu gate": ("138", {"gate": "silu"}, None),
    "tanh gelu": ("138", {"gate": "tanh"}, None),
    "up half first": ("138", {"up_first": True}, None),
    "router bias dropped": ("38", {}, "router.bias"),
    "the other score": ("38", {"score": "other"}, None),
    "gate not applied": ("38", {"weighted": False}, None),
    "RMSNorm at the end": ("r", {"last": "rms"}, None),
    "final bias dropped": ("r", {}, "final_layernorm.bias"),
    "convolution bias dropped": ("r", {}, "conv1d.bias"),
    "inner norms": ("r", {"inner_norms": True}, None),
    "eps 1e-6": ("r", {"eps": 1e-6}, None),
    "no skip": ("r", {}, ".D"),
}
BIASES = ("in_proj.bias", "out_proj.bias", "linear_fc1.bias", "linear_fc2.bias", "output_layer.bias")


def wrong_logits(config: dict, state: dict[str, Tensor], tokens: Tensor) -> list[Callable[[], Tensor]]:
    """The logits of every wrong variant that shows in this schedule, each under its name."""
    right = {"sinkhorn": "softmax", "top1": "sigmoid"}[config.get("routing_mode", "sinkhorn")]
    found = {}
    for name, (codes, arguments, ending) in WRONG.items():
        if set(codes) & set(config["mamba_moe_layers"]):
            arguments = {"score": right} if "score" in arguments else arguments
            changed = without(state, ending) if ending else state
            found[name] = lambda changed=changed, arguments=arguments: reference(config, changed, tokens, **arguments)
    for ending in BIASES:
        if any(name.endswith(ending) for name in state):
            found[f"without {ending}"] = lambda ending=ending: reference(config, without(state, ending), tokens)
    for name, variant in found.items():
        variant.__name__ = name
    return list(found.values())


# Logits

LOUDER = {
    "embeddings.weight": 0.3, "out_proj.weight": 4, "linear_fc2.weight": 4, "final_layernorm.bias": 0.1,
    "out_proj.bias": 0.1, "linear_fc2.bias": 0.1,
}  # fmt: skip


@pytest.fixture
def make(tmp_path) -> Callable[..., tuple[mj.Jamba, dict, dict[str, Tensor]]]:
    """make(layers, field=value, ...): a released folder loaded in float64, its config.json and its state dict.

    Texts of the `talkative` do not just repeat their last token: the blocks outweigh the embedding.
    """

    def build(layers: list[str] = LAYERS["r1r3"], talkative: bool = False, **changes):
        config = config_of(layers, **changes)
        state = random_state(config)
        for ending, scale in LOUDER.items() if talkative else ():
            state |= {name: scale * tensor for name, tensor in state.items() if name.endswith(ending)}
        return mj.load(write(tmp_path / "released", config, state), device="cpu", dtype="float64"), config, state

    return build


@torch.no_grad()
def run(model: mj.Jamba, tokens: Tensor, **arguments) -> Tensor:
    return model(tokens, **arguments)


def padded(documents: list[Tensor], filler: int = 5) -> tuple[Tensor, Tensor]:
    """Rows padded on the left, and which tokens are real."""
    longest = max(map(len, documents))
    tokens = torch.stack([torch.cat([torch.full((longest - len(row),), filler), row]) for row in documents])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in documents])
    return tokens, mask


CASES = {
    **{name: (layers, {}) for name, layers in LAYERS.items()},
    "r8r8, biases": (LAYERS["r8r8"], {"add_bias_linear": True}),
    "8r1, biases": (LAYERS["8r1"], {"add_bias_linear": True}),
    "r, biases": (LAYERS["r"], {"add_bias_linear": True}),
    "r1r3, top1": (LAYERS["r1r3"], {"routing_mode": "top1"}),
    "r8r8, top1, biases": (LAYERS["r8r8"], {"routing_mode": "top1", "add_bias_linear": True}),
    "8r1, other widths": (
        LAYERS["8r1"],
        {"hidden_size": 33, "expansion_factor": 3, "state_size": 3, "conv_dimension": 4, "vocab_size": 50},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_reference(make, case):
    layers, changes = CASES[case]
    model, config, state = make(layers, **changes)
    actual = run(model, TOKENS[None])[0]
    assert not model.training and model.dtype == torch.float64

    def check(expected):
        assert_matches(actual, expected(), FLOAT64, "logits")

    check(lambda: reference(config, state, TOKENS))
    assert_rejects(check, *wrong_logits(config, state, TOKENS))


def test_the_layers_are_those_of_the_file(make):
    model, config, _ = make(LAYERS["8r1"])
    assert model.config.schedule == "-E m- -+" and model.config.num_experts == 8
    assert model.config.family.name == "blackmamba"
    assert model.config.mamba_dt_rank == 2 and model.config.rms_norm_eps == 1e-5

    def check(layers):
        assert make(layers)[0].config.schedule == model.config.schedule

    check(LAYERS["8r1"])
    assert_rejects(check, ["r", "8", "1"], ["8", "r", "1", "8"], ["8", "r", "8"])


def test_an_empty_list_of_layers_is_mamba_only(make, tmp_path):
    config = config_of(["r", "r", "r"])
    state = random_state(config)
    write(tmp_path / "empty", config | {"mamba_moe_layers": []}, state)
    actual = run(mj.load(tmp_path / "empty", "cpu", "float64"), TOKENS[None])[0]
    assert_matches(actual, reference(config, state, TOKENS), FLOAT64, "logits")
    assert_rejects(
        lambda layers: assert_matches(actual, reference(config_of(layers), state, TOKENS), FLOAT64), ["r", "r"]
    )


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_counted_as_they_are_stored(make, case):
    layers, changes = CASES[case]
    model, _, state = make(layers, **changes)
    expected = sum(tensor.numel() for tensor in state.values())

    def check(config):
        assert mj.budget(config).total_params == expected
        assert mj.budget(config).tensors == len(state)

    check(model.config)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert_rejects(check, replace(model.config, final_norm="rms", model_type=None))


def test_the_larger_preset_is_the_released_model():
    """2,783,213,584 parameters, as the Hub counts them."""

    def check(config):
        sizes = shapes_of(released_config(config))
        assert sum(map(math.prod, sizes.values())) == mj.budget(config).total_params == 2_783_213_584

    def released_config(config):
        return config_of(
            ["r", "8"] * 18, hidden_size=config.hidden_size, state_size=16, conv_dimension=4, vocab_size=50304,
            ffn_hidden_size=config.intermediate_size,
        )  # fmt: skip

    check(mj.preset("blackmamba-2.8b"))
    assert_rejects(check, mj.preset("blackmamba-1.5b"), mj.preset("blackmamba-2.8b", mamba_inner_layernorms=True))


# Decoding, padding, packing


@pytest.mark.parametrize("case", ["r8r8, biases", "r1r3, top1", "8r1"])
def test_cached_decoding_at_every_split_and_token_by_token(make, case):
    layers, changes = CASES[case]
    model, config, state = make(layers, **changes)
    expected = reference(config, state, TOKENS)

    def in_parts(sizes, forget=False):
        cache, parts = model.new_cache(), []
        for part in TOKENS[None].split(sizes, dim=1):
            parts.append(run(model, part, cache=model.new_cache() if forget else cache))
        return torch.cat(parts, dim=1)[0]

    def check(logits):
        assert_matches(logits, expected, FLOAT64, "logits")

    for split in range(1, len(TOKENS)):
        check(in_parts([split, len(TOKENS) - split]))
    check(in_parts([1] * len(TOKENS)))
    check(in_parts([4, 1, 1, 5, 2]))
    assert_rejects(check, in_parts([6, 7], forget=True), in_parts([1] * len(TOKENS), forget=True))


@pytest.mark.parametrize("case", ["r8r8, biases", "8r1"])
def test_a_saved_cache_continues_the_text(make, tmp_path, case):
    layers, changes = CASES[case]
    model, config, state = make(layers, **changes)
    cache = model.new_cache()
    run(model, TOKENS[None, :8], cache=cache)
    cache.save(tmp_path / "cache.safetensors")
    expected = reference(config, state, TOKENS)[8:]

    def check(cache):
        assert_matches(run(model, TOKENS[None, 8:], cache=cache)[0], expected, FLOAT64, "logits")

    check(mj.Cache.load(tmp_path / "cache.safetensors"))
    assert_rejects(check, model.new_cache())
    check(cache)


@pytest.mark.parametrize("case", ["r8r8, biases", "8r1"])
def test_left_padding_changes_nothing(make, case):
    layers, changes = CASES[case]
    model, config, state = make(layers, **changes)
    documents = [TOKENS[:5], TOKENS, TOKENS[4:6]]
    tokens, mask = padded(documents)

    def check(logits):
        for row, real, document in zip(logits, mask, documents, strict=True):
            assert_matches(row[real], reference(config, state, document), FLOAT64, "real tokens")
            assert (row[~real] == 0).all()

    check(run(model, tokens, mask=mask))
    assert_rejects(check, run(model, tokens), run(model, tokens, mask=mask.flip(1)))

    # And what the cache keeps of padded rows continues each of them.
    def check_next(cache, mask):
        run(model, tokens, cache=cache, mask=mask)
        following = run(model, torch.full((3, 1), 8), cache=cache)[:, 0]
        for row, document in zip(following, documents, strict=True):
            longer = torch.cat([document, torch.tensor([8])])
            assert_matches(row, reference(config, state, longer)[-1], FLOAT64, "the next token")

    check_next(model.new_cache(3), mask)
    assert_rejects(lambda mask: check_next(model.new_cache(3), mask), torch.ones_like(mask))


@pytest.mark.parametrize("case", ["r8r8, biases", "8r1"])
def test_packed_documents_do_not_see_one_another(make, case):
    layers, changes = CASES[case]
    model, config, state = make(layers, **changes)
    sizes = [4, 1, 6, 2]
    segments = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[None]
    expected = torch.cat([reference(config, state, document) for document in TOKENS.split(sizes)])

    def check(logits):
        assert_matches(logits[0], expected, FLOAT64, "logits")

    check(run(model, TOKENS[None], segments=segments))
    assert_rejects(check, run(model, TOKENS[None]), run(model, TOKENS[None], segments=segments.roll(1, 1)))


@pytest.mark.parametrize("case", ["r8r8, biases", "r1r3, top1"])
def test_greedy_text_is_that_of_the_reference(make, case):
    """The reference reads the whole text anew for every token."""
    layers, changes = CASES[case]
    model, config, state = make(layers, talkative=True, **changes)
    prompts = [TOKENS[:6], TOKENS[6:9]]

    def greedy(prompt, **wrong):
        text = prompt
        for _ in range(10):
            text = torch.cat([text, reference(config, state, text, **wrong)[-1].argmax()[None]])
        return text[len(prompt) :].tolist()

    def check(texts):
        assert mj.generate(model, [prompt.tolist() for prompt in prompts], max_new_tokens=10, stop=()).tolist() == texts
        for prompt, text in zip(prompts, texts, strict=True):
            assert mj.generate(model, prompt.tolist(), max_new_tokens=10, stop=(), chunk=2).tolist() == [text]

    texts = [greedy(prompt) for prompt in prompts]
    assert min(len(set(text)) for text in texts) > 3
    check(texts)
    for wrong in ({"up_first": True}, {"weighted": False}, {"inner_norms": True}, {"gate": "silu"}):
        assert_rejects(check, [greedy(prompt, **wrong) for prompt in prompts])


# Writing


ROUND_TRIPS = {
    "r8r8": (LAYERS["r8r8"], {}),
    "8r1, biases": (LAYERS["8r1"], {"add_bias_linear": True}),
    "r1r3, top1": (LAYERS["r1r3"], {"routing_mode": "top1"}),
    "rr22r": (LAYERS["rr22r"], {}),
    "r": (LAYERS["r"], {}),
}


def read_all(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def swapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The up half before the gate half."""
    return {
        name: torch.cat(tensor.chunk(2)[::-1]) if "linear_fc1" in name else tensor for name, tensor in state.items()
    }


@pytest.mark.parametrize("shard_bytes", [3_000, 5_000_000_000], ids=["shards", "one file"])
@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_saved_and_converted_files_are_the_released_ones(tmp_path, case, shard_bytes):
    layers, changes = ROUND_TRIPS[case]
    config = config_of(layers, **changes)
    state = random_state(config)
    released = write(tmp_path / "released", config, state)
    model = mj.load(released, device="cpu")
    mj.save(model, tmp_path / "saved", shard_bytes=shard_bytes)
    checkpoint.convert(released, tmp_path / "converted", shard_bytes=shard_bytes)
    checkpoint.convert(tmp_path / "converted", tmp_path / "again")

    def check(state, folder):
        stored = read_all(folder)
        assert stored.keys() == state.keys()
        for name, tensor in state.items():
            assert stored[name].dtype == tensor.dtype
            assert_matches(stored[name], tensor, 0, name)

    for name in ("saved", "converted", "again"):
        folder = tmp_path / name
        check(state, folder)
        written = json.loads((folder / "config.json").read_text())
        for key, value in config.items():
            if key not in ("bias", "routing_mode"):
                assert written[key] == value, key
        assert written["routing_mode"] == config.get("routing_mode", "sinkhorn")
        loaded = mj.load(folder, device="cpu")
        assert loaded.config == model.config and loaded.config.family.name == "blackmamba"
        assert_matches(run(loaded, TOKENS[None]), run(model, TOKENS[None]), 0, "logits")
    assert (len(list((tmp_path / "saved").glob("*.safetensors"))) > 2) == (shard_bytes == 3_000)

    renamed = {name.replace("decoder.", "model."): tensor for name, tensor in state.items()}
    wrong = [renamed, without(state, "final_layernorm.bias"), *([swapped(state)] if set(layers) != {"r"} else [])]
    assert_rejects(lambda state: check(state, tmp_path / "saved"), *wrong)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_convert_keeps_every_tensor_as_it_is_stored(tmp_path, dtype):
    config = config_of(LAYERS["r1r3"])
    state = random_state(config, dtype=dtype)
    wide = {name: state[name].float() for name in state if name.endswith(("A_log", "dt_proj.bias"))}

    def check(state, dtype):
        source = write(tmp_path / "released", config, state)
        checkpoint.convert(source, tmp_path / "converted")
        stored = read_all(tmp_path / "converted")
        for name, tensor in state.items():
            assert stored[name].dtype == tensor.dtype, name
            assert_matches(stored[name], tensor, 0, name)
        assert json.loads((tmp_path / "converted" / "config.json").read_text())["torch_dtype"] == dtype
        assert_matches(
            run(mj.load(tmp_path / "converted", "cpu"), TOKENS[None]), run(mj.load(source, "cpu"), TOKENS[None]), 0
        )

    name = str(dtype).removeprefix("torch.")
    check(state, name)
    check(state | wide, name)
    assert_rejects(lambda name: check(state, name), "float64", *({"float16", "bfloat16", "float32"} - {name}))


def test_the_stream_is_float32_in_a_model_of_half_precision(tmp_path):
    config = config_of(LAYERS["r8r8"])
    state = random_state(config, dtype=torch.bfloat16)
    model = mj.load(write(tmp_path / "released", config, state), device="cpu")
    assert model.dtype == torch.bfloat16

    def check(model):
        trace = mj.Trace()
        logits = run(model, TOKENS[None], trace=trace)
        assert logits.dtype == torch.bfloat16
        assert len(trace.hidden) == 5 and {hidden.dtype for hidden in trace.hidden} == {torch.float32}
        # The sums keep more digits than bfloat16 has.
        assert (trace.hidden[-1] != trace.hidden[-1].bfloat16()).any()
        # Some dozen roundings of 2^-9 through four layers.
        assert_matches(logits[0], reference(config, state, TOKENS), 0.05, "logits")

    def narrow_stream():
        narrow = mj.Jamba(replace(model.config, residual_in_fp32=False, model_type=None)).to(torch.bfloat16).eval()
        narrow.load_state_dict(model.state_dict())
        return narrow

    check(model)
    assert_rejects(check, narrow_stream(), mj.load(tmp_path / "released", "cpu", "float32"))
    # Cached decoding keeps it, too.
    cache, trace = model.new_cache(), mj.Trace()
    run(model, TOKENS[None, :6], cache=cache)
    run(model, TOKENS[None, 6:7], cache=cache, trace=trace)
    assert {hidden.dtype for hidden in trace.hidden} == {torch.float32}


# Refusals


def layers(*codes: str) -> Callable:
    return lambda config, state: config.update(mamba_moe_layers=list(codes), num_layers=len(codes))


def put(**values) -> Callable:
    return lambda config, state: config.update(values)


def drop(name: str) -> Callable:
    return lambda config, state: state.pop(name)


def store(name: str, *shape: int) -> Callable:
    return lambda config, state: state.update({name: torch.ones(shape)})


FC1 = "decoder.layers.1.mixer.local_experts.2.linear_fc1.weight"
# What is done to the content of config.json and the state dict -> what the message must name.
BAD = {
    "parallel block": (layers("r", "r8", "r", "8"), ["config.json", "'r8'", "side by side", "not built here"]),
    "parallel dense block": (layers("r1", "8"), ["config.json", "'r1'", "side by side"]),
    "unknown block": (layers("r", "a", "r", "8"), ["config.json", "block 'a'", "give r", "1 to 9"]),
    "no experts": (layers("r", "0", "r", "8"), ["config.json", "block '0'"]),
    "empty block": (layers("r", "", "r", "8"), ["config.json", "block ''"]),
    "two expert counts": (layers("r", "8", "r", "4"), ["config.json", "[4, 8] experts", "only one number"]),
    "no Mamba": (layers("8", "8"), ["config.json", "no mixer"]),
    "no gate": (put(swiglu=False), ["config.json", "swiglu is false", "true"]),
    "LayerNorm in the blocks": (put(rms_norm=False), ["config.json", "rms_norm is false"]),
    "another number of layers": (put(num_layers=5), ["config.json", "has 4 blocks", "num_layers is 5"]),
    "unknown routing": (put(routing_mode="top2"), ["config.json", "routing_mode is 'top2'", "sinkhorn and top1"]),
    "no router bias": (drop("decoder.layers.1.mixer.router.bias"), ["no tensor decoder.layers.1.mixer.router.bias"]),
    "no final bias": (drop("decoder.final_layernorm.bias"), ["no tensor decoder.final_layernorm.bias"]),
    "no embedding": (drop("embedding.word_embeddings.weight"), ["no tensor embedding.word_embeddings.weight"]),
    "an expert is missing": (drop(FC1), ["no tensor", FC1]),
    "extra tensor": (
        store("decoder.layers.0.mixer.dt_layernorm.weight", 2),
        ["pytorch_model.bin", "decoder.layers.0.mixer.dt_layernorm.weight", "no place"],
    ),
    "a bias that config.json denies": (store("output_layer.bias", 43), ["pytorch_model.bin", "output_layer.bias"]),
    "biases that are missing": (put(add_bias_linear=True), ["no tensor", "bias"]),
    "linear_fc1 without a gate": (store(FC1, 11, 19), ["pytorch_model.bin", FC1, "(11, 19)", "(22, 19)"]),
    "linear_fc1 transposed": (store(FC1, 19, 22), ["pytorch_model.bin", FC1, "(19, 22)", "(22, 19)"]),
    "head that is not the embedding": (
        store("output_layer.weight", 43, 19), ["pytorch_model.bin", "output_layer.weight differs", "word_embeddings"],
    ),
    "another width": (put(hidden_size=20), ["pytorch_model.bin", "shape", "19"]),
}  # fmt: skip


def check_refused(tmp_path: Path, damage: Callable, words: list[str]) -> None:
    """Both load and convert say why, and nothing is written."""
    config, state = dict(CONFIG), random_state(CONFIG)
    damage(config, state)
    source = write(tmp_path / "released", config, state)
    for action in (mj.load, lambda folder: checkpoint.convert(folder, tmp_path / "converted")):
        assert_names(refusal(action, source), [str(tmp_path), *words] if words else [])
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_refused(tmp_path, case):
    check_refused(tmp_path, *BAD[case])


def test_what_is_right_is_not_refused(tmp_path):
    def tied_head(config, state):
        state["output_layer.weight"] = state["embedding.word_embeddings.weight"].clone()

    for i, harmless in enumerate([put(bias=True), put(swiglu=True, rms_norm=True), tied_head]):
        folder = tmp_path / str(i)
        folder.mkdir()
        assert_rejects(lambda change, folder=folder: check_refused(folder, change, []), harmless)


def test_models_that_the_layout_cannot_say_are_saved_in_another(make, tmp_path):
    """Ten experts, or another rank, do not fit into the released config.json."""
    model, _, _ = make()
    for changes in ({"mamba_dt_rank": 3}, {"final_norm": "rms"}, {"hidden_act": "silu"}, {"num_experts": 10}):
        other = mj.Jamba(replace(model.config, **changes, model_type=None)).eval()
        assert other.config.family.name != "blackmamba"
        mj.save(other.float(), tmp_path / "other")
        assert_matches(
            run(mj.load(tmp_path / "other", "cpu", "float32"), TOKENS[None]), run(other, TOKENS[None]), 0, "logits"
        )
        message = refusal(lambda config=other.config: replace(config, model_type="blackmamba"))
        assert_names(message, ["'blackmamba'", "family has"])
    assert_rejects(lambda changes: refusal(lambda: replace(model.config, **changes)), {"mamba_d_state": 7})
