"""What differs from one family of models to the next in released files: config.json, and the names of the tensors.

Everywhere else a model is its `JambaConfig`, whatever paper it comes from. A family is one entry of FAMILIES, and the
layout in which a model is saved is that of the first family which can hold it.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

# What only some families have, by the parts that need it: our field -> its value where a family says nothing else.
FEATURES = {
    "A": {"head_width": None, "attention_bias": False, "rope_theta": None, "sliding_window": None},
    "m": {"mamba_inner_layernorms": True, "mamba_proj_bias": False, "mamba_conv_bias": True},
    "+E": {"hidden_act": "silu", "mlp_bias": False},
    "E": {"num_experts_per_tok": None, "norm_topk_prob": False, "routing": "softmax", "router_bias": False},
    "mA+E": {"tie_word_embeddings": False, "head_bias": False, "final_norm": "rms", "residual_in_fp32": False},
}


@dataclass(frozen=True)
class Family:
    """How the models of one family are written down."""

    name: str  # model_type in config.json
    architecture: str  # in config.json
    codes: str  # of the layers that it may have, as in `JambaConfig.schedule`
    fields: dict[str, str]  # our field -> its name in config.json
    derived: tuple[str, ...] = ()  # our fields that `read` and `write` translate
    start: dict = field(default_factory=dict)  # our fields where config.json is silent
    same: dict = field(default_factory=dict)  # our fields that are alike in all its models, and not in config.json
    # Entries of config.json whose every other value would be another model.
    only: dict = field(default_factory=dict)
    # Part of a tensor's name in a Jamba -> the part of this family's. Tensors that come to share one name are stored as
    # one, the rows of the first before those of the next.
    names: dict[str, str] = field(default_factory=dict)
    older: dict[str, str] = field(default_factory=dict)  # part of that name -> one under which it may also be stored
    passed_over: str | None = None  # ends of names of stored tensors that hold nothing that was learned
    pickle: str | None = None  # the file, where the family was released as a pickle
    read: Callable[[dict], dict] = dict  # config.json -> the same, with the `derived` fields under our names
    write: Callable = lambda config: {}  # config -> the entries of config.json that say these
    misfit: Callable = lambda config: None  # config -> what this family cannot say of it, or None

    def fixed(self, codes: str) -> dict:
        """What layers of these codes have in all models of the family, since its files cannot say it."""
        said = (*self.fields, *self.derived)
        return {name: self.same.get(name, usual) for name, usual in features(codes).items() if name not in said}

    def why_not(self, config) -> str | None:
        """What of a config these files cannot say; None where they say it all."""
        if others := sorted(set(config.schedule.split()) - set(self.codes.split())):
            return f"has no layers {' '.join(others)}"
        for name, wanted in self.fixed(config.schedule).items():
            if getattr(config, name) != wanted:
                return f"has {name} {json.dumps(wanted)} and not {json.dumps(getattr(config, name))}"
        return self.misfit(config)


def features(codes: str) -> dict:
    """What layers of these codes may have, and its usual value."""
    present = set(codes)
    return {name: usual for parts, some in FEATURES.items() if present & set(parts) for name, usual in some.items()}


def family_of(values: dict) -> str:
    """The family that a config.json's content names, or shows by its fields. Raises: ValueError."""
    _check_kinds({name: values.get(name) for name in ("model_type", "architectures")})
    model_type, architectures = values.get("model_type"), values.get("architectures") or []
    if model_type is None:
        named = [name for name, family in FAMILIES.items() if family.architecture in architectures]
        shown = [name for sign, name in SIGNS.items() if sign in values]
        if not (named or shown) and not architectures:
            raise ValueError(
                f"model_type and architectures are absent, so nothing says which model this is: "
                f'add "model_type", one of {", ".join(FAMILIES)}'
            )
        model_type = [*named, *shown, None][0]
    if model_type is not None and model_type not in FAMILIES:
        raise ValueError(
            f"model_type is {model_type!r}, but only {', '.join(FAMILIES)} are built here: give one of theirs"
        )
    if model_type is None or (architectures and FAMILIES[model_type].architecture not in architectures):
        wanted = FAMILIES[model_type or "jamba"].architecture
        raise ValueError(
            f"architectures is {architectures!r}, but only models with a language-model head are built here, of this "
            f"family {wanted}: give such a checkpoint"
        )
    return model_type


