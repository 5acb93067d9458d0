"""Parts 1 and 2: the selective scan of Mamba over a sequence, and one step of it."""

import torch
from torch import Tensor


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, *,
    state: Tensor | None = None, return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Part 1. A linear recurrence for every channel, whose coefficients depend on the token.

        state_t = exp(delta_t A) * state_{t-1} + delta_t B_t x_t
        y_t     = <C_t, state_t> + D x_t

    A loop over time is enough. Any split of a sequence into calls, each given the state that the one before it
    returned, must equal one call.

    Args:
        x:     (b, t, c)  inputs.
        delta: (b, t, c)  length of the step, > 0: softplus was applied already.
        A:     (c, n)     decay rates, < 0.
        B, C:  (b, t, n)  what a token writes to and reads from the state; the same for all channels.
        D:     (c,)       skip connection; none when None.
        state: (b, c, n)  to start from; zeros when None. It must not be changed.
        return_state:     return the last state, too.
    Returns: y (b, t, c) in x's dtype, or (y, state). The state sums hundreds of steps: where it starts from zeros it is
        float32 at least, torch.promote_types(x.dtype, torch.float32), and all is computed in its dtype.
    Source: Mamba (arXiv 2312.00752), algorithm 2, with B discretised by Euler's rule as in its code.
    """
    # <solution>
    if state is None:
        state = x.new_zeros(len(x), *A.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    y = []
    for x_t, delta_t, B_t, C_t in zip(*(tensor.unbind(1) for tensor in (x, delta, B, C)), strict=True):
        y_t, state = step(state, x_t, delta_t, A, B_t, C_t, D)
        y.append(y_t)
    y = torch.stack(y, dim=1)
    return (y, state) if return_state else y
    # </solution>


def step(
    state: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Part 2. One step of `selective_scan`: what one more token costs, however many came before.

    It is the body of your loop; when this works, let the loop call it.

    Args: state (b, c, n), which must not be changed; x, delta (b, c); B, C (b, n); A (c, n); D (c,) or None.
    Returns: y (b, c) in x's dtype and the new state (b, c, n) in the state's.
    """
    # <solution>
    dtype, (x, delta, A, B, C) = x.dtype, (tensor.to(state.dtype) for tensor in (x, delta, A, B, C))
    A_bar = torch.exp(delta[:, :, None] * A)
    state = A_bar * state + (delta * x)[:, :, None] * B[:, None, :]
    y = torch.einsum("b c n, b n -> b c", state, C)
    return (y if D is None else y + D * x).to(dtype), state
    # </solution>
