"""Weights of 8 or 4 bits in a model: which ones, products with them, and the modules that hold them.

Activations keep their dtype. The numbers themselves are in `packed`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .packed import (
    BITS,
    DTYPES,
    GROUP,
    PLANES,
    Packed,
    pack,
    pack_rows,
    packed_bytes,
    packed_shapes,
    relative_error,
    unpack,
)  # fmt: skip
from .rungs import choose, why_no_kernels

__all__ = [
    "BITS", "GROUP", "PACKED", "PLANES", "SCHEMES", "Packed", "PackedLinear", "PackedWeight", "linear", "pack",
    "pack_rows", "packed_bits", "packed_bytes", "packed_shapes", "relative_error", "rungs", "scheme", "unpack",
]  # fmt: skip

# What each scheme packs: part of the model (as in `budget.PARTS`) -> bits. Everything else keeps the model's dtype.
SCHEMES = {
    "int8": {"moe": 8, "mlp": 8},
    "int4": {"moe": 4, "mlp": 4},
    "int8-all": {"moe": 8, "mlp": 8, "mamba": 8, "attention": 8, "head": 8},
    "int4-all": {"moe": 4, "mlp": 4, "mamba": 8, "attention": 8, "head": 8},
}
# Matrices that are packed where their part is. Not the router, which decides, nor what selects delta, B and C: small.
PACKED = ("in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


def scheme(name: str | None) -> dict[str, int]:
    """Part -> bits. Raises: ValueError for a name that is none of `SCHEMES`."""
    if name is not None and name not in SCHEMES:
        raise ValueError(f"quantize is {name!r}, but must be None or one of {', '.join(SCHEMES)}")
    return {} if name is None else SCHEMES[name]


def packed_bits(name: str, part: str, quantize: str | None) -> int | None:
    """The bits in which a scheme holds a weight of this name, in this part of the model; None where it is left alone.

    >>> packed_bits("model.layers.1.feed_forward.experts.3.up_proj.weight", "moe", "int4")
    4
    """
    *_, matrix, kind = name.split(".")
    return scheme(quantize).get(part) if kind == "weight" and matrix in PACKED else None


def linear(x: Tensor, weight: Packed, bias: Tensor | None = None, *, rung: str = "auto") -> Tensor:
    """x w'^T + bias: x (..., in) -> (..., out), the weights read as they are stored where a kernel runs.

    Differentiable in x.
    """
    return choose("linear", rung, rungs(x.device), x.device)(x, weight, bias)


def rungs(device: torch.device) -> dict:
    """The implementations that run on tensors of this device, slowest first."""
    implementations = {"naive": _unpacked, "parallel": _unpacked}
    if why_no_kernels(device) is None:
        from .fused_linear import linear as fused

        implementations["fused"] = fused
    return implementations


def _unpacked(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    return F.linear(x, unpack(weight), bias)


class PackedWeight(nn.Module):
    """Holds a `Packed` as buffers, so that it moves, is counted and is saved with the model."""

    def __init__(self, shape: tuple[int, ...], bits: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.inputs, self.dtype = shape[-1], dtype
        parts = zip(("values", "scales"), packed_shapes(shape, bits), DTYPES[bits], strict=True)
        for name, size, kind in parts:
            self.register_buffer(name, torch.empty(size, dtype=kind))

    def packed(self) -> Packed:
        return Packed(self.values, self.scales, self.inputs, self.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.packed().shape)}, int{self.packed().bits}"

    def _apply(self, fn, recurse=True):
        """Moves; what a cast would do to scales it does to the dtype of the matrix alone."""
        scales = self.scales
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scales.device)).dtype
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self


class PackedLinear(nn.Module):
    """A linear layer of packed weights, in the place of an nn.Linear: x (..., in) -> (..., out)."""

    def __init__(self, outputs: int, inputs: int, bits: int, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = PackedWeight((outputs, inputs), bits, dtype)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.packed(), self.bias)
