"""The configuration of a model: sizes, schedule of layers, presets, and config.json in and out.

Field names are those of Jamba's released config.json; the comment beside each gives the paper's letter. Mamba,
BlackMamba, Mixtral, Mistral and Llama are configurations too (`families` translates their config.json).
Source: Jamba (arXiv 2403.19887), sections 2 and 3.1; released config.json files.
"""

import json
import math
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

from .families import FAMILIES, Family, read_config, write_config

DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("silu", "gelu")
ROUTINGS = ("softmax", "sigmoid", "sinkhorn")
FINAL_NORMS = ("rms", "layer")
# The two characters of a layer in a schedule.
MIXERS = {"m": "mamba", "A": "attention", "-": None}
FEED_FORWARDS = {"+": "mlp", "E": "moe", "-": None}


class Layer(NamedTuple):
    """One layer: a mixer, then a feed-forward part, each behind its own norm and residual; one may be absent."""

    mixer: str | None  # "mamba" or "attention"
    feed_forward: str | None  # "mlp" or "moe"


@dataclass(frozen=True)
class JambaConfig:
    """Sizes, schedule and features of a model; the defaults are Jamba-v0.1.

        layer i holds attention  iff  i mod attn_layer_period == attn_layer_offset, else Mamba
        layer i holds experts    iff  i mod expert_layer_period == expert_layer_offset and num_experts > 1, else an MLP

    Schedules without one of the parts use the same fields. Four layers with attn_layer_period=4, attn_layer_offset=2
    are "m+ mE A+ mE"; changed by

        num_experts=1                                 "m+ m+ A+ m+"  no experts: an MLP everywhere and no router
        expert_layer_period=1, expert_layer_offset=0  "mE mE AE mE"  experts everywhere
        attn_layer_period=5, attn_layer_offset=4      "m+ mE m+ mE"  no attention: it would come with a fifth layer
        attn_layer_period=1, attn_layer_offset=0      "A+ AE A+ AE"  attention everywhere

    `pattern` says any schedule, layer by layer and repeated to the last: "m+ mE A+" or, with a layer that has one part
    only, "m- -E", which is BlackMamba. Then the four period and offset fields
    mean nothing, nor does num_experts without an E.

    mamba_dt_rank="auto" is resolved at once: `dataclasses.replace` with a new hidden_size keeps the old rank,
    `preset(name, hidden_size=...)` does not.

    Raises: ValueError where a value is out of range or two fields contradict each other.
    Source: Jamba, sections 2 and 3.1.
    """

    vocab_size: int = 65536  # v, tokens
    hidden_size: int = 4096  # d, model width
    intermediate_size: int = 14336  # f, width of the MLP and of each expert
    num_hidden_layers: int = 32  # number of blocks times l, layers
    num_attention_heads: int = 32  # h, query heads
    num_key_value_heads: int = 8  # g, key/value heads
    attn_layer_period: int = 8  # a + m of a:m = 1:7, layers
    attn_layer_offset: int = 4  # which layer of each period holds attention
    expert_layer_period: int = 2  # e of the paper: experts replace the MLP every e layers
    expert_layer_offset: int = 1  # which layer of each period holds experts
    num_experts: int = 16  # n of the paper, experts in a layer; 1 = an MLP in every layer
    num_experts_per_tok: int = 2  # K of the paper, experts that a token uses; no meaning when num_experts is 1
    mamba_d_state: int = 16  # N of Mamba, states a channel
    mamba_d_conv: int = 4  # w, taps of the causal convolution
    mamba_expand: int = 2  # E of Mamba: c = E d inner channels
    mamba_dt_rank: int | str = "auto"  # R of Mamba, rank of delta; "auto" = ceil(d / 16)
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False  # in in_proj and out_proj
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False  # the head is the embedding matrix
    max_position_embeddings: int = 262144  # tokens of context the weights were made for; no tensor depends on it
    hidden_act: str = "silu"
    router_aux_loss_coef: float = 0.001  # weight of the load-balancing loss
    initializer_range: float = 0.02  # standard deviation of the initial weights
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = 0
    dtype: str = "bfloat16"  # of the weights on disk
    # What Jamba does without, and other families have.
    pattern: str | None = None  # the layers as text, as in `schedule`
    head_width: int | None = None  # p, width of an attention head; None = d / h
    attention_bias: bool = False  # in all four projections
    rope_theta: float | None = None  # base of the rotary positions; None = no positions
    sliding_window: int | None = None  # tokens that attention looks back, itself included; None = all
    mamba_inner_layernorms: bool = True  # of delta, B and C
    mlp_bias: bool = False  # in the three projections, also the experts'
    routing: str = "softmax"  # or "sigmoid" gates; "sinkhorn": these, and in training a choice even over all tokens
    norm_topk_prob: bool = False  # the K router weights are divided by their sum
    router_bias: bool = False
    final_norm: str = "rms"  # "layer": a LayerNorm with bias
    head_bias: bool = False
    residual_in_fp32: bool = False  # the residual stream, also in a model of half precision
    model_type: str | None = field(default=None, compare=False)  # layout to save in; None = the first that can say it

    def __post_init__(self):
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for entry in fields(self):
            _check_value(entry, getattr(self, entry.name))
        if self.mamba_dt_rank == "auto":
            object.__setattr__(self, "mamba_dt_rank", math.ceil(self.hidden_size / 16))
        _check_dt_rank(self.mamba_dt_rank)
        _check_choices(self)
        _check_schedule(self)
        _check_pattern(self)
        _check_heads(self)
        _check_tokens(self)
        _check_family(self)

    @property
    def head_dim(self) -> int:
        """p, width of one attention head."""
        return self.head_width or self.hidden_size // self.num_attention_heads

    @property
    def d_inner(self) -> int:
        """c, channels inside a Mamba mixer."""
        return self.mamba_expand * self.hidden_size

    @property
    def layers(self) -> tuple[Layer, ...]:
        """What each layer holds, from the embedding upwards."""
        return tuple(self._layer(i) for i in range(self.num_hidden_layers))

    def _layer(self, i: int) -> Layer:
        if self.pattern:
            codes = self.pattern.split()
            mixer, feed_forward = codes[i % len(codes)]
            return Layer(MIXERS[mixer], FEED_FORWARDS[feed_forward])
        attends = i % self.attn_layer_period == self.attn_layer_offset
        routes = self.num_experts > 1 and i % self.expert_layer_period == self.expert_layer_offset
        return Layer("attention" if attends else "mamba", "moe" if routes else "mlp")

    @property
    def schedule(self) -> str:
        """The layers as text, "m+ mE m+ mE A+ mE ...": m Mamba, A attention; + MLP, E mixture of experts; - nothing."""
        mixers, feed_forwards = ({part: code for code, part in codes.items()} for codes in (MIXERS, FEED_FORWARDS))
        return " ".join(mixers[layer.mixer] + feed_forwards[layer.feed_forward] for layer in self.layers)

    @property
    def family(self) -> Family:
        """The family in whose layout the model is saved: that of model_type, or else the first that can say it."""
        if self.model_type is not None:
            return FAMILIES[self.model_type]
        return next(family for family in FAMILIES.values() if family.why_not(self) is None)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The tokens that end a text: eos_token_id as a tuple, empty for None."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @classmethod
    def from_dict(cls, values: dict) -> "JambaConfig":
        """The config that a released config.json's content describes, of any family in `families.FAMILIES`.

        Unknown fields are ignored, absent ones take the family's defaults, as in transformers; names of first releases
        (n_ctx) and of other writers (torch_dtype, num_local_experts) are understood.

        Raises: ValueError for another architecture, a setting that is not built here, or a contradiction.
        """
        config = cls(**read_config(values))
        if values.get("head_dim") not in (None, config.head_dim):
            raise ValueError(
                f"head_dim is {values['head_dim']!r}, but hidden_size {config.hidden_size} over num_attention_heads "
                f"{config.num_attention_heads} gives {config.head_dim}: remove head_dim or correct one of the three"
            )
        return config

    @classmethod
    def from_json(cls, path: str | Path) -> "JambaConfig":
        """`from_dict` of a config.json, given as the file or as the folder that holds it.

        Raises: ValueError naming the file where it is missing, is not JSON, or is refused by `from_dict`.
        """
        file = Path(path)
        if file.is_dir():
            file = file / "config.json"
        if not file.is_file():
            raise ValueError(f"{file} does not exist: give a config.json, or the folder of a checkpoint that holds one")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not JSON ({error}): download or write it again") from None
        if not isinstance(values, dict):
            raise ValueError(f"{file} holds a JSON {type(values).__name__}, but a config is an object: {{...}}")
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    def to_dict(self) -> dict:
        """The content of a config.json, which transformers' AutoConfig reads with the same meaning.

        Except for BlackMamba, which transformers does not have, and models that only `family` "minijamba" can hold.
        """
        return write_config(self)


