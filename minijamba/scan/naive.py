"""The selective scan by its definition, one step of time after the other. The judge of the other rungs."""

import torch
import torch.nn.functional as F
from torch import Tensor


def scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, state: Tensor | None, segments: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The function of `selective_scan`, with every argument checked; returns y and the last state."""
    state = first_state(x, A) if state is None else state
    wide = state.dtype
    u, A, B, C = (tensor.to(wide) for tensor in (x, A, B, C))
    delta = step_length(delta.to(wide), delta_bias, delta_softplus)
    y = []
    # unbind and not [:, t], whose gradient is a tensor as long as the sequence, for every step
    steps = zip(*(tensor.unbind(1) for tensor in (u, delta, B, C)), strict=True)
    for t, (u_t, delta_t, B_t, C_t) in enumerate(steps):
        if segments is not None and t > 0:
            starts = segments[:, t] != segments[:, t - 1]
            state = state.masked_fill(starts[:, None, None], 0)
        A_bar = torch.exp(delta_t[:, :, None] * A)
        B_bar = delta_t[:, :, None] * B_t[:, None, :]
        state = A_bar * state + B_bar * u_t[:, :, None]
        y.append((state * C_t[:, None, :]).sum(-1))
    return skip_and_gate(torch.stack(y, dim=1), u, D, z).to(x.dtype), state


def first_state(x: Tensor, A: Tensor) -> Tensor:
    """Zeros (b, c, n)."""
    return x.new_zeros(len(x), *A.shape, dtype=state_dtype(x))


def state_dtype(x: Tensor) -> torch.dtype:
    """The state sums hundreds of steps: float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def step_length(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> Tensor:
    """delta (b, t, c) as the recurrence uses it: softplus(delta + delta_bias), both parts optional."""
    if delta_bias is not None:
        delta = delta + delta_bias.to(delta.dtype)
    return F.softplus(delta) if delta_softplus else delta


def skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """(y + D x) silu(z), all (b, t, c), both parts optional."""
    if D is not None:
        y = torch.addcmul(y, x, D.to(y.dtype))
    return y if z is None else y * F.silu(z.to(y.dtype))
