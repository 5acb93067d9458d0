"""transformers' Jamba, with the settings that from_pretrained chooses.

Packing is not asked of it. "Padding-free training" in its documentation says that recurrent and convolution layers do
not read the borders of documents from position_ids, but take them from kernels that are given seq_idx, and that the
plain implementation mixes the documents. Jamba's Mamba layers are given neither (version 5.24).
"""

from inspect import signature
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, JambaForCausalLM

from ..config import JambaConfig

NAME = "transformers"
PACKAGES = ("transformers",)
NOTE = "set up as from_pretrained does; without mamba-ssm and causal-conv1d, scan and convolution are plain PyTorch"


def build(config: JambaConfig) -> JambaForCausalLM:
    return JambaForCausalLM(transformers.JambaConfig.from_dict(config.to_dict()))


def load(folder: Path, dtype: torch.dtype) -> JambaForCausalLM:
    transformers.utils.logging.disable_progress_bar()  # one for every tiny checkpoint
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def forward(
    model: JambaForCausalLM, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None
) -> Tensor:  # fmt: skip
    if segments is not None:
        raise NotImplementedError(
            "its documentation on padding-free training says that recurrent layers take the borders of documents "
            "through kernels alone, and its Jamba hands its Mamba layers none"
        )
    return model(tokens, attention_mask=None if mask is None else mask.long(), use_cache=False).logits


def forward_with_cache(
    model: JambaForCausalLM, tokens: Tensor, cache: DynamicCache | None = None
) -> tuple[Tensor, DynamicCache]:  # fmt: skip
    cache = DynamicCache(config=model.config) if cache is None else cache
    renamed = "cache" in signature(model.forward).parameters  # in version 5.24
    return model(tokens, **{"cache" if renamed else "past_key_values": cache}).logits, cache
