"""What a model remembers between calls: keys and values in attention layers, a window and a state in Mamba layers.

A cache holds real tokens only. Padding never enters it, rows may have different lengths, and packed documents stay
apart, so that any split of a sequence, any padding and any reuse gives the logits of the plain run.
"""

import copy
import json
import math
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import JambaConfig


@dataclass(frozen=True)
class Layout:
    """Where the tokens of one call stand. The real tokens of each row come first, padding after them.

    real:      (b, t) bool, or None when there is no padding.
    documents: (b, t) int64, numbered along each row, or None when nothing is packed.
    fresh:     (b,) bool, rows whose first token does not continue the cached document; None with `documents`.
    positions: (b, t) int64, the cache slot of each token, or None when all rows stand at `past`, past + 1, ...
    past:      slots in use before this call, in the fullest row.
    visible:   (b or 1, t, s) bool, which slots each token attends to, or None for plain causal attention.
    places:    (b, t) int64, the place of each token in its document, or None when it is past, past + 1, ...
    ends:      (b,) int64, of one token in a fixed cache: the slots in use with it. All other slots come as well.
    """

    real: Tensor | None = None
    documents: Tensor | None = None
    fresh: Tensor | None = None
    positions: Tensor | None = None
    past: int = 0
    visible: Tensor | None = None
    places: Tensor | None = None
    ends: Tensor | None = None

    @property
    def lengths(self) -> Tensor | None:
        """(b,) real tokens of each row in this call."""
        return None if self.real is None else self.real.sum(1)

    @property
    def plain(self) -> bool:
        """Neither padding nor packing."""
        return self.real is None and self.documents is None


def layout_without_cache(
    tokens: Tensor, real: Tensor | None = None, segments: Tensor | None = None, window: int | None = None
) -> Layout:
    """The layout of a call that starts from nothing. Padding stands last, so causal attention never sees it."""
    steps = torch.arange(tokens.shape[1], device=tokens.device)[None]
    documents = visible = None
    if segments is not None:
        documents = _starts(segments, segments[:, 0], real).cumsum(1)
        visible = _causal(steps) & (documents[:, :, None] == documents[:, None, :])
    places = _places(visible, steps)
    return Layout(real, documents, visible=_windowed(visible, steps, tokens.shape[1], window), places=places)


def _causal(positions: Tensor, slots: int | None = None) -> Tensor:
    """(b, t, s) bool: of as many slots as there are, or as tokens, those up to each token's own, positions (b, t)."""
    return torch.arange(slots or positions.shape[1], device=positions.device) <= positions[:, :, None]


def _places(visible: Tensor | None, positions: Tensor) -> Tensor | None:
    """(b, t) the place of each token in its document, which begins at the first slot that it sees."""
    return None if visible is None else positions - visible.view(torch.uint8).argmax(-1)


def _windowed(visible: Tensor | None, positions: Tensor, slots: int, window: int | None) -> Tensor | None:
    """Of the visible slots, the last `window`; all of them for None."""
    if window is None or slots <= window:
        return visible
    recent = torch.arange(slots, device=positions.device) > positions[:, :, None] - window
    return recent & (_causal(positions, slots) if visible is None else visible)


def _starts(segments: Tensor, before: Tensor, real: Tensor | None) -> Tensor:
    """(b, t) bool: where a document starts, given the segment (b,) that each row stood in before."""
    starts = segments != torch.cat([before[:, None], segments[:, :-1]], dim=1)
    return starts if real is None else starts & real


# The segment id of a row before its first packed token, which continues whatever the row holds.
_UNNAMED = torch.iinfo(torch.int64).min


class KeyValues:
    """Keys and values of one attention layer, (b, slots, g, p) each, with room to grow."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def extend(self, keys: Tensor, values: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Write the call's keys and values (b, t, g, p) to their slots; return all slots in use, (b, s, g, p)."""
        slots = self.keys.shape[1] if layout.ends is not None else layout.past + keys.shape[1]
        self.keys = _write(_room(self.keys, slots, keys), keys, layout)
        self.values = _write(_room(self.values, slots, values), values, layout)
        return self.keys[:, :slots], self.values[:, :slots]


