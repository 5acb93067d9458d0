"""The configuration of a Jamba: sizes, schedule of layers, presets, and config.json in and out.

Field names are those of the released config.json files; the comment beside each gives the paper's letter.
Source: Jamba (arXiv 2403.19887), sections 2 and 3.1; released config.json files.
"""

import json
import math
from dataclasses import Field, asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

ARCHITECTURE = "JambaForCausalLM"
MODEL_TYPE = "jamba"
DTYPES = ("float32", "bfloat16", "float16")

# Other names under which a config.json may hold one of our fields.
ALIASES = {"torch_dtype": "dtype", "n_ctx": "max_position_embeddings", "num_local_experts": "num_experts"}

# Fields that we do not keep, because any other value would be a different model.
ONLY_VALUE = {"sliding_window": None, "mamba_inner_layernorms": True}


class Layer(NamedTuple):
    """One layer: a mixer, then a feed-forward part, each behind its own norm and residual."""

    mixer: str  # "mamba" or "attention"
    feed_forward: str  # "mlp" or "moe"


@dataclass(frozen=True)
class JambaConfig:
    """Sizes and schedule of a Jamba; the defaults are Jamba-v0.1.

        layer i holds attention  iff  i mod attn_layer_period == attn_layer_offset, else Mamba
        layer i holds experts    iff  i mod expert_layer_period == expert_layer_offset and num_experts > 1, else an MLP

    Schedules without one of the parts use the same fields. Four layers with attn_layer_period=4, attn_layer_offset=2
    are "m+ mE A+ mE"; changed by

        num_experts=1                                 "m+ m+ A+ m+"  no experts: an MLP everywhere and no router
        expert_layer_period=1, expert_layer_offset=0  "mE mE AE mE"  experts everywhere
        attn_layer_period=5, attn_layer_offset=4      "m+ mE m+ mE"  no attention: it would come with a fifth layer
        attn_layer_period=1, attn_layer_offset=0      "A+ AE A+ AE"  attention everywhere

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

    def __post_init__(self):
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for field in fields(self):
            _check_value(field, getattr(self, field.name))
        if self.mamba_dt_rank == "auto":
            object.__setattr__(self, "mamba_dt_rank", math.ceil(self.hidden_size / 16))
        _check_dt_rank(self.mamba_dt_rank)
        _check_choices(self)
        _check_heads(self)
        _check_schedule(self)
        _check_tokens(self)

    @property
    def head_dim(self) -> int:
        """p, width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def d_inner(self) -> int:
        """c, channels inside a Mamba mixer."""
        return self.mamba_expand * self.hidden_size

    @property
    def layers(self) -> tuple[Layer, ...]:
        """What each layer holds, from the embedding upwards."""
        return tuple(self._layer(i) for i in range(self.num_hidden_layers))

    def _layer(self, i: int) -> Layer:
        attends = i % self.attn_layer_period == self.attn_layer_offset
        routes = self.num_experts > 1 and i % self.expert_layer_period == self.expert_layer_offset
        return Layer("attention" if attends else "mamba", "moe" if routes else "mlp")

    @property
    def schedule(self) -> str:
        """The layers as text, "m+ mE m+ mE A+ mE ...": m Mamba, A attention; + MLP, E mixture of experts."""
        mixer = {"mamba": "m", "attention": "A"}
        feed_forward = {"mlp": "+", "moe": "E"}
        return " ".join(mixer[layer.mixer] + feed_forward[layer.feed_forward] for layer in self.layers)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The tokens that end a text: eos_token_id as a tuple, empty for None."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @classmethod
    def from_dict(cls, values: dict) -> "JambaConfig":
        """The config that a released config.json's content describes.

        Unknown fields are ignored, absent ones take the defaults (Jamba-v0.1's, as in transformers); names of the
        first release (n_ctx) and of other writers (torch_dtype, num_local_experts) are understood.

        Raises: ValueError for another architecture, a setting that Jamba does not have, or a contradiction.
        """
        _check_architecture(values)
        for name, only in ONLY_VALUE.items():
            if values.get(name, only) != only:
                raise ValueError(
                    f"{name} is {values[name]!r}, but every Jamba has {json.dumps(only)}: this is another model, "
                    f"and ignoring the field would give wrong logits"
                )
        config = cls(**_known_fields(values))
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
        """The content of a config.json that transformers' AutoConfig reads with the same meaning."""
        values = {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE, **asdict(self)}
        # Every release of transformers reads torch_dtype; only the later ones read dtype.
        values["torch_dtype"] = values.pop("dtype")
        if isinstance(self.eos_token_id, tuple):
            values["eos_token_id"] = list(self.eos_token_id)
        return values