def read_config(values: dict) -> dict:
    """The fields of a `JambaConfig` that a config.json's content describes; unknown entries are ignored.

    Raises: ValueError for a family or a setting that is not built here, or two names of one field that disagree.
    """
    model_type = family_of(values)
    family = FAMILIES[model_type]
    _check_kinds(values)
    values = family.read(values)
    for name, only in (family.fixed(family.codes) | family.only).items():
        if values.get(name) is not None and values[name] != only:
            raise ValueError(
                f"{name} is {json.dumps(values[name])}, but every {model_type} built here has {json.dumps(only)}: this "
                f"is another model, and ignoring the field would give wrong logits"
            )
    found = {"model_type": model_type, **family.start, **family.same}
    given = {}
    derived = {name: name for name in family.derived}
    for ours, theirs in [*family.fields.items(), *derived.items(), ("dtype", "dtype"), ("dtype", "torch_dtype")]:
        if theirs not in values or (ours == "dtype" and values[theirs] is None):
            continue
        if ours in given and given[ours] != values[theirs]:
            raise ValueError(
                f"{theirs} is {values[theirs]!r}, but {ours} is {given[ours]!r}: two names of one field, remove one"
            )
        given[ours] = values[theirs]
    return found | given


def write_config(config) -> dict:
    """The content of a config.json, in the layout of the config's family."""
    family = config.family
    values = {theirs: getattr(config, ours) for ours, theirs in family.fields.items()}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    # Every release of transformers reads torch_dtype; only the later ones read dtype.
    about = {"architectures": [family.architecture], "model_type": family.name}
    return about | values | family.write(config) | {"torch_dtype": config.dtype}


# Entries that are looked at before `JambaConfig` checks its fields.
KINDS = {
    str: ("model_type", "routing_mode"),
    list: ("architectures", "mamba_moe_layers"),
    dict: ("ssm_cfg",),
    int: ("num_layers", "vocab_size", "pad_vocab_size_multiple", "hidden_size", "num_attention_heads", "head_dim"),
}


def _check_kinds(values: dict) -> None:
    for kind, names in KINDS.items():
        for name in names:
            value = values.get(name)
            if value is not None and (not isinstance(value, kind) or (kind is int and (value is True or value < 1))):
                wanted = {str: "a word", list: "a list", dict: "an object", int: "a whole number of at least 1"}[kind]
                raise ValueError(f"{name} is {value!r}, but must be {wanted}")


def _check_same(values: dict, name: str, other: str, value) -> None:
    """ValueError if `values` has another value under `name` than the `other` name says."""
    if values.get(name, value) not in (None, value):
        raise ValueError(f"{other} is {value!r}, but {name} is {values[name]!r}: two names of one field, remove one")


def rename(name: str, table: dict[str, str]) -> str:
    for part, other in table.items():
        name = name.replace(part, other)
    return name


# Jamba


def _read_jamba(values: dict) -> dict:
    """Other writers' names; and null key/value heads are as many as query heads."""
    values = dict(values)
    for older, name in {"n_ctx": "max_position_embeddings", "num_local_experts": "num_experts"}.items():
        if older in values:
            _check_same(values, name, older, values[older])
            values[name] = values[older]
    return _all_heads(values)


def _all_heads(values: dict) -> dict:
    if values.get("num_key_value_heads", 0) is None:
        values = values | {"num_key_value_heads": values.get("num_attention_heads", 32)}
    return values


def _write_jamba(config) -> dict:
    return _periods(config) | {"hidden_act": "silu"} | ({"pattern": config.pattern} if config.pattern else {})


