"""The whole model: embedding, the scheduled layers, a last norm and the language-model head."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .block import Block
from .cache import Cache, Layout, layout_without_cache
from .config import JambaConfig
from .moe import Routing
from .norm import RMSNorm


@dataclass
class Trace:
    """What a call of the model passed through: hand in an empty one and read it afterwards.

    hidden:  (b, t, d) each: the embeddings, then the stream after every layer.
    router:  (b, t, e) each: the router's logits of every MoE layer.
    experts: (b, t, k) int64 each: the experts chosen there; those of padding mean nothing.
    """

    hidden: list[Tensor] = field(default_factory=list)
    router: list[Tensor] = field(default_factory=list)
    experts: list[Tensor] = field(default_factory=list)

    def add(self, h: Tensor, routing: Routing | None) -> None:
        self.hidden.append(h)
        if routing is not None:
            self.router.append(routing.logits)
            self.experts.append(routing.indices)


class Backbone(nn.Module):
    """Everything below the head; a separate module because the released names start with `model.`."""

    def __init__(self, config: JambaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        norm = {"rms": RMSNorm, "layer": nn.LayerNorm}[config.final_norm]
        self.final_layernorm = norm(config.hidden_size, config.rms_norm_eps)


class Jamba(nn.Module):
    """A language model of attention, Mamba and mixture-of-experts layers; which of them, its config says.

        model = mj.Jamba(mj.preset("tiny"))
        logits = model(tokens)                     # (b, t) -> (b, t, v)

    Parameters bear the names of the released Jamba checkpoints; the experts of a layer are stacked. A new model is
    initialised for training: weights normal, those that write to the residual stream scaled down by the root of
    how many do, and the Mamba recurrence by Mamba's own recipe.

    With `model.recompute = True` the gradient keeps only what enters each layer and computes the layer a second time:
    less memory for more time, the same gradient.
    """

    def __init__(self, config: JambaConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        _initialise(self)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations; A_log and delta's bias are float32 at least."""
        return self.model.embed_tokens.weight.dtype

    def new_cache(self, batch: int = 1, capacity: int = 0, kv: str | None = None) -> Cache:
        """An empty cache for b sequences, with room for `capacity` tokens at first; kv="int8" halves what they take."""
        return Cache(self.config, batch, capacity=capacity, dtype=self.dtype, device=self.device, kv=kv)

    def forward(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        trace: Trace | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits of the next token.

        Whatever the split over calls, the padding and the packing, a token gets the logits of a plain run of its
        document alone. (But for Sinkhorn's choice of experts in training, which is even over all tokens of a call.)

        Args:
            tokens:    (b, t) int64, 0 .. v-1.
            cache:     continues the sequences it holds, and holds these tokens afterwards.
            mask:      (b, t) bool, True for real tokens, False for padding, in any place. Logits of padding are zero.
            segments:  (b, t) int, packed documents: a new one starts wherever the number changes.
            trace:     an empty `Trace` to be filled.
            last_only: only the logits of each row's last real token: (b, 1, v), zero in rows that have none.
        Returns: logits (b, t, v).
        Raises:  ValueError for tokens out of range or shapes that disagree.
        """
        _check(self, tokens, cache, mask, segments)
        # To ask a GPU whether all are real, at every token that is written, would wait for it.
        asks = tokens.shape[1] > 1 or tokens.device.type == "cpu"
        if mask is None or (asks and bool(mask.all())):
            return self._run(tokens, cache, None, segments, trace, last_only)
        order = (~mask).long().argsort(dim=1, stable=True)
        first = Trace() if trace is not None else None
        packed = None if segments is None else segments.gather(1, order)
        logits = self._run(tokens.gather(1, order), cache, mask.gather(1, order), packed, first, last_only)
        if trace is not None:
            trace.hidden += [_unsort(hidden, order, mask) for hidden in first.hidden]
            trace.router += [_unsort(router, order, mask) for router in first.router]
            trace.experts += [_unsort(experts, order, mask) for experts in first.experts]
        return logits if last_only else _unsort(logits, order, mask)

    def _run(
        self,
        tokens: Tensor,
        cache: Cache | None,
        real: Tensor | None,
        segments: Tensor | None,
        trace: Trace | None,
        last_only: bool,
    ) -> Tensor:
        """`forward` with the real tokens first in every row."""
        if cache is None:
            layout = layout_without_cache(tokens, real, segments, self.config.sliding_window)
            states = [None] * len(self.model.layers)
        else:
            layout, states = cache.advance(tokens.shape[1], real, segments), cache.layers
        h = self.model.embed_tokens(tokens)
        if self.config.residual_in_fp32:
            h = h.to(torch.promote_types(h.dtype, torch.float32))
        if trace is not None:
            trace.add(h, None)
        y = None
        for block, state in zip(self.model.layers, states, strict=True):
            h, y, routing = self._block(block, h, y, layout, state)
            if trace is not None:
                trace.add(h + y, routing)
        h = h + y
        if cache is not None:
            cache.whole = True
        if last_only:
            h = h[:, -1:] if real is None else _last_real(h, real)
        return self.lm_head(self.model.final_layernorm(h.to(self.dtype)))

    def _block(
        self, block: Block, h: Tensor, y: Tensor | None, layout: Layout, state
    ) -> tuple[Tensor, Tensor, Routing | None]:
        if not (self.recompute and torch.is_grad_enabled()):
            return block(h, y, layout, state)
        # One tensor is kept, not two. Nothing in a layer is random, so there is no random state to bring back.
        h = h if y is None else h + y
        return checkpoint(block, h, None, layout, state, use_reentrant=False, preserve_rng_state=False)


def _unsort(x: Tensor, order: Tensor, mask: Tensor) -> Tensor:
    """x (b, t, ...) back in the order of the caller, zero at padding."""
    back = torch.empty_like(x).scatter(1, order[:, :, None].expand_as(x), x)
    return back.masked_fill(~mask[:, :, None], 0)


def _last_real(h: Tensor, real: Tensor) -> Tensor:
    at = (real.sum(1) - 1).clamp(min=0)
    return h.gather(1, at[:, None, None].expand(-1, 1, h.shape[-1])).masked_fill(~real[:, :1, None], 0)


def _check(model: Jamba, tokens: Tensor, cache: Cache | None, mask: Tensor | None, segments: Tensor | None) -> None:
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise ValueError(f"tokens must be (b, t) with at least one token, not {tuple(tokens.shape)}")
    for name, other in {"mask": mask, "segments": segments}.items():
        if other is not None and other.shape != tokens.shape:
            raise ValueError(f"{name} must have the shape of tokens {tuple(tokens.shape)}, not {tuple(other.shape)}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, True for real tokens, not {mask.dtype}: pass mask.bool()")
    if cache is not None:
        check_cache(model, cache, len(tokens))
    # On a GPU this look would wait for the device at every step; `generate` looks once.
    if tokens.device.type == "cpu":
        check_tokens(model.config, tokens)


def check_cache(model: Jamba, cache: Cache, batch: int) -> None:
    if len(cache.lengths) != batch:
        raise ValueError(f"the cache holds {len(cache.lengths)} sequences and tokens has {batch} rows")
    if cache.config != model.config:
        raise ValueError("the cache was made for another configuration: make one with model.new_cache(batch)")
    if cache.dtype != model.dtype:
        raise ValueError(f"the cache is {cache.dtype}, the model {model.dtype}: make one with model.new_cache(batch)")
    if cache.kv is not None and torch.is_grad_enabled() and any(weight.requires_grad for weight in model.parameters()):
        raise ValueError("keys and values in int8 have no gradient: leave kv out, or call under torch.no_grad()")


def check_tokens(config: JambaConfig, tokens: Tensor) -> None:
    """Raises: ValueError unless all tokens are in 0 .. v-1."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= config.vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"token {wrong} is outside the vocabulary 0 .. {config.vocab_size - 1}: another tokenizer's?")


# Weights that write to the residual stream, and weights that their own module has initialised.
_TO_RESIDUAL = ("o_proj", "out_proj", "down_proj")
_OWN = ("A_log", "conv1d", "dt_proj")


@torch.no_grad()
def _initialise(model: Jamba) -> None:
    std = model.config.initializer_range
    parts = sum(part is not None for layer in model.config.layers for part in layer)
    scaled = std / parts**0.5
    for name, parameter in model.named_parameters():
        if any(part in name for part in _OWN):
            continue
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() >= 2:
            nn.init.normal_(parameter, std=scaled if any(part in name for part in _TO_RESIDUAL) else std)
