"""mambapy (mamba.py), whose Jamba has the parameter names of the first release.

Its own from_pretrained goes through transformers of version 4, whose names it copies; here the file is read instead.
A prompt is given to its `step` token by token, as its own `generate` does. Weights stay float32: cast to bfloat16, its
product of state and C refuses the two dtypes (version 1.2), so half precision is that of torch.autocast.
"""

from pathlib import Path

import torch
from mambapy.jamba import JambaLM, JambaLMConfig
from safetensors.torch import load_file
from torch import Tensor

from ..config import JambaConfig
from ..families import FAMILIES, rename

NAME = "mambapy"
PACKAGES = ("mambapy",)
NOTE = "a piece is given token by token, as its generate does; bfloat16 is that of torch.autocast"

# Part of a name in a checkpoint of the first release -> in mambapy.
NAMES = {"model.embed_tokens": "embedding", "model.final_layernorm": "final_layernorm", "model.": "jamba."}


def build(config: JambaConfig) -> JambaLM:
    return JambaLM(
        JambaLMConfig(
            d_model=config.hidden_size,
            n_layers=config.num_hidden_layers,
            mlp_size=config.intermediate_size,
            initializer_range=config.initializer_range,
            rms_norm_eps=config.rms_norm_eps,
            d_state=config.mamba_d_state,
            expand_factor=config.mamba_expand,
            d_conv=config.mamba_d_conv,
            dt_rank=config.mamba_dt_rank,
            bias=config.mamba_proj_bias,
            conv_bias=config.mamba_conv_bias,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            num_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            attn_layer_offset=config.attn_layer_offset,
            attn_layer_period=config.attn_layer_period,
            expert_layer_offset=config.expert_layer_offset,
            expert_layer_period=config.expert_layer_period,
            vocab_size=config.vocab_size,
            pad_token_id=config.pad_token_id,
            tie_lm_weights=config.tie_word_embeddings,
        )
    )


def load(folder: Path, dtype: torch.dtype) -> JambaLM:
    model = build(JambaConfig.from_json(folder))
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({rename(rename(name, FAMILIES["jamba"].older), NAMES): w for name, w in weights.items()})
    model.computes_in = dtype
    return model.eval()


def forward(model: JambaLM, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
    if segments is not None:
        raise NotImplementedError("its forward takes tokens alone, and so no borders of documents")
    if mask is not None and (mask[:, 1:] & ~mask[:, :-1]).any():
        # What comes after a token cannot reach it, so that right padding needs no mask.
        raise NotImplementedError("its forward takes tokens alone, and so no mask of padding")
    with _precision(model):
        return model(tokens)[0]


def forward_with_cache(model: JambaLM, tokens: Tensor, cache: list | None = None) -> tuple[Tensor, list]:
    if cache is None:
        cache = [layer.get_empty_cache(len(tokens), tokens.device) for layer in model.jamba.layers]
    logits = []
    with _precision(model):
        for token in tokens.split(1, dim=1):
            step, cache = model.step(token, cache)
            logits.append(step)
    return torch.cat(logits, dim=1), cache


def _precision(model: JambaLM) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=model.computes_in == torch.bfloat16)