def _periods(config) -> dict | None:
    """The fields attn_layer_* and expert_layer_* that give the layers of a config; None if there are none."""
    found = {}
    for kind, flags in {
        "attn": [layer.mixer == "attention" for layer in config.layers],
        "expert": [layer.feed_forward == "moe" for layer in config.layers],
    }.items():
        spacing = getattr(config, f"{kind}_layer_period"), getattr(config, f"{kind}_layer_offset")
        if config.pattern and (spacing := _spacing(flags)) is None:
            return None
        found |= {f"{kind}_layer_period": spacing[0], f"{kind}_layer_offset": spacing[1]}
    return found


def _spacing(flags: list[bool]) -> tuple[int, int] | None:
    """Period and offset of the flags that are set; None if they do not stand at regular distances."""
    places = [i for i, flag in enumerate(flags) if flag]
    if not places:
        return len(flags) + 1, len(flags)
    offset, period = places[0], places[1] - places[0] if len(places) > 1 else len(flags) + 1
    regular = offset < period and flags == [i % period == offset for i in range(len(flags))]
    return (period, offset) if regular else None


# Transformers


def _read_transformer(values: dict) -> dict:
    """Rotary positions as transformers 4 or 5 writes them; a head's width only where it is another than d / h."""
    values = _all_heads(dict(values))
    names = ("rope_parameters", "rope_scaling", "partial_rotary_factor")
    _check_rope({name: values[name] for name in names if values.get(name)})
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if rope.get("rope_theta") is not None:
        _check_same(values, "rope_theta", "rope_parameters.rope_theta", rope["rope_theta"])
        values["rope_theta"] = rope["rope_theta"]
    width, heads = values.get("hidden_size") or 4096, values.get("num_attention_heads") or 32
    if values.get("head_dim") is not None and values["head_dim"] * heads != width:
        values["head_width"] = values["head_dim"]
    return {name: value for name, value in values.items() if name != "rope_theta" or value is not None}


def _check_rope(said: dict) -> None:
    plain = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}
    entries = [value if isinstance(value, dict) else {name: value} for name, value in said.items()]
    for entry in entries:
        for name, value in entry.items():
            if name != "rope_theta" and value not in (None, plain.get(name)):
                raise ValueError(
                    f"the rotary positions are {json.dumps(said)}, but only plain ones are built here, with rope_type "
                    f"default: ignoring the rest would give wrong logits"
                )


def _read_llama(values: dict) -> dict:
    """As many key/value heads as query heads, where the file says nothing of them."""
    return _read_transformer({"num_key_value_heads": None} | values)


def _no_positions(config) -> str | None:
    return "has rotary positions, a rope_theta" if config.rope_theta is None else None


def _write_transformer(config) -> dict:
    return {"head_dim": config.head_dim}


# Mamba


def _read_mamba(values: dict) -> dict:
    """The config.json of state-spaces' own releases, under the names of transformers' Mamba.

    Files for transformers that were made from it may keep the older names beside its own, which then count.
    """
    if "d_model" not in values:
        return values
    if "hidden_size" in values:
        _check_same(values, "hidden_size", "d_model", values["d_model"])
        _check_same(values, "num_hidden_layers", "n_layer", values.get("n_layer", values.get("num_hidden_layers")))
        return values
    ssm = {"layer": "Mamba1", **(values.get("ssm_cfg") or {})}
    refused = {
        "ssm_cfg.layer": (ssm["layer"], "Mamba1"),
        "d_intermediate": (values.get("d_intermediate", 0), 0),
        "attn_layer_idx": (values.get("attn_layer_idx") or [], []),
        "rms_norm": (values.get("rms_norm", True), True),
    }
    for name, (value, only) in refused.items():
        if value != only:
            raise ValueError(f"{name} is {value!r}, but only {only!r} is built here: this is another model than Mamba")
    multiple = values.get("pad_vocab_size_multiple") or 8
    names = {"d_model": "hidden_size", "n_layer": "num_hidden_layers", "tie_embeddings": "tie_word_embeddings"}
    inner = {
        "d_state": "state_size", "d_conv": "conv_kernel", "expand": "expand", "dt_rank": "time_step_rank",
        "bias": "use_bias", "conv_bias": "use_conv_bias",
    }  # fmt: skip
    found = {new: values[old] for old, new in names.items() if old in values}
    found |= {new: ssm[old] for old, new in inner.items() if old in ssm}
    found |= {name: values[name] for name in ("residual_in_fp32", "dtype", "torch_dtype") if name in values}
    return found | {"vocab_size": math.ceil((values.get("vocab_size") or 50277) / multiple) * multiple}


