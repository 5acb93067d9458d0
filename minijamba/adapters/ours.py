"""minijamba itself."""

from pathlib import Path

import torch
from torch import Tensor

from .. import checkpoint
from ..cache import Cache
from ..model import Jamba

NAME = "minijamba"
PACKAGES = ("minijamba",)

build = Jamba


def load(folder: Path, dtype: torch.dtype) -> Jamba:
    return checkpoint.load(folder, device="cpu", dtype=dtype)


def forward(model: Jamba, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
    return model(tokens, mask=mask, segments=segments)


def forward_with_cache(model: Jamba, tokens: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
    cache = model.new_cache(len(tokens)) if cache is None else cache
    return model(tokens, cache=cache), cache


def copy_cache(cache: Cache) -> Cache:
    return cache.copy()
