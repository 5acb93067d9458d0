"""Parameters, FLOPs and memory of any model, computed from its config alone: nothing is allocated.

All sizes are bytes, shown in GiB (2^30 bytes; the papers' cache tables print them as "GB").
"""

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from .config import JambaConfig, preset
from .families import rename
from .quantize import packed_bits, packed_bytes, packed_shapes, scheme
from .rungs import cudnn_takes

DTYPES = ("float32", "bfloat16", "float16", "float64")
PARTS = ("embedding", "mamba", "attention", "mlp", "moe", "norms", "head")
NORMS = ("input_layernorm", "pre_ff_layernorm")  # of a layer's mixer and of its feed-forward
KEPT_FLOAT32 = ("mamba.A_log", "mamba.dt_proj.bias")  # in memory, also in a model of half precision
REMEDY = "use a shorter context, a smaller batch, a dtype or quantize of fewer bits, or a device with more memory"
LONGEST = 2**40  # tokens; a model that has memory for these has it for any number

# The Transformers that the Jamba paper compares with, and all models whose papers this package follows.
TRANSFORMERS = ("Llama-2-7B", "Llama-2-13B", "Llama-2-70B", "Mistral-7B", "Mixtral-8x7B")
COMPARED = (*TRANSFORMERS, "Jamba-v0.1", "Jamba-1.5-Large", "Mamba-2.8B", "BlackMamba-1.5B", "BlackMamba-2.8B")


class Weight(NamedTuple):
    """One tensor of the layout in which Jambas are released: our name for it, whatever the family."""

    name: str
    shape: tuple[int, ...]
    part: str  # one of PARTS
    expert: int | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def weights(config: JambaConfig) -> list[Weight]:
    """Every tensor of a model: one per expert and projection, no head where it is tied.

    Jamba-v0.1 has 1,251 of them with 51,570,323,328 parameters in all.
    Linear weights are (out, in). Norms inside a Mamba mixer count as "mamba", the router as "moe".
    """
    d, v = config.hidden_size, config.vocab_size
    found = [Weight("model.embed_tokens.weight", (v, d), "embedding")]
    for i, layer in enumerate(config.layers):
        kinds = {"mamba": _mamba, "attention": _attention, "mlp": _mlp, "moe": _moe}
        parts = [kinds[part](config) for part in layer if part]
        parts += [_norm(config, name) for name, part in zip(NORMS, layer, strict=True) if part]
        found += [weight._replace(name=f"model.layers.{i}.{weight.name}") for part in parts for weight in part]
    found += [Weight("model.final_layernorm.weight", (d,), "norms")]
    if config.final_norm == "layer":
        found += [Weight("model.final_layernorm.bias", (d,), "norms")]
    if not config.tie_word_embeddings:
        found += [Weight("lm_head.weight", (v, d), "head")]
    if config.head_bias:
        found += [Weight("lm_head.bias", (v,), "head")]
    return found


def released(config: JambaConfig) -> dict[str, list[Weight]]:
    """Every tensor in the released layout of the config's family, and which of ours it holds, row after row."""
    found: dict[str, list[Weight]] = {}
    names = config.family.names
    for weight in weights(config):
        found.setdefault(rename(weight.name, names), []).append(weight)
    return found


def _mamba(config: JambaConfig) -> Iterator[Weight]:
    d, c, n, r = config.hidden_size, config.d_inner, config.mamba_d_state, config.mamba_dt_rank
    shapes = {
        "A_log": (c, n),
        "D": (c,),
        "in_proj.weight": (2 * c, d),
        "conv1d.weight": (c, 1, config.mamba_d_conv),
        "x_proj.weight": (r + 2 * n, c),
        "dt_proj.weight": (c, r),
        "dt_proj.bias": (c,),
        "out_proj.weight": (d, c),
    }
    if config.mamba_inner_layernorms:
        shapes |= {"dt_layernorm.weight": (r,), "b_layernorm.weight": (n,), "c_layernorm.weight": (n,)}
    if config.mamba_conv_bias:
        shapes["conv1d.bias"] = (c,)
    if config.mamba_proj_bias:
        shapes |= {"in_proj.bias": (2 * c,), "out_proj.bias": (d,)}
    return (Weight(f"mamba.{name}", shape, "mamba") for name, shape in shapes.items())


