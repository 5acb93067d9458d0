"""Models of packed weights: which of their tensors are packed, and the files that hold them as they are in memory.

The files are safetensors under our own names, `<name>.values` and `<name>.scales` for what is packed, experts stacked:
nothing is computed when they are loaded. config.json says so, and checksums.json has a CRC-32 of every 16 MiB.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .budget import weights
from .config import JambaConfig
from .families import rename
from .packed import DTYPES as PACKED_DTYPES
from .packed import pack
from .quantize import SCHEMES, PackedLinear, PackedWeight, packed_bits, packed_shapes
from .stored import CODES, CONFIG, FLOATS, Stored, check_shapes, listed, read_headers
from .stream import Checksums
from .writing import CHECKSUMS, Output

# Our name for stacked experts -> the names in a Jamba's files, where {e} counts them. All others are equal there; what
# other families call them is in `families`.
STACKED = {
    f"experts.{name}_{ours}": f"experts.{{e}}.{name}_proj.{stored}"
    for name in ("gate", "up", "down")
    for ours, stored in (("proj", "weight"), ("bias", "bias"))
}
# The entry of config.json for weights of fewer bits; every other method has a layout of its own.
ENTRY, METHOD = "quantization_config", "minijamba"
AGAIN = "copy it again, or make the checkpoint anew"


class Kept(NamedTuple):
    """A tensor of a model in memory."""

    shape: tuple[int, ...]
    bits: int | None
    names: list[str]  # of `weights`: one, or that of each expert


def kept(config: JambaConfig, quantize: str | None) -> dict[str, Kept]:
    """Every tensor of a model by its name in memory, in the order of `weights`; no tied head."""
    found: dict[str, Kept] = {}
    for weight in weights(config):
        bits, name = packed_bits(weight.name, weight.part, quantize), _stacked(weight.name)
        names = [*(found[name].names if name in found else []), weight.name]
        found[name] = Kept(weight.shape if weight.expert is None else (len(names), *weight.shape), bits, names)
    return found


def _stacked(name: str) -> str:
    for ours, stored in STACKED.items():
        name = re.sub(re.escape(stored).replace(r"\{e\}", r"\d+"), ours, name)
    return name


def shares(ours: str, stack: Tensor) -> dict[str, Tensor]:
    """The matrix of each expert, under its name in files, of what is stacked; anything else as it is."""
    name = rename(ours, STACKED)
    return {ours: stack} if name == ours else {name.format(e=e): share for e, share in enumerate(stack)}


def pack_modules(model: nn.Module, quantize: str | None, dtype: torch.dtype) -> None:
    """Puts modules of packed weights, not filled yet, in the place of what the scheme packs."""
    for name, tensor in kept(model.config, quantize).items():
        if tensor.bits is None:
            continue
        owner, _, last = name.rpartition(".")
        if last != "weight":
            experts = model.get_submodule(owner)
            delattr(experts, last)
            setattr(experts, last, PackedWeight(tensor.shape, tensor.bits, dtype))
        else:
            parent, _, last = owner.rpartition(".")
            packed = PackedLinear(*tensor.shape, tensor.bits, model.get_submodule(owner).bias, dtype)
            setattr(model.get_submodule(parent), last, packed)


def scheme_of(model: nn.Module) -> str | None:
    """The scheme in which a model's weights are packed; None if none are. Raises: ValueError if it is none of ours."""
    found = {name: m.packed().bits for name, m in model.named_modules() if isinstance(m, PackedWeight)}
    for scheme in SCHEMES if found else ():
        if found == {name: tensor.bits for name, tensor in kept(model.config, scheme).items() if tensor.bits}:
            return scheme
    if found:
        raise ValueError(
            f"the packed weights of the model, {listed(sorted(found))}, are not those of {', '.join(SCHEMES)}: load it "
            f"with one of these"
        )
    return None