def _check_value(entry: Field, value) -> None:
    """Type and range of one field by its annotation: sizes from 1, offsets from 0."""
    name = entry.name
    if value is None and str(entry.type).endswith("| None"):
        return
    if entry.type is int or name in ("head_width", "sliding_window"):
        least = 0 if name.endswith("_offset") else 1
        if type(value) is not int or value < least:
            raise ValueError(f"{name} is {value!r}, but must be a whole number of at least {least}")
    if entry.type is bool and type(value) is not bool:
        raise ValueError(f"{name} is {value!r}, but must be true or false")
    if entry.type is float and (type(value) not in (int, float) or not 0 <= value < math.inf):
        raise ValueError(f"{name} is {value!r}, but must be a number of at least 0, such as {entry.default}")
    if name == "rope_theta" and (type(value) not in (int, float) or not 1 < value < math.inf):
        raise ValueError(f"rope_theta is {value!r}, but must be a number above 1, as 10000, or null for no positions")


def _check_dt_rank(rank) -> None:
    if type(rank) is not int or rank < 1:
        raise ValueError(f'mamba_dt_rank is {rank!r}, but must be a whole number of at least 1, or "auto"')


def _check_choices(config: JambaConfig) -> None:
    choices = {"hidden_act": ACTIVATIONS, "dtype": DTYPES, "routing": ROUTINGS, "final_norm": FINAL_NORMS}
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} is {getattr(config, name)!r}, but must be one of {', '.join(allowed)}")