def _attention(config: JambaConfig) -> Iterator[Weight]:
    d, width = config.hidden_size, config.num_attention_heads * config.head_dim
    key_width = config.num_key_value_heads * config.head_dim
    shapes = {"q_proj": (width, d), "k_proj": (key_width, d), "v_proj": (key_width, d), "o_proj": (d, width)}
    return _projections(shapes, config.attention_bias, "self_attn", "attention")


def _projections(
    shapes: dict[str, tuple[int, int]], biased: bool, prefix: str, part: str, expert: int | None = None
) -> Iterator[Weight]:
    for name, shape in shapes.items():
        yield Weight(f"{prefix}.{name}.weight", shape, part, expert)
        if biased:
            yield Weight(f"{prefix}.{name}.bias", shape[:1], part, expert)


def _mlp(config: JambaConfig, prefix="feed_forward", part="mlp", expert=None) -> Iterator[Weight]:
    d, f = config.hidden_size, config.intermediate_size
    shapes = {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
    return _projections(shapes, config.mlp_bias, prefix, part, expert)


def _moe(config: JambaConfig) -> Iterator[Weight]:
    yield Weight("feed_forward.router.weight", (config.num_experts, config.hidden_size), "moe")
    if config.router_bias:
        yield Weight("feed_forward.router.bias", (config.num_experts,), "moe")
    for expert in range(config.num_experts):
        yield from _mlp(config, f"feed_forward.experts.{expert}", "moe", expert)


def _norm(config: JambaConfig, name: str) -> list[Weight]:
    return [Weight(f"{name}.weight", (config.hidden_size,), "norms")]


def kv_bytes(layers: int, kv_heads: int, head_dim: int, context: int, bytes_per_value: int = 2) -> int:
    """Bytes of the keys and values of one sequence: 2 layers g p context bytes_per_value.

    `layers` counts those with attention. Jamba-v0.1 at 262,144 tokens: kv_bytes(4, 8, 128, 262144) == 4 * 2**30.
    """
    return 2 * layers * kv_heads * head_dim * context * bytes_per_value


def kv_table(contexts: list[int], configs: dict[str, JambaConfig] | None = None) -> dict[str, list[float]]:
    """GiB of 16-bit KV cache of one sequence: model -> a figure for each context, Transformers first, then `configs`.

    At 262,144 tokens it is the KV column of the Jamba paper's Table 1 (whose LLAMA-2 is the 7B one; no sliding window).
    """
    configs = {name: preset(name.lower()) for name in TRANSFORMERS} | (configs or {})
    return {name: [kv_bytes(*_kv(config), t) / 2**30 for t in contexts] for name, config in configs.items()}


def _kv(config: JambaConfig) -> tuple[int, int, int]:
    return _count(config, "attention"), config.num_key_value_heads, config.head_dim


def flops_per_token(config: JambaConfig, context: float) -> float:
    """FLOPs of the forward pass of one token that attends to `context` tokens, itself included, or to its window's.

        2 M  +  (attention layers) 4 h p context  +  (Mamba layers) c (7 n + 4 + 2 w)

    M: weights of the matrix products that the token goes through: k of the e experts, the router and the head, tied or
    not; the embedding is a look-up. Attention: for each key, 2 h p for the score and 2 h p for the weighted sum. Scan:
    for each state two operations for the decay, three for the update, two for the read-out; for each channel delta x,
    D x and its sum, the gate. Convolution: 2 w a channel. Norms and activation functions are left out.

    Linear in `context`: a prompt of t tokens costs t times the value at `mean_context`. Training costs three times the
    forward pass, since each matrix product has two in the backward pass.
    """
    scan_and_conv = config.d_inner * (7 * config.mamba_d_state + 4 + 2 * config.mamba_d_conv)
    products = sum(weight.size for weight in weights(config) if _multiplies(weight) and _active(config, weight))
    products += config.vocab_size * config.hidden_size
    width, seen = config.num_attention_heads * config.head_dim, min(context, config.sliding_window or math.inf)
    attention = _count(config, "attention") * 4 * width * seen
    return 2 * products + attention + _count(config, "mamba") * scan_and_conv


def mean_context(config: JambaConfig, context: int) -> float:
    """How many tokens a token attends to, the mean over a sequence: (t + 1) / 2 where no window cuts it short."""
    window = min(context, config.sliding_window or context)
    return (window * (window + 1) / 2 + (context - window) * window) / context


def _multiplies(weight: Weight) -> bool:
    """A matrix of the layers; the head, which may be the embedding, is counted apart."""
    return weight.name.endswith(("_proj.weight", "router.weight"))


def _active(config: JambaConfig, weight: Weight) -> bool:
    """Whether one token uses the weight; experts are alike, so let the first K be the chosen ones."""
    return weight.expert is None or weight.expert < config.num_experts_per_tok


def _count(config: JambaConfig, mixer: str) -> int:
    return sum(layer.mixer == mixer for layer in config.layers)


@dataclass(frozen=True)
class Budget:
    """What one configuration needs, made by `budget`; `print` it for a table. Every `*_bytes` is in bytes."""

    config: JambaConfig
    context: int
    batch: int
    quantize: str | None
    dtype: str
    chunk: int
    kv: str | None = None
    kernels: bool = False
    ragged: bool = False

    @cached_property
    def weights(self) -> list[Weight]:
        return weights(self.config)

    @cached_property
    def params(self) -> dict[str, int]:
        """Parameters of each of PARTS."""
        return self._by_part(lambda weight: weight.size)

    @cached_property
    def active(self) -> dict[str, int]:
        """Parameters of each of PARTS that one token uses: K experts of a layer, everything else in full."""
        return self._by_part(lambda weight: weight.size * _active(self.config, weight))

    @cached_property
    def part_bytes(self) -> dict[str, int]:
        """Bytes of the weights of each of PARTS in memory."""
        return self._by_part(self._held_bytes)

    def _by_part(self, value) -> dict[str, int]:
        return {part: sum(value(weight) for weight in self.weights if weight.part == part) for part in PARTS}

    def _held_bytes(self, weight: Weight) -> int:
        if bits := self._bits(weight):
            return packed_bytes(weight.shape, bits)
        return weight.size * (max(4, self.itemsize) if weight.name.endswith(KEPT_FLOAT32) else self.itemsize)

    def _bits(self, weight: Weight) -> int | None:
        return packed_bits(weight.name, weight.part, self.quantize)

    @property
    def itemsize(self) -> int:
        return getattr(torch, self.dtype).itemsize

    @property
    def total_params(self) -> int:
        return sum(self.params.values())

    @property
    def active_params(self) -> int:
        return sum(self.active.values())

    @property
    def tensors(self) -> int:
        """Tensors of a checkpoint in the released layout."""
        return len(released(self.config))

    @property
    def file_bytes(self) -> int:
        """Tensors of a checkpoint in the released layout, every one in `dtype`."""
        return self.total_params * self.itemsize

    @property
    def weight_bytes(self) -> int:
        """Weights in memory, as `quantize` holds them."""
        return sum(self.part_bytes.values())

    @property
    def kv_bytes(self) -> int:
        """Keys and values of all sequences, full to `context`."""
        layers, heads, width = _kv(self.config)
        scales = 0 if self.kv is None else kv_bytes(layers, heads, 1, self.context, 4)
        return self.batch * (kv_bytes(layers, heads, width, self.context, 1 if self.kv else self.itemsize) + scales)

    @property
    def ssm_bytes(self) -> int:
        """Recurrent states, at least float32: (Mamba layers) b c n values, whatever the context."""
        states = self.batch * self.config.d_inner * self.config.mamba_d_state
        return _count(self.config, "mamba") * states * max(4, self.itemsize)

    @property
    def conv_bytes(self) -> int:
        """Windows of the convolutions: (Mamba layers) b (w - 1) c values, whatever the context."""
        inputs = self.batch * (self.config.mamba_d_conv - 1) * self.config.d_inner
        return _count(self.config, "mamba") * inputs * self.itemsize

    @property
    def state_bytes(self) -> int:
        """Everything that a sequence's Mamba layers remember."""
        return self.ssm_bytes + self.conv_bytes

    @property
    def activation_bytes(self) -> int:
        """Working memory of the prefill, `chunk` tokens of each sequence at a time: a bound for the parallel rungs,
        or for the kernels.

        With T = b min(chunk, context) tokens in flight, in values of `dtype` unless float32 is said:

            residual stream  T 6 d, float32 with residual_in_fp32, beside one layer at a time; the largest kind counts
            Mamba            T (6 c + r + 2 n), T 8 c float32, and four blocks of states of the scan, each
                             min(T c n, max(2^20, 16 b c n)) float32
            attention        T (3 d + 3 h p), T 4 h p float32 for rotary positions, and the mask: T context bool and as
                             many values; kernels in half precision need none, but T 2 h p float32 for sums, unless
                             rows are of different lengths, a window is shorter than the context, or a head is wider
                             than 128 or no multiple of 8
            keys, values     in 8 bits: those of a layer, unpacked
            MLP              T 3 f
            MoE              T (5 k d + 3 f), and T 2 e float32: every token may choose the same expert; kernels, which
                             take all experts at once, T 3 k f
            sampling         8 b v float32
            packed weights   a matrix of m numbers while it is unpacked, 9 m bytes; of experts also six that are
                             unpacked, or one projection of all of them, max(9 m bytes + 6 m, e m); kernels m or e m
        """
        config, size, tokens = self.config, self.itemsize, self.batch * min(self.chunk, self.context)
        width = config.num_attention_heads * config.head_dim
        d, f, c, n = config.hidden_size, config.intermediate_size, config.d_inner, config.mamba_d_state
        k, e = config.num_experts_per_tok, config.num_experts
        turned = 0 if config.rope_theta is None else 4 * width * max(4, size)
        windowed = config.sliding_window is not None and config.sliding_window < self.context
        masked = self.ragged or windowed or not (self.kernels and cudnn_takes(config.head_dim, size))
        mask = self.context * (1 + size) if masked else 2 * width * 4
        heads = config.num_key_value_heads * config.head_dim
        unpacked = 0 if self.kv is None else 2 * self.batch * self.context * heads
        states = min(tokens * c * n, max(2**20, 16 * self.batch * c * n))
        kinds = {
            "mamba": tokens * ((6 * c + config.mamba_dt_rank + 2 * n) * size + 8 * c * 4) + 4 * states * 4,
            "attention": tokens * (3 * (d + width) * size + turned + mask) + unpacked * size,
            "mlp": tokens * 3 * f * size,
            "moe": tokens * ((5 * k * d + 3 * f * (k if self.kernels else 1)) * size + 2 * e * 4),
        }
        largest = max(kinds[kind] for layer in config.layers for kind in layer if kind)
        stream = max(4, size) if config.residual_in_fp32 else size
        return tokens * 6 * d * stream + largest + 8 * self.batch * config.vocab_size * 4 + self._unpacked_bytes()

    def _unpacked_bytes(self) -> int:
        """The most that unpacking takes at once. 9 bytes a number, padding included: integers and their products with
        the scales, in float32."""
        sizes = [0]
        for weight in self.weights:
            if bits := self._bits(weight):
                single = 9 * math.prod(packed_shapes(weight.shape, bits)[0]) * (1 if bits == 8 else 4)
                matrix, experts = weight.size * self.itemsize, self.config.num_experts
                if self.kernels:
                    sizes.append(matrix if weight.expert is None else experts * matrix)
                    continue
                sizes.append(single if weight.expert is None else max(single + 6 * matrix, experts * matrix))
        return max(sizes)

    @property
    def working_bytes(self) -> int:
        """Everything beside the weights: caches, states and activations."""
        return self.kv_bytes + self.state_bytes + self.activation_bytes

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.working_bytes

    @property
    def flops_per_token(self) -> float:
        """Forward FLOPs of the last token of the context."""
        return flops_per_token(self.config, self.context)

    @property
    def training_flops_per_token(self) -> float:
        """Forward and backward FLOPs, the mean over a sequence of `context` tokens."""
        return 3 * flops_per_token(self.config, mean_context(self.config, self.context))

    def fits(self, memory: int) -> bool:
        """Whether `memory` bytes hold all of it."""
        return self.total_bytes <= memory

    def max_context(self, memory: int) -> int | float:
        """The longest context that `memory` bytes hold: 0 if not one token fits, math.inf if any number does."""
        longest = bisect_right(
            range(1, LONGEST), memory - self.weight_bytes, key=lambda t: replace(self, context=t).working_bytes
        )
        return math.inf if longest == LONGEST - 1 else longest

    def draw(self, memory_gib: float = 80, path: str | Path | None = None):
        """The parts of the memory against a device's, as a matplotlib figure; also written to `path` if given."""
        from .plots import budget_bars

        figure = budget_bars({name: size / 2**30 for name, size in self.memory().items() if size}, memory_gib)
        if path is not None:
            figure.savefig(path)
        return figure

    def memory(self) -> dict[str, int]:
        """Bytes by what fills them, weights first; the sum is `total_bytes`."""
        held = self.part_bytes
        return {
            **{part: held[part] for part in ("moe", "mlp", "mamba", "attention")},
            "embedding, head, norms": held["embedding"] + held["head"] + held["norms"],
            "KV cache": self.kv_bytes,
            "Mamba state": self.state_bytes,
            "activations": self.activation_bytes,
        }

    def __str__(self) -> str:
        rows = [(part, f"{self.params[part]:,}", f"{self.active[part]:,}", self.part_bytes[part]) for part in PARTS]
        rows += [("weights", f"{self.total_params:,}", f"{self.active_params:,}", self.weight_bytes)]
        rows += [("KV cache", "", "", self.kv_bytes), ("Mamba state", "", "", self.state_bytes)]
        rows += [("activations", "", "", self.activation_bytes), ("total", "", "", self.total_bytes)]
        lines = [f"{'':11} {'parameters':>19} {'active':>18} {'memory':>12}"]
        lines += [f"{name:11} {params:>19} {active:>18} {readable(size):>12}" for name, params, active, size in rows]
        packed = f", weights in {self.quantize}" if any(map(self._bits, self.weights)) else ""
        head = f"{self.dtype}{packed}, context {self.context:,}, batch {self.batch}, prefill by {self.chunk:,} tokens"
        files = f"files: {self.tensors:,} tensors, {readable(self.file_bytes)} in {self.dtype}"
        forward, training = self.flops_per_token, self.training_flops_per_token
        flops = f"FLOPs a token: {forward:.3g} forward at the end of the context, {training:.3g} in training (mean)"
        return "\n".join([head, *lines, files, flops])


def readable(size: int) -> str:
    """Bytes in GiB, MiB or KiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= 0.1 * unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size / 2**10:,.2f} KiB"


def budget(
    config: JambaConfig,
    context: int | None = None,
    batch: int = 1,
    quantize: str | None = None,
    dtype: str | torch.dtype | None = None,
    chunk: int = 2048,
    kv: str | None = None,
    kernels: bool = False,
    ragged: bool = False,
) -> Budget:
    """Parameters, bytes and FLOPs of a configuration, to print, draw or compare with a device's memory.

    Args:
        context:  tokens of each sequence; the config's max_position_embeddings by default.
        batch:    sequences.
        quantize: how matrices are held, one of `quantize.SCHEMES`; everything else (router, biases, norms, embedding,
                  what selects delta, B and C) stays in `dtype`.
                  "int8": experts and dense MLPs in a byte a weight, with a float32 scale an output channel.
                  "int4": these in half a byte, with a 16-bit scale for each 64 weights along the input, padded to 256.
                  "int8-all", "int4-all": as these, and the projections of the mixers and the head in int8.
        dtype:    of weights, keys and values; the config's by default. A_log, delta's bias and the recurrent state are
                  float32 at least.
        chunk:    tokens of a prompt that are read at a time.
        kv:       "int8" for keys and values in a byte a number and 4 bytes a token and head; None for `dtype`.
        kernels:  count the working memory of a GPU's kernels, not that of the parallel rungs.
        ragged:   the sequences are of different lengths, `context` tokens at most.
    Raises: ValueError naming the argument that is out of range.
    Source: Jamba, Table 1, for the cache; Jamba-1.5, section 3.1, and vLLM's ExpertsInt8 for "int8".
    """
    context = config.max_position_embeddings if context is None else context
    dtype = config.dtype if dtype is None else str(dtype).removeprefix("torch.")
    for name, value in (("context", context), ("batch", batch), ("chunk", chunk)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {value!r}, but must be a whole number of at least 1")
    scheme(quantize)
    if kv not in (None, "int8"):
        raise ValueError(f'kv is {kv!r}, but must be None or "int8"')
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, but must be one of {', '.join(DTYPES)}")
    return Budget(config, context, batch, quantize, dtype, chunk, kv, kernels, ragged)


def compare(configs: dict[str, JambaConfig] | None = None, context: int = 262144) -> str:
    """A table of models, those of the papers by default: parameters, what a sequence of `context` tokens occupies in
    bfloat16, and forward FLOPs of a token, the first one and the last.

    Keys and values are counted in full, also where a model attends to a window. Source: Jamba, Table 1.
    """
    configs = configs or {name: preset(name.lower()) for name in COMPARED}
    head = f"{'':16} {'layers':>7} {'parameters':>16} {'active':>15} {'KV cache':>11} {'state':>10}"
    lines = [f"{context:,} tokens of context, bfloat16", f"{head} {'FLOPs, start':>14} {'FLOPs, end':>11}"]
    for name, config in configs.items():
        table = budget(config, context, dtype="bfloat16")
        lines.append(
            f"{name:16} {len(config.layers):>7} {table.total_params:>16,} {table.active_params:>15,} "
            f"{readable(table.kv_bytes) if table.kv_bytes else '-':>11} "
            f"{readable(table.state_bytes) if table.state_bytes else '-':>10} "
            f"{flops_per_token(config, 1):>14.3g} {table.flops_per_token:>11.3g}"
        )
    return "\n".join(lines)


def available_memory(device: str | torch.device = "cpu") -> int:
    """Bytes that can still be allocated on a device: free memory of a GPU, as far as this process may take it,
    otherwise of the machine."""
    device = torch.device(device)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        (free, total), reserved = torch.cuda.mem_get_info(index), torch.cuda.memory_reserved(index)
        limit = torch.cuda.get_per_process_memory_fraction(index) * total
        return min(free, int(limit) - reserved) + reserved - torch.cuda.memory_allocated(index)
    import psutil

    return psutil.virtual_memory().available


def refuse_if_too_large(
    need_bytes: int,
    device: str | torch.device,
    what: str,
    remedy: str = REMEDY,
) -> None:
    """Refuse what a device cannot hold, before anything is allocated.

    what: the subject of the sentence, as "a context of 262,144 tokens".
    Raises: ValueError with the bytes needed, the bytes free and the remedy. Nothing is refused on "meta".
    """
    if torch.device(device).type == "meta":
        return
    free = available_memory(device)
    if need_bytes > free:
        raise ValueError(f"{what} needs {readable(need_bytes)}, but {device} has {readable(free)} free: {remedy}")