# BlackMamba


def _read_blackmamba(values: dict) -> dict:
    codes = _blackmamba_codes(values)
    experts = {int(code) for code in codes if code not in "r1"}
    if len(experts) > 1:
        raise ValueError(f"mamba_moe_layers has blocks of {sorted(experts)} experts: only one number is built here")
    modes, mode = {"sinkhorn": "sinkhorn", "top1": "softmax"}, values.get("routing_mode") or "sinkhorn"
    if mode not in modes:
        raise ValueError(f"routing_mode is {mode!r}, but only sinkhorn and top1 are built here")
    layers = {"r": "m-", "1": "-+"}
    return values | {
        "num_layers": len(codes),
        "pattern": _unit([layers.get(code, "-E") for code in codes]),
        "num_experts": max(experts, default=1),
        "routing": modes[mode],
        **{f"{part}_bias": values.get("add_bias_linear", False) for part in ("mamba_proj", "mlp", "head")},
    }


def _blackmamba_codes(values: dict) -> list[str]:
    """A character a block: r for Mamba, or how many experts it has."""
    layers = values.get("num_layers")
    codes = [str(code) for code in values.get("mamba_moe_layers") or ["r"] * (layers or 0)]
    if not codes:
        raise ValueError("num_layers and mamba_moe_layers are absent, so the number of blocks is unknown: add one")
    if layers not in (None, len(codes)):
        raise ValueError(f"mamba_moe_layers has {len(codes)} blocks, but num_layers is {layers}: correct one of them")
    for code in codes:
        if not re.fullmatch("r|[1-9]", code):
            parallel = ": two characters are a Mamba and a feed-forward side by side, which is not built here"
            why = parallel if len(code) > 1 else ""
            raise ValueError(f"mamba_moe_layers has a block {code!r}{why}; give r, or 1 to 9")
    return codes


def _unit(codes: list[str]) -> str:
    """The shortest pattern that gives these codes when it is repeated."""
    length = next(n for n in range(1, len(codes) + 1) if all(code == codes[i % n] for i, code in enumerate(codes)))
    return " ".join(codes[:length])


def _write_blackmamba(config) -> dict:
    codes = {"m-": "r", "-+": "1", "-E": str(config.num_experts)}
    return {
        "mamba_moe_layers": [codes[code] for code in config.schedule.split()],
        "add_bias_linear": config.mlp_bias,
        "swiglu": True,
        "routing_mode": {"sinkhorn": "sinkhorn", "softmax": "top1"}[config.routing],
    }


def _no_blackmamba(config) -> str | None:
    if not config.mamba_proj_bias == config.mlp_bias == config.head_bias:
        return "has one switch, add_bias_linear, for mamba_proj_bias, mlp_bias and head_bias"
    if config.routing == "sigmoid":
        return "has routing sinkhorn or softmax and not sigmoid"
    if config.num_experts > 9:
        return f"has 9 experts at most and not {config.num_experts}"
    if config.mamba_dt_rank != math.ceil(config.hidden_size / 16):
        return f"has mamba_dt_rank ceil(hidden_size / 16) and not {config.mamba_dt_rank}"
    return None if config.rms_norm_eps == 1e-5 else f"has rms_norm_eps 1e-05 and not {config.rms_norm_eps:g}"


def _itself(*names: str) -> dict[str, str]:
    return {name: name for name in names}