def _check_heads(config: JambaConfig) -> None:
    if all(layer.mixer != "attention" for layer in config.layers):
        return
    d, h, g = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    if config.head_width is None and d % h:
        raise ValueError(f"hidden_size {d} is not a multiple of num_attention_heads {h}: change one of them")
    if h % g:
        raise ValueError(f"num_attention_heads {h} is not a multiple of num_key_value_heads {g}: change one of them")
    if config.rope_theta is not None and config.head_dim % 2:
        raise ValueError(f"heads are {config.head_dim} wide, but rotary positions turn pairs: give an even width")


def _check_schedule(config: JambaConfig) -> None:
    for kind in ("attn", "expert"):
        period, offset = getattr(config, f"{kind}_layer_period"), getattr(config, f"{kind}_layer_offset")
        if offset >= period:
            raise ValueError(
                f"{kind}_layer_offset {offset} is not below {kind}_layer_period {period}: "
                f"give an offset from 0 to {period - 1}, or a longer period"
            )
    e, k = config.num_experts, config.num_experts_per_tok
    if e > 1 and k > e:
        raise ValueError(f"num_experts_per_tok {k} is above num_experts {e}: a token can use at most every expert")


def _check_pattern(config: JambaConfig) -> None:
    pattern = config.pattern
    if pattern is None:
        return
    codes = pattern.split() if isinstance(pattern, str) else []
    wrong = [c for c in codes if len(c) != 2 or c[0] not in MIXERS or c[1] not in FEED_FORWARDS or c == "--"]
    if wrong or not codes:
        raise ValueError(
            f"pattern is {pattern!r}, but must be layers such as 'm+ mE A+ -E': m Mamba, A attention, - no mixer; "
            f"+ MLP, E experts, - no feed-forward"
        )
    if len(codes) > config.num_hidden_layers:
        raise ValueError(
            f"pattern has {len(codes)} layers, but num_hidden_layers is {config.num_hidden_layers}: change one of them"
        )
    if all(code[0] == "-" for code in codes):
        raise ValueError(f"pattern {pattern!r} has no mixer, so no token would see another: give a layer one")
    if config.num_experts == 1 and any(code[1] == "E" for code in codes):
        raise ValueError(f"pattern {pattern!r} has layers with experts, but num_experts is 1: give more, or write +")


def _check_tokens(config: JambaConfig) -> None:
    ids = [("bos_token_id", config.bos_token_id), ("pad_token_id", config.pad_token_id)]
    ids += [("eos_token_id", token) for token in config.stop_tokens]
    for name, token in ids:
        if token is not None and (type(token) is not int or not 0 <= token < config.vocab_size):
            raise ValueError(
                f"{name} is {token!r}, but vocab_size {config.vocab_size} allows 0 to {config.vocab_size - 1}: "
                f"correct one of them, or give None"
            )