def in_memory(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and the tensors of packed weights, by their names in the files of packed models. No tied head."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def layout(config: JambaConfig, quantize: str) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Shape and dtype of every tensor in the files of a packed model; None is any float."""
    found = {}
    for name, tensor in kept(config, quantize).items():
        if tensor.bits is None:
            found[name] = tensor.shape, None
        else:
            found |= {f"{name}.{part}": half for part, half in _halves(tensor).items()}
    return found


def _halves(tensor: Kept) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of what is packed, by its name."""
    shapes = packed_shapes(tensor.shape, tensor.bits)
    return dict(zip(("values", "scales"), zip(shapes, PACKED_DTYPES[tensor.bits], strict=True), strict=True))


# Reading


def scheme_of_files(folder: Path) -> str | None:
    """The scheme that config.json says, None if it says nothing.

    Raises: ValueError for the methods of others.
    """
    file = folder / CONFIG
    said = json.loads(file.read_text(encoding="utf-8")).get(ENTRY)
    if not said:
        return None
    if not isinstance(said, dict) or said.get("quant_method") != METHOD or said.get("scheme") not in SCHEMES:
        raise ValueError(
            f"{file}: {ENTRY} is {json.dumps(said)}, but only quant_method {METHOD!r} with scheme {', '.join(SCHEMES)} "
            f"is read: give the checkpoint that was not quantized, which quantize= packs while it loads"
        )
    return said["scheme"]


def entry(quantize: str | None) -> dict:
    """What config.json says of a scheme."""
    return {ENTRY: {"quant_method": METHOD, "scheme": quantize}} if quantize else {}


def match_packed(config: JambaConfig, path: Path, quantize: str) -> dict[str, Stored]:
    """Every tensor of a packed model's files by its name; ValueError unless they are what the config describes."""
    stored, wanted = read_headers(path, config.family), layout(config, quantize)
    if missing := [name for name in wanted if name not in stored]:
        raise ValueError(f"{path}: no tensor {listed(missing)}, which {CONFIG} asks for in {quantize}: {AGAIN}")
    if extra := sorted(stored.keys() - wanted.keys()):
        raise ValueError(f"{stored[extra[0]].file}: {listed(extra)} has no place in {quantize} of {CONFIG}: {AGAIN}")
    check_shapes(stored, {name: shape for name, (shape, _) in wanted.items()})
    for name, (_, dtype) in wanted.items():
        allowed = FLOATS if dtype is None else (CODES[dtype],)
        if stored[name].dtype not in allowed:
            raise ValueError(
                f"{stored[name].file}: {name} is {stored[name].dtype}, but {quantize} asks for "
                f"{' or '.join(allowed)}: {AGAIN}"
            )
    return {name: stored[name] for name in wanted}


def read_checksums(folder: Path, stored: dict[str, Stored]) -> Checksums:
    """The checksums of all stored tensors. Raises: ValueError if the file is absent, damaged or of other tensors."""
    file = folder / CHECKSUMS
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        block, sums = values["block_bytes"], values["crc32"]
        whole = type(block) is int and block > 0 and block % 8 == 0
        whole = whole and all(len(sums[name]) == -(-tensor.nbytes // block) for name, tensor in stored.items())
        whole = whole and all(isinstance(one, str) for name in stored for one in sums[name])
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{file} is absent, damaged or of another checkpoint, so nothing can be checked: {AGAIN}")
    return Checksums(block, sums)


# Writing


def packed_outputs(
    config: JambaConfig, quantize: str, tensors: dict[str, Output], device: torch.device, dtype: torch.dtype
) -> list[Output]:
    """The files of a packed model, made from tensors under the names of `weights`; packed one matrix at a time."""
    outputs = []
    for name, tensor in kept(config, quantize).items():
        parts = [tensors[part] for part in tensor.names]
        if tensor.bits is None:
            read = parts[0].read if len(parts) == 1 else _stack(parts)
            outputs.append(Output(name, parts[0].dtype, tensor.shape, read))
            continue
        both = _Both(parts, tensor, device, dtype)
        for part, (shape, kind) in _halves(tensor).items():
            outputs.append(Output(f"{name}.{part}", kind, shape, both.take(part)))
    return outputs


def _stack(parts: list[Output]) -> Callable[[], Tensor]:
    return lambda: torch.stack([part.tensor() for part in parts])


class _Both:
    """Values and scales of a matrix or a stack, packed when the first of them is asked for, and then given away."""

    def __init__(self, parts: list[Output], tensor: Kept, device: torch.device, dtype: torch.dtype) -> None:
        self.parts, self.tensor, self.device, self.dtype = parts, tensor, device, dtype
        self.lock, self.waiting = Lock(), {}  # the two may be written to different files, at the same time

    def take(self, half: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            with self.lock:
                if not self.waiting:
                    self.waiting = dict(self._pack().named_buffers())
                return self.waiting.pop(half)

        return read

    def _pack(self) -> PackedWeight:
        made = PackedWeight(self.tensor.shape, self.tensor.bits, self.dtype)
        stacked = len(self.tensor.shape) == 3
        for e, part in enumerate(self.parts):
            try:
                packed = pack(part.read().to(self.device).to(self.dtype), self.tensor.bits)
            except ValueError as error:
                raise ValueError(f"{part.name}: {error}") from None
            (made.values[e] if stacked else made.values).copy_(packed.values)
            (made.scales[e] if stacked else made.scales).copy_(packed.scales)
        return made
