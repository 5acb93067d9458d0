"""Matrices of 8 or 4 bits: how they are packed, how they are unpacked, and how far off they are.

    int8:  q = round(w / s),  s = max |w| / 127 over an output channel's weights           w' = s q
    int4:  q = round(w / s),  s = -(the weight of largest magnitude) / 8 over 64 weights    w' = s q,  -8 <= q <= 7

Both look at nothing but the weights, each row by itself: nothing is calibrated on data.
Source: Jamba-1.5 (arXiv 2408.12570), section 3.1, and vLLM's ExpertsInt8 for int8.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 64  # weights along the input that share a scale of int4
PLANES = 4  # groups in a block of int4: one for each four bits of a 16-bit word
BITS = {"int8": 8, "int4": 4}
DTYPES = {8: (torch.int8, torch.float32), 4: (torch.int16, torch.bfloat16)}  # of values and scales


@dataclass(frozen=True)
class Packed:
    """A matrix (out, in), or a stack of them (e, out, in), in fewer bits. `packed[i]` is matrix i of a stack, unpacked.

    8 bits: values (..., out, in) int8;  scales (..., out) float32.
    4 bits: values (..., out, 64 blocks) int16, blocks = ceil(in / 256): bits 4i .. 4i+3 of word j of a block hold
            weight 64 i + j of the block, plus 8;  scales (..., out, 4 blocks) bfloat16, one for 64 weights.
    """

    values: Tensor
    scales: Tensor
    inputs: int
    dtype: torch.dtype  # of the matrix that it stands for

    @property
    def bits(self) -> int:
        return 8 if self.values.dtype == torch.int8 else 4

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.values.shape[:-1], self.inputs)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    @property
    def device(self) -> torch.device:
        return self.values.device

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, i: int) -> Tensor:
        return unpack(replace(self, values=self.values[i], scales=self.scales[i]))

    def __iter__(self):
        return (self[i] for i in range(len(self)))


def packed_shapes(shape: tuple[int, ...], bits: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of values and scales for a matrix (..., out, in)."""
    if bits == 8:
        return shape, shape[:-1]
    blocks = math.ceil(shape[-1] / (GROUP * PLANES))
    return (*shape[:-1], GROUP * blocks), (*shape[:-1], PLANES * blocks)


def packed_bytes(shape: tuple[int, ...], bits: int) -> int:
    """Bytes of values and scales."""
    parts = zip(packed_shapes(shape, bits), DTYPES[bits], strict=True)
    return sum(math.prod(part) * dtype.itemsize for part, dtype in parts)


def pack(weight: Tensor, bits: int, dtype: torch.dtype | None = None) -> Packed:
    """The nearest weights of so many bits. weight: (..., out, in), any float; dtype: of the model, the weight's own.

    Raises: ValueError for another number of bits, or for weights that are not finite.
    """
    if bits not in DTYPES:
        raise ValueError(f"bits is {bits!r}, but must be 8 or 4")
    values, scales = pack_rows(weight.detach(), bits)
    if not bool(scales.isfinite().all()):
        raise ValueError("the weights hold numbers that are not finite, which have no place among so few: look there")
    return Packed(values, scales, weight.shape[-1], dtype or weight.dtype)


def pack_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Values and scales of rows (..., in), each by itself; where a weight is not finite, its scale is not either."""
    return (_pack8 if bits == 8 else _pack4)(weight.float())


def _pack8(weight: Tensor) -> tuple[Tensor, Tensor]:
    largest = weight.abs().amax(-1)
    scales = largest / torch.full_like(largest, 127)  # on a GPU / 127 is * (1 / 127), rounded twice
    scales = torch.where(scales == 0, 1.0, scales)
    return (weight / scales[..., None]).round_().clamp_(-127, 127).to(torch.int8), scales


def _pack4(weight: Tensor) -> tuple[Tensor, Tensor]:
    *outputs, inputs = weight.shape
    blocks = math.ceil(inputs / (GROUP * PLANES))
    weight = F.pad(weight, (0, blocks * GROUP * PLANES - inputs)).view(*outputs, blocks * PLANES, GROUP)
    largest = weight.gather(-1, weight.abs().argmax(-1, keepdim=True))
    scales = (largest / -8).bfloat16()
    scales = torch.where(scales == 0, 1.0, scales)
    numbers = (weight / scales.float()).round_().clamp_(-8, 7).to(torch.int32).add_(8)
    planes = numbers.view(*outputs, blocks, PLANES, GROUP)
    words = planes[..., 0, :].clone()
    for i in range(1, PLANES):
        words |= planes[..., i, :] << (4 * i)
    # A word above 2^15 is stored as the negative number of the same bits.
    return (words - ((words >> 15) << 16)).to(torch.int16).flatten(-2), scales[..., 0]


def unpack(packed: Packed) -> Tensor:
    """The matrix (..., out, in) that it stands for, in its dtype."""
    if packed.bits == 8:
        return packed.values.float().mul_(packed.scales[..., None]).to(packed.dtype)
    *outputs, words = packed.values.shape
    words = packed.values.view(*outputs, words // GROUP, 1, GROUP).int()
    shifts = torch.arange(0, 4 * PLANES, 4, device=words.device, dtype=words.dtype)[:, None]
    numbers = (words >> shifts).bitwise_and_(15).sub_(8)
    scales = packed.scales.view(*outputs, -1, PLANES, 1).float()
    return numbers.float().mul_(scales).flatten(-3)[..., : packed.inputs].to(packed.dtype)


def relative_error(weight: Tensor, bits: int) -> float:
    """|w - w'| / |w| over the whole matrix: what packing costs, before any activation is seen."""
    weight = weight.float()
    return ((weight - unpack(pack(weight, bits))).norm() / weight.norm()).item()