def _check_family(config: JambaConfig) -> None:
    name = config.model_type
    if name is None:
        return
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"model_type is {name!r}, but must be one of {', '.join(FAMILIES)}, or null")
    if reason := FAMILIES[name].why_not(config):
        raise ValueError(
            f"model_type is {name!r}, but a model of that family {reason}: change one of them, or give no model_type"
        )


def _mamba(layers: int, width: int) -> dict:
    return {**FAMILIES["mamba"].start, **FAMILIES["mamba"].same, "num_hidden_layers": layers, "hidden_size": width}


def _blackmamba(layers: int, width: int, inner: int) -> dict:
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": inner, "num_experts": 8}
    return {
        **FAMILIES["blackmamba"].start, **FAMILIES["blackmamba"].same, **sizes, "vocab_size": 50304,
        "pattern": "m- -E", "routing": "sinkhorn",
    }  # fmt: skip


def _transformer(family: str, **sizes) -> dict:
    return {**FAMILIES[family].start, **FAMILIES[family].same, **sizes}


def _llama(width: int, inner: int, layers: int, heads: int, key_heads: int) -> dict:
    return _transformer(
        "llama", hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, rms_norm_eps=1e-5, max_position_embeddings=4096, dtype="float16",
    )  # fmt: skip


# Differences to the defaults. Released checkpoints first, Jamba's and then those that the papers compare with; sizes to
# train here last.
PRESETS = {
    "jamba-v0.1": {},
    "jamba-1.5-mini": {"eos_token_id": (2, 518)},
    "jamba-1.5-large": {
        "hidden_size": 8192,
        "intermediate_size": 24576,
        "num_hidden_layers": 72,
        "num_attention_heads": 64,
        "eos_token_id": (2, 518),
    },
    "jamba-reasoning-3b": {
        "hidden_size": 2560,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 20,
        "num_key_value_heads": 1,
        "attn_layer_period": 14,
        "attn_layer_offset": 7,
        "num_experts": 1,
        "tie_word_embeddings": True,
        "eos_token_id": (2, 519),
    },
    # Inferred from the parameter count and file size of the checkpoint; its own config may differ.
    "jamba-tiny-dev": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_experts": 8,
    },
    "jamba-tiny-random": {
        "hidden_size": 128,
        "num_hidden_layers": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "num_experts": 4,
    },
    "mixtral-8x7b": _transformer("mixtral", router_aux_loss_coef=0.02, max_position_embeddings=32768),
    "mistral-7b": _transformer("mistral", rms_norm_eps=1e-5, max_position_embeddings=32768),
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32),
    "llama-2-13b": _llama(5120, 13824, 40, 40, 40),
    "llama-2-70b": _llama(8192, 28672, 80, 64, 8),
    "mamba-130m": _mamba(24, 768),
    "mamba-370m": _mamba(48, 1024),
    "mamba-790m": _mamba(48, 1536),
    "mamba-1.4b": _mamba(48, 2048),
    "mamba-2.8b": _mamba(64, 2560),
    # The sizes of the smaller one fit its published counts; its config.json was not seen.
    "blackmamba-1.5b": _blackmamba(30, 1152, 3072),
    "blackmamba-2.8b": _blackmamba(36, 1472, 3872),
    # For tests: 163 thousand parameters, every kind of layer that Jamba-v0.1 has.
    "tiny": {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "mamba_d_state": 8,
        "max_position_embeddings": 1024,
        "dtype": "float32",
    },
    # One Jamba block of a million parameters: a minute of training on a laptop.
    "tour": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "max_position_embeddings": 4096,
        "dtype": "float32",
    },
    # One Jamba block of twenty million: an evening on a laptop, minutes on a GPU.
    "small": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "max_position_embeddings": 8192,
        "dtype": "float32",
    },
}


def preset(name: str, **changes) -> JambaConfig:
    """A named configuration, with any fields changed: `preset("tiny", num_experts=1)`.

    Raises: ValueError for an unknown name, listing the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset is called {name!r}: choose one of {', '.join(PRESETS)}")
    return JambaConfig(**{**PRESETS[name], **changes})