def _known_fields(values: dict) -> dict:
    """The entries of `values` that are fields, under our names; null key/value heads are as many as query heads."""
    names = {field.name for field in fields(JambaConfig)}
    known = {}
    for given, value in values.items():
        name = ALIASES.get(given, given)
        if name not in names or (value is None and name == "dtype"):
            continue
        if name in known and known[name] != value:
            raise ValueError(f"{given} is {value!r}, but {name} is {known[name]!r}: two names of one field, remove one")
        known[name] = value
    if known.get("num_key_value_heads", 0) is None:
        known["num_key_value_heads"] = known.get("num_attention_heads", JambaConfig.num_attention_heads)
    return known


def _check_architecture(values: dict) -> None:
    model_type = values.get("model_type")
    architectures = values.get("architectures") or []
    if model_type is None and not architectures:
        raise ValueError(
            f"model_type and architectures are absent, so nothing says that this is a Jamba: "
            f'if it is one, add "model_type": "{MODEL_TYPE}"'
        )
    if model_type not in (None, MODEL_TYPE):
        raise ValueError(f"model_type is {model_type!r}, but only {MODEL_TYPE!r} is built here: give a Jamba's config")
    if architectures and ARCHITECTURE not in architectures:
        raise ValueError(
            f"architectures is {architectures!r}, but only {ARCHITECTURE} is built here: give a checkpoint with a "
            f"language-model head"
        )


def _check_value(field: Field, value) -> None:
    """Type and range of one field by its annotation: sizes from 1, offsets from 0."""
    name = field.name
    if field.type is int:
        least = 0 if name.endswith("_offset") else 1
        if type(value) is not int or value < least:
            raise ValueError(f"{name} is {value!r}, but must be a whole number of at least {least}")
    if field.type is bool and type(value) is not bool:
        raise ValueError(f"{name} is {value!r}, but must be true or false")
    if field.type is float and (type(value) not in (int, float) or not 0 <= value < math.inf):
        raise ValueError(f"{name} is {value!r}, but must be a number of at least 0, such as {field.default}")


def _check_dt_rank(rank) -> None:
    if type(rank) is not int or rank < 1:
        raise ValueError(f'mamba_dt_rank is {rank!r}, but must be a whole number of at least 1, or "auto"')


def _check_choices(config: JambaConfig) -> None:
    if config.hidden_act != "silu":
        raise ValueError(f'hidden_act is {config.hidden_act!r}, but every Jamba uses "silu": set hidden_act to "silu"')
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype is {config.dtype!r}, but must be one of {', '.join(DTYPES)}")


def _check_heads(config: JambaConfig) -> None:
    d, h, g = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    if d % h:
        raise ValueError(f"hidden_size {d} is not a multiple of num_attention_heads {h}: change one of them")
    if h % g:
        raise ValueError(f"num_attention_heads {h} is not a multiple of num_key_value_heads {g}: change one of them")


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


def _check_tokens(config: JambaConfig) -> None:
    ids = [("bos_token_id", config.bos_token_id), ("pad_token_id", config.pad_token_id)]
    ids += [("eos_token_id", token) for token in config.stop_tokens]
    for name, token in ids:
        if token is not None and (type(token) is not int or not 0 <= token < config.vocab_size):
            raise ValueError(
                f"{name} is {token!r}, but vocab_size {config.vocab_size} allows 0 to {config.vocab_size - 1}: "
                f"correct one of them, or give None"
            )


# Differences to the defaults. Released checkpoints first, then sizes to train here.
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