# Fields that have the same name in the config.json of some families.
_SIZES = _itself("vocab_size", "hidden_size", "num_hidden_layers")
_TOKENS = _itself("bos_token_id", "eos_token_id", "pad_token_id")
_ATTENTION = _itself("num_attention_heads", "num_key_value_heads")
_COMMON = _itself(
    "intermediate_size", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "initializer_range"
)  # fmt: skip
_EXPERTS = _itself("num_experts_per_tok", "router_aux_loss_coef")
_MAMBA = _itself("mamba_d_state", "mamba_d_conv", "mamba_expand", "mamba_dt_rank", "mamba_conv_bias", "mamba_proj_bias")
_SCHEDULE = _itself(
    "attn_layer_period", "attn_layer_offset", "expert_layer_period", "expert_layer_offset", "num_experts"
)  # fmt: skip

_TRANSFORMER = _SIZES | _COMMON | _ATTENTION | _TOKENS | _itself("hidden_act", "rope_theta")
_TRANSFORMER_NAMES = {"pre_ff_layernorm": "post_attention_layernorm", "model.final_layernorm": "model.norm"}
_ATTENTION_EVERYWHERE = {"attn_layer_period": 1, "attn_layer_offset": 0}

_FAMILIES = (
    Family(
        name="jamba",
        architecture="JambaForCausalLM",
        codes="m+ mE A+ AE",
        fields=_SIZES | _COMMON | _ATTENTION | _SCHEDULE | _EXPERTS | _MAMBA | _TOKENS,
        derived=("pattern",),
        # The first release, March 2024, where a dense layer was an only expert without a router.
        older={
            "feed_forward.gate_proj": "moe.experts.0.gate_proj",
            "feed_forward.up_proj": "moe.experts.0.up_proj",
            "feed_forward.down_proj": "moe.experts.0.down_proj",
            "feed_forward.": "moe.",
            "pre_ff_layernorm": "pre_moe_layernorm",
            "b_layernorm": "B_layernorm",
            "c_layernorm": "C_layernorm",
        },
        read=_read_jamba,
        write=_write_jamba,
        misfit=lambda config: None if _periods(config) else "has attention, and experts, at regular distances",
    ),
    Family(
        name="llama",
        architecture="LlamaForCausalLM",
        codes="A+",
        fields=_TRANSFORMER | _itself("attention_bias", "mlp_bias"),
        derived=("head_width",),
        start={
            "vocab_size": 32000, "intermediate_size": 11008, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
            "rope_theta": 1e4, "pad_token_id": None,
        },
        same=_ATTENTION_EVERYWHERE | {"num_experts": 1},
        names={"feed_forward.": "mlp."} | _TRANSFORMER_NAMES,
        passed_over="rotary_emb.inv_freq",  # in early files: the rates of the positions, which follow from rope_theta
        read=_read_llama,
        write=_write_transformer,
        misfit=_no_positions,
    ),
    Family(
        name="mistral",
        architecture="MistralForCausalLM",
        codes="A+",
        fields=_TRANSFORMER | _itself("sliding_window"),
        derived=("head_width",),
        start={
            "vocab_size": 32000, "intermediate_size": 14336, "rms_norm_eps": 1e-6, "max_position_embeddings": 131072,
            "rope_theta": 1e4, "pad_token_id": None, "num_key_value_heads": 8, "sliding_window": 4096,
        },
        same=_ATTENTION_EVERYWHERE | {"num_experts": 1},
        names={"feed_forward.": "mlp."} | _TRANSFORMER_NAMES,
        read=_read_transformer,
        write=_write_transformer,
        misfit=_no_positions,
    ),
    Family(
        name="mixtral",
        architecture="MixtralForCausalLM",
        codes="AE",
        fields=_TRANSFORMER | _EXPERTS | _itself("sliding_window") | {"num_experts": "num_local_experts"},
        derived=("head_width",),
        start={
            "vocab_size": 32000, "intermediate_size": 14336, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
            "rope_theta": 1e6, "pad_token_id": None, "num_key_value_heads": 8, "num_experts": 8,
        },
        same=_ATTENTION_EVERYWHERE | {"expert_layer_period": 1, "expert_layer_offset": 0, "norm_topk_prob": True},
        only={"router_jitter_noise": 0.0},
        names={
            "feed_forward.router": "block_sparse_moe.gate",
            "feed_forward.": "block_sparse_moe.",
            "gate_proj": "w1",
            "up_proj": "w3",
            "down_proj": "w2",
            **_TRANSFORMER_NAMES,
        },
        read=_read_transformer,
        write=_write_transformer,
        misfit=_no_positions,
    ),
    Family(
        name="mamba",
        architecture="MambaForCausalLM",
        codes="m-",
        fields=_SIZES | _TOKENS | _itself("tie_word_embeddings", "residual_in_fp32", "max_position_embeddings") | {
            "mamba_d_state": "state_size", "mamba_d_conv": "conv_kernel", "mamba_expand": "expand",
            "mamba_dt_rank": "time_step_rank", "mamba_proj_bias": "use_bias", "mamba_conv_bias": "use_conv_bias",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        start={
            "vocab_size": 50280, "hidden_size": 768, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
            "residual_in_fp32": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
            "max_position_embeddings": 2048,
        },
        same={"pattern": "m-", "mamba_inner_layernorms": False, "num_experts": 1},
        only={"hidden_act": "silu", "time_step_scale": 1.0},
        names={
            "model.embed_tokens": "backbone.embeddings",
            "model.layers": "backbone.layers",
            "model.final_layernorm": "backbone.norm_f",
            "input_layernorm": "norm",
            ".mamba.": ".mixer.",
        },
        older={"embeddings": "embedding"},  # state-spaces' own releases
        pickle="pytorch_model.bin",
        read=_read_mamba,
        write=lambda config: {"intermediate_size": config.d_inner, "hidden_act": "silu"},
    ),
    Family(
        name="blackmamba",
        architecture="BlackMamba",
        codes="m- -E -+",
        fields=_TOKENS | {
            "vocab_size": "vocab_size", "hidden_size": "hidden_size", "num_hidden_layers": "num_layers",
            "intermediate_size": "ffn_hidden_size", "mamba_d_state": "state_size", "mamba_d_conv": "conv_dimension",
            "mamba_expand": "expansion_factor", "max_position_embeddings": "max_sequence_length",
            "router_aux_loss_coef": "router_aux_loss_coef",
        },
        derived=("pattern", "num_experts", "routing", "mamba_proj_bias", "mlp_bias", "head_bias"),
        start={
            "router_aux_loss_coef": 0.0, "max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 0,
            "pad_token_id": 0,
        },
        same={
            "mamba_inner_layernorms": False, "hidden_act": "gelu", "router_bias": True, "num_experts_per_tok": 1,
            "tie_word_embeddings": True, "final_norm": "layer", "residual_in_fp32": True, "rms_norm_eps": 1e-5,
        },
        # The code's activation stays GELU, although the switch for the gate is called swiglu.
        only={"swiglu": True, "rms_norm": True},
        names={
            "model.embed_tokens": "embedding.word_embeddings",
            "model.layers": "decoder.layers",
            "model.final_layernorm": "decoder.final_layernorm",
            "lm_head": "output_layer",
            "input_layernorm": "norm",
            "pre_ff_layernorm": "norm",
            ".mamba.": ".mixer.",
            "feed_forward.experts": "mixer.local_experts",
            "feed_forward.": "mixer.",
            "gate_proj": "linear_fc1",
            "up_proj": "linear_fc1",
            "down_proj": "linear_fc2",
        },
        pickle="pytorch_model.bin",
        read=_read_blackmamba,
        write=_write_blackmamba,
        misfit=_no_blackmamba,
    ),
    # Models of nobody's, such as a Jamba with rotary positions: our own names for everything. Only we read them.
    Family(
        name="minijamba",
        architecture="Jamba",
        codes="m- m+ mE A- A+ AE -+ -E",
        fields=_SIZES | _COMMON | _ATTENTION | _SCHEDULE | _EXPERTS | _MAMBA | _TOKENS | _itself("pattern") | {
            name: name for features in FEATURES.values() for name in features
        },
    ),
)  # fmt: skip
FAMILIES = {family.name: family for family in _FAMILIES}
# Entries that only one family's config.json has, where it does not name its family.
SIGNS = {"mamba_moe_layers": "blackmamba", "ssm_cfg": "mamba", "d_model": "mamba"}