class PackedKeyValues(KeyValues):
    """The same in 8 bits: keys and values int8, each head of each token with a float32 scale, (b, slots, g) each."""

    def __init__(self, keys: Tensor, values: Tensor, key_scales: Tensor, value_scales: Tensor) -> None:
        super().__init__(keys, values)
        self.key_scales, self.value_scales = key_scales, value_scales

    def extend(self, keys: Tensor, values: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        (packed_keys, key_scales), (packed_values, value_scales) = _pack(keys), _pack(values)
        slots = self.keys.shape[1] if layout.ends is not None else layout.past + keys.shape[1]
        self.key_scales = _write(_room(self.key_scales, slots, key_scales), key_scales, layout)
        self.value_scales = _write(_room(self.value_scales, slots, value_scales), value_scales, layout)
        all_keys, all_values = super().extend(packed_keys, packed_values, layout)
        return (
            all_keys * self.key_scales[:, :slots, :, None].to(keys.dtype),
            all_values * self.value_scales[:, :slots, :, None].to(keys.dtype),
        )


def _pack(heads: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers -127 .. 127 (b, t, g, p) int8 and the scales (b, t, g) that they are multiplied by."""
    heads = heads.float()
    scales = heads.abs().amax(-1) / 127
    return (heads / scales.clamp(min=1e-30)[..., None]).round().to(torch.int8), scales


def _room(buffer: Tensor, slots: int, new: Tensor) -> Tensor:
    """The buffer with at least `slots` slots. Under autograd a new one, since gradients need the old untouched."""
    grow = max(slots, 2 * buffer.shape[1]) - buffer.shape[1] if slots > buffer.shape[1] else 0
    if grow:
        return F.pad(buffer, (0, 0) * (buffer.dim() - 2) + (0, grow))
    return buffer.clone() if torch.is_grad_enabled() and (new.requires_grad or buffer.requires_grad) else buffer


def _write(buffer: Tensor, new: Tensor, layout: Layout) -> Tensor:
    if layout.positions is None:
        buffer[:, layout.past : layout.past + new.shape[1]] = new
    else:
        rows = torch.arange(len(new), device=new.device)[:, None]
        buffer[rows, layout.positions] = new.to(buffer.dtype)
    return buffer


@dataclass
class MambaState:
    """What one Mamba layer carries: the last inputs of the convolution (b, w-1, c) and the state (b, c, n), float32."""

    window: Tensor
    state: Tensor


class Cache:
    """What a model remembers of b sequences: pass it to every call of the model, and each call continues the last.

        cache = mj.Cache(config, batch=1)
        model(prompt, cache=cache)           # any number of tokens
        model(next_token, cache=cache)       # continues

    Keys and values cost 2 g p numbers a token and attention layer and grow with the sequence; window and state cost
    (w-1) c + c n numbers a Mamba layer, whatever the length.

    Args:
        config:   the model's.
        batch:    sequences, b.
        capacity: slots to make room for at once, tokens; grows by itself when they are used up.
        dtype:    of keys, values and windows: the model's. The recurrent state is at least float32.
        kv:       None, or "int8": keys and values take a byte a number, and 4 bytes more a token and head.
    """

    def __init__(
        self,
        config: JambaConfig,
        batch: int,
        *,
        capacity: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        kv: str | None = None,
    ) -> None:
        if kv not in (None, "int8"):
            raise ValueError(f'kv is {kv!r}, but must be None or "int8"')
        if kv and config.head_dim % 2:
            raise ValueError(f"head_dim is {config.head_dim}, but keys in int8 come in pairs: leave kv out")
        self.config, self.dtype, self.kv = config, dtype, kv
        wide = torch.promote_types(dtype, torch.float32)

        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(batch, *shape, dtype=dtype, device=device)

        def layer(mixer: str | None) -> KeyValues | MambaState | None:
            if mixer is None:
                return None
            if mixer == "attention":
                heads = (capacity, config.num_key_value_heads)
                size = (*heads, config.head_dim)
                if kv is None:
                    return KeyValues(empty(*size), empty(*size))
                scales = empty(*heads, dtype=torch.float32), empty(*heads, dtype=torch.float32)
                return PackedKeyValues(empty(*size, dtype=torch.int8), empty(*size, dtype=torch.int8), *scales)
            return MambaState(
                empty(config.mamba_d_conv - 1, config.d_inner),
                empty(config.d_inner, config.mamba_d_state, dtype=wide),
            )

        self.layers = [layer(mixer) for mixer, _ in config.layers]
        self.lengths = empty(dtype=torch.long)
        self.filled = 0  # slots in use in the fullest row: lengths.max(), known without asking the device
        self.ragged = False
        self.fixed = False  # whether calls of one token leave every tensor where it is, in its size
        self.whole = True  # False while a call is under way, and for good if it breaks off
        self.segment = torch.full_like(self.lengths, _UNNAMED)  # (b,) the segment id that each row stands in
        self.documents: Tensor | None = None  # (b, slots) which document each slot belongs to

    def advance(self, steps: int, real: Tensor | None = None, segments: Tensor | None = None) -> Layout:
        """Make room for the next t tokens and say where they stand. The model calls this once for each call.

        real (b, t) bool with the real tokens first; segments (b, t) int. The model sets `whole` after its last layer.
        """
        self._check_whole()
        self.whole = False
        if self.fixed and steps == 1 and segments is None and self.documents is None:
            return self._advance_one(real)
        past = self.filled
        positions = self.lengths[:, None] + torch.arange(steps, device=self.lengths.device)
        ragged = self.ragged or real is not None
        documents, fresh = self._number_documents(steps, segments, real, positions)
        visible = None
        if ragged or documents is not None:
            visible = _causal(positions, past + steps)
        if documents is not None:
            visible = visible & (self.documents[:, None, : past + steps] == documents[:, :, None])
        self.lengths = self.lengths + (steps if real is None else real.sum(1))
        self.filled = past + steps
        if real is not None:
            self.measure()
        places = _places(visible, positions)
        visible = _windowed(visible, positions, past + steps, self.config.sliding_window)
        return Layout(real, documents, fresh, positions if ragged else None, past, visible, places)

    @property
    def capacity(self) -> float:
        """Slots that there is room for; infinite without attention."""
        return min((layer.keys.shape[1] for layer in self.layers if isinstance(layer, KeyValues)), default=math.inf)

    def fix(self, capacity: int) -> None:
        """Make room for `capacity` slots for good, so that a CUDA graph can record calls of one token.

        Such calls only know that a row has one slot more at most: call `measure` after them.
        Raises: ValueError for a cache with packed documents.
        """
        if self.documents is not None:
            raise ValueError("a cache of packed documents cannot be fixed: start each document in a row of its own")
        self.reserve(max(capacity, 1))
        self.fixed = True

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` slots, if there are not so many."""
        for layer in self.layers:
            if isinstance(layer, KeyValues):
                more = max(capacity - layer.keys.shape[1], 0)
                for name, buffer in vars(layer).items() if more else ():
                    setattr(layer, name, F.pad(buffer, (0, 0) * (buffer.dim() - 2) + (0, more)))

    def _advance_one(self, real: Tensor | None) -> Layout:
        if self.filled >= self.capacity:
            self.measure()
            if self.filled >= self.capacity:
                self.fix(2 * self.capacity)
        positions = self.lengths[:, None].clone()
        self.lengths += 1 if real is None else real[:, 0]
        self.filled += 1
        self.ragged = self.ragged or real is not None
        places = positions if self.config.rope_theta is not None else None
        return Layout(real, positions=positions, past=self.filled - 1, places=places, ends=positions[:, 0] + 1)

    def measure(self) -> None:
        """Ask the device how far the rows are filled."""
        self.filled = int(self.lengths.max())
        self.ragged = bool((self.lengths != self.filled).any())

    def _number_documents(
        self, steps: int, segments: Tensor | None, real: Tensor | None, positions: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Continue the numbering of documents; (None, None) as long as nothing was ever packed."""
        if segments is None and self.documents is None:
            return None, None
        last = self._last_document()
        if segments is None:
            documents, fresh = last[:, None].expand(-1, steps), torch.zeros_like(last, dtype=torch.bool)
        else:
            before = torch.where(self.segment == _UNNAMED, segments[:, 0], self.segment)
            starts = _starts(segments, before, real)
            documents, fresh = last[:, None] + starts.cumsum(1), starts[:, 0]
            end = (torch.full_like(last, steps) if real is None else real.sum(1)) - 1
            ids = segments.gather(1, end.clamp(min=0)[:, None])[:, 0]
            self.segment = torch.where(end >= 0, ids, self.segment)
        if self.documents is None:
            self.documents = torch.zeros(len(last), self.filled, dtype=torch.long, device=last.device)
        layout = Layout(positions=positions, past=self.filled)
        self.documents = _write(_room(self.documents, self.filled + steps, documents), documents, layout)
        return documents, fresh

    def _last_document(self) -> Tensor:
        """(b,) the document that each row's last token belongs to; 0 before the first."""
        if self.documents is None or self.documents.shape[1] == 0:
            return torch.zeros_like(self.lengths)
        return self.documents.gather(1, (self.lengths - 1).clamp(min=0)[:, None])[:, 0]

    def _check_whole(self) -> None:
        if not self.whole:
            raise ValueError("a call that broke off has half updated this cache: start anew, or from an earlier copy")

    def copy(self) -> "Cache":
        """An independent copy: continuing one does not touch the other."""
        return self._map(Tensor.clone)

    def select(self, rows: Tensor | list[int]) -> "Cache":
        """A copy of the given rows, in that order; a row may come twice, to try two continuations of one prompt."""
        index = torch.as_tensor(rows, device=self.lengths.device)
        new = self._map(lambda tensor: tensor[index])
        new.measure()
        return new

    def _map(self, function) -> "Cache":
        new = copy.copy(self)
        new.layers = [copy.copy(layer) for layer in self.layers]
        for name, tensor in _tensors(self).items():
            _set(new, name, function(tensor))
        return new

    @property
    def nbytes(self) -> int:
        """Bytes that the cache occupies, room not yet used counted."""
        return sum(tensor.nbytes for tensor in _tensors(self).values())

    def save(self, path: str | Path) -> None:
        """Write the cache to one safetensors file, slots in use only; written aside, then renamed.

        Raises: ValueError if the file cannot be written, which leaves an earlier file as it was.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        self._check_whole()
        path = Path(path)
        tensors = {
            name: (tensor[:, : self.filled] if _has_slots(name) else tensor).contiguous()
            for name, tensor in _tensors(self).items()
        }
        aside = path.with_name(path.name + ".part")
        try:
            config = asdict(self.config) | {"model_type": "minijamba"}  # which can say every config
            about = {"config": config, "dtype": str(self.dtype).removeprefix("torch."), "kv": self.kv}
            save_file(tensors, aside, metadata={"cache": json.dumps(about)})
            os.replace(aside, path)
        except (OSError, SafetensorError) as error:
            room = f"{self.nbytes:,} bytes free"
            raise ValueError(f"{path}: cannot be written ({error}); give a file in a folder with {room}") from None
        finally:
            with suppress(OSError):
                aside.unlink()

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "Cache":
        """Take up a saved cache. Raises: ValueError if the file is missing or not a saved cache."""
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise ValueError(f"{path}: there is no such file; save a cache there first with cache.save(path)")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                about = json.loads((file.metadata() or {})["cache"])
                config, dtype = JambaConfig.from_dict(about["config"]), getattr(torch, about["dtype"])
                cache = cls(config, batch=1, dtype=dtype, kv=about["kv"])
                for name in file.keys():  # noqa: SIM118 (not a dictionary)
                    _set(cache, name, file.get_tensor(name))
        except (SafetensorError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: not a cache saved here ({error}); write one with cache.save(path)") from None
        cache.measure()
        return cache


def _tensors(cache: Cache) -> dict[str, Tensor]:
    """Every tensor of a cache under the name it is saved by."""
    named = {"lengths": cache.lengths, "segment": cache.segment, "documents": cache.documents}
    for i, layer in enumerate(cache.layers):
        named |= {f"layers.{i}.{name}": tensor for name, tensor in vars(layer).items()} if layer else {}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _set(cache: Cache, name: str, tensor: Tensor | None) -> None:
    if name.startswith("layers."):
        _, i, name = name.split(".")
        setattr(cache.layers[int(i)], name, tensor)
    else:
        setattr(cache, name, tensor)


def _has_slots(name: str) -> bool:
    return name == "documents" or name.endswith((".keys", ".values", "_scales"))
