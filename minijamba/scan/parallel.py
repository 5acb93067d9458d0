"""The selective scan in parallel: an associative scan in chunks, whose memory does not grow with the sequence.

A step of the recurrence, state -> decay * state + input, followed by another one is again such a step:

    (decay, input) then (decay', input')  =  (decay' decay, decay' input + input')

and this product is associative. So a stretch of steps boils down to one pair before anybody knows the state that it
starts from, and stretches can be worked on side by side.

Blocks, for speed: a chunk is cut into blocks; all blocks are summed up side by side, the few sums are chained, and all
blocks run side by side, each from its own start (`linear_scan_`). Nothing is ever divided by a decay.

Chunks, for memory: tensors with both a time and a state axis exist for one chunk at a time. The forward pass keeps the
state at the boundaries of the chunks only; the backward pass goes through the chunks from the last to the first and
computes each one's states again.

Layout: time first, so that one step is one piece of memory; channels last, so that rows are long: (t, b, n, c).
"""

from itertools import repeat

import torch
from torch import Tensor

from .naive import first_state, skip_and_gate, step_length

BLOCK = 16  # steps
# Sizes in numbers a tensor, found by timing with nothing else running: a chunk stays in a CPU's cache; a step wider
# than this keeps the processor busy by itself, where blocks would only repeat its arithmetic.
CHUNK_SIZE = 2**20
WIDE_STEP = 2**13


def scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, state: Tensor | None, segments: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The function of `naive.scan`, same arguments."""
    state = first_state(x, A) if state is None else state
    wide = state.dtype
    u = x.to(wide)
    y, state = _recurrence(
        u, step_length(delta.to(wide), delta_bias, delta_softplus), A.to(wide), B.to(wide), C.to(wide), state, segments
    )
    return skip_and_gate(y, u, D, z).to(x.dtype), state


def _recurrence(x, delta, A, B, C, state, segments) -> tuple[Tensor, Tensor]:
    """y_t = <C_t, state_t> and the last state: x, delta, y (b, t, c); B, C (b, t, n); A (c, n); state (b, c, n)."""
    with torch.autocast(x.device.type, enabled=False):  # it would round the products with C
        y, state = _ChunkedScan.apply(
            *(tensor.transpose(0, 1).contiguous() for tensor in (x, delta, B, C)),
            A.T.contiguous(),
            state.mT.contiguous(),
            None if segments is None else starts(segments).T,
        )
    return y.transpose(0, 1), state.mT.contiguous()


def starts(segments: Tensor) -> Tensor:
    """(b, t) bool: a segment starts here. The first step of a call never does: it continues the incoming state."""
    changes = torch.zeros(segments.shape, dtype=torch.bool, device=segments.device)
    changes[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return changes


def refuse_to_differentiate_twice(rung: str) -> None:
    """For a backward pass by hand, which autograd cannot differentiate: it would take all gradients for constants."""
    if torch.is_grad_enabled():  # as it is with create_graph=True
        raise RuntimeError(f"the {rung} scan can be differentiated once, not with create_graph=True: pass rung='naive'")


class _ChunkedScan(torch.autograd.Function):
    """y_t = <C_t, state_t> and the last state, where state_t = exp(delta_t A) * state_{t-1} + B_t delta_t x_t.

    x, delta, y (t, b, c); B, C (t, b, n); A (n, c); state (b, n, c); starts (t, b) bool, or None.
    """

    @staticmethod
    def forward(ctx, x, delta, B, C, A, state, starts):
        length, room = _room(2, x, state)
        y, boundaries = torch.empty_like(x), []
        for x_k, delta_k, B_k, C_k, y_k, starts_k in _chunks(length, x, delta, B, C, y, starts):
            boundaries.append(state)
            _, states = _states(room, delta_k * x_k, delta_k, B_k, A, state, starts_k)
            torch.matmul(C_k[:, :, None], states[1:], out=y_k[:, :, None])
            state = states[-1].clone()
        ctx.save_for_backward(x, delta, B, C, A, starts, *boundaries)
        return y, state

    @staticmethod
    def backward(ctx, grad_y, grad_state):
        refuse_to_differentiate_twice("parallel")
        x, delta, B, C, A, starts, *boundaries = ctx.saved_tensors
        length, room = _room(3, x, grad_state)
        grad_A, grads = torch.zeros_like(A), []
        chunks = zip(_chunks(length, x, delta, B, C, grad_y, starts), boundaries, strict=True)
        for (x_k, delta_k, B_k, C_k, grad_y_k, starts_k), state in reversed(list(chunks)):
            u_k = delta_k * x_k
            decay, states = _states(room[:2], u_k, delta_k, B_k, A, state, starts_k)
            # The gradient at a state: through its own y, then through every later state.
            adjoint = torch.mul(C_k[..., None], grad_y_k[:, :, None], out=room[2, : len(u_k)])
            linear_scan_(decay[1:], adjoint, grad_state, reverse=True)
            grad_state = decay[0] * adjoint[0]

            grad_u = (B_k[:, :, None] @ adjoint).squeeze(2)
            grad_B = (adjoint @ u_k[..., None]).squeeze(3)
            grad_C = (states[1:] @ grad_y_k[..., None]).squeeze(3)
            grad_exponent = adjoint.mul_(decay[:-1]).mul_(states[:-1])  # of delta A
            # Decays and states are used up: their room takes the products.
            grad_delta = grad_u * x_k + torch.mul(grad_exponent, A, out=states[1:]).sum(2)
            grad_A += torch.mul(grad_exponent, delta_k[:, :, None], out=states[1:]).sum((0, 1))
            grads.append((grad_u * delta_k, grad_delta, grad_B, grad_C))
        grads = (torch.cat(pieces) for pieces in zip(*reversed(grads), strict=True))
        return *grads, grad_A, grad_state, None


def _room(tensors: int, x: Tensor, state: Tensor) -> tuple[int, Tensor]:
    """The length of a chunk, and memory for that many tensors (length + 1, b, n, c), used by all chunks in turn."""
    length = min(max(CHUNK_SIZE // max(state.numel(), 1) // BLOCK, 1) * BLOCK, 256)
    return length, state.new_empty(tensors, min(length, len(x)) + 1, *state.shape)


def _chunks(length: int, *tensors: Tensor | None) -> list[tuple]:
    """The tensors cut along time, piece by piece; None stays None."""
    return list(zip(*(repeat(None) if tensor is None else tensor.split(length) for tensor in tensors), strict=False))


def _states(
    room: Tensor, u: Tensor, delta: Tensor, B: Tensor, A: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A chunk's decay and states, (k+1, b, n, c) both: states[i+1] = decay[i] states[i] + input, states[0] = state.

    The last decay is one: it leads out of the chunk.
    """
    decay, states = room[:, : len(u) + 1]
    torch.mul(delta[:, :, None], A, out=decay[:-1]).exp_()
    if starts is not None:
        decay[:-1].masked_fill_(starts[:, :, None, None], 0)
    decay[-1] = 1
    torch.mul(u[:, :, None], B[..., None], out=states[1:])
    states[0] = state
    linear_scan_(decay[:-1], states[1:], state)
    return decay, states


def linear_scan_(decay: Tensor, states: Tensor, state: Tensor, reverse: bool = False) -> None:
    """In place: states_t <- decay_t states_{t-1} + states_t, where states_{-1} is `state`.

    With `reverse` from the last step to the first: states_t <- decay_t states_{t+1} + states_t.

    Args: decay, states (t, b, n, c); state (b, n, c).
    """
    if len(states) % BLOCK or state.numel() > WIDE_STEP:
        return _run(decay, states, state, states, reverse)
    decay, states = (tensor.unflatten(0, (-1, BLOCK)).transpose(0, 1) for tensor in (decay, states))
    # What each block does to the state that enters it: state -> total * state + end.
    total, end = decay.prod(0), torch.zeros_like(states[0])
    _run(decay, states, end, [end] * BLOCK, reverse)
    # The state after each block, and so the one before each block.
    _run(total, end, state, end, reverse)
    start = torch.cat([end[1:], state[None]] if reverse else [state[None], end[:-1]])
    _run(decay, states, start, states, reverse)


def _run(decay, inputs, state, places, reverse) -> None:
    """One step after the other; each new state is written to its place."""
    steps = list(zip(decay, inputs, places, strict=True))
    for decay_t, input_t, place in reversed(steps) if reverse else steps:
        state = torch.addcmul(input_t, decay_t, state, out=place)
