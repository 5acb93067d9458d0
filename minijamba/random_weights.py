"""Random weights that behave like trained ones: for checkpoints of full size where the released one is not at hand."""

import math
from hashlib import sha256

import torch
from torch import Tensor

from .budget import Weight
from .config import JambaConfig

TO_RESIDUAL = ("o_proj", "out_proj", "down_proj")
# Standard deviation of the router's logits. At zero all experts are alike, and rounding would decide between them: with
# another rung, or in bfloat16, tokens would take other experts. At 1.5 the second and the third of 16 differ by 0.3 in
# the middle, far above rounding, and no expert takes everything.
ROUTER = 1.5


def random_weight(weight: Weight, config: JambaConfig, seed: int = 0, device: str | torch.device = "cpu") -> Tensor:
    """A weight of a random model, float32; the same for the same seed, name and kind of device, whatever else is made.

        matrices           normal, std fan_in^-0.5: what a norm has scaled to one keeps that size
        ... to the stream  times 2 / (number of parts)^0.5: all together add about as much as the embedding holds
        embedding          normal, std 1, the scale of the stream; where it is also the head d^-0.5, for logits of one
        router             normal, std 1.5 d^-0.5
        convolution        uniform in +- w^-0.5, torch's own
        Mamba              A = -1 .. -n, D = 1, steps of length 0.001 to 0.1: `mamba.init_delta`, a long memory
        norms 1, other biases 0

    Source: Mamba, section 3.6, for its start.
    """
    generator = torch.Generator(device).manual_seed(_seed_of(weight.name, seed))
    name = weight.name.split(".")
    matrix, kind = (name[-2], name[-1]) if name[-1] in ("weight", "bias") else ("", name[-1])
    if kind == "A_log":
        return torch.arange(1.0, weight.shape[1] + 1, device=device).log().expand(weight.shape)
    if kind == "D" or (kind == "weight" and "norm" in matrix):
        return torch.ones(weight.shape, device=device)
    if matrix == "conv1d":
        return _uniform(weight.shape, config.mamba_d_conv**-0.5, generator)
    if matrix == "dt_proj":
        return (_delta_bias if kind == "bias" else _delta_weight)(weight.shape, generator)
    if kind == "bias":
        return torch.zeros(weight.shape, device=device)
    return torch.randn(weight.shape, generator=generator, device=device).mul_(_std(weight, matrix, config))


def _seed_of(name: str, seed: int) -> int:
    return int.from_bytes(sha256(f"{seed} {name}".encode()).digest()[:7], "little")


def _std(weight: Weight, matrix: str, config: JambaConfig) -> float:
    fan_in = weight.shape[-1] ** -0.5
    if matrix == "embed_tokens":
        return fan_in if config.tie_word_embeddings else 1.0
    if matrix == "router":
        return ROUTER * fan_in
    parts = sum(part is not None for layer in config.layers for part in layer)
    return fan_in * 2 / parts**0.5 if matrix in TO_RESIDUAL else fan_in


def _uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device).mul_(2 * bound).sub_(bound)


def _delta_weight(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return _uniform(shape, shape[-1] ** -0.5, generator)


def _delta_bias(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The inverse of softplus of steps that are log-uniform in [0.001, 0.1]."""
    first, last = math.log(1e-3), math.log(0.1)
    delta = torch.rand(shape, generator=generator, device=generator.device).mul_(last - first).add_(first).exp_()
    return delta + torch.log(-torch.expm1(-delta))
