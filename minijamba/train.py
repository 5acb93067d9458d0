"""One training run: AdamW, warm-up and cosine, clipped gradients, cross-entropy plus the balance of the experts."""

import math
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch.nn.utils import clip_grad_norm_

from .model import Trace
from .moe import balance_loss


class Record(NamedTuple):
    """One step of a run."""

    step: int
    loss: float  # cross-entropy, nats a token
    balance: float  # all MoE layers together: k = even use, up to e = the same experts for all tokens; 0 without MoE
    tokens_per_second: float


def losses(model, batch):
    """Cross-entropy (nats a token) and balance loss of a batch (b, t + 1), each a scalar tensor."""
    trace = Trace()
    logits = model(batch[:, :-1], trace=trace)
    loss = F.cross_entropy(rearrange(logits, "b t v -> (b t) v").float(), rearrange(batch[:, 1:], "b t -> (b t)"))
    balance = balance_loss(trace.router, model.config.num_experts_per_tok) if trace.router else torch.zeros(())
    return loss, balance


def parameter_groups(model, weight_decay):
    """The model's parameters as two AdamW groups. Matrices decay; A_log, D, norms, biases and embeddings do not.

    Decay pulls a weight to 0. For A_log that is a time scale of its own (A = -1), for a norm it silences the layer.
    """
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim > 1 and not name.endswith("A_log") and "embed_tokens" not in name
        groups[is_matrix].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]


def schedule(progress, warmup=0.05, floor=0.1):
    """Share of the peak learning rate after `progress` (0 to 1) of the run.

    A line up to 1 over the first `warmup`, then half a cosine down to `floor`.

    >>> [round(schedule(progress), 2) for progress in (0.0, 0.025, 0.05, 0.525, 1.0)]
    [0.0, 0.5, 1.0, 0.55, 0.1]
    """
    if progress < warmup:
        return progress / warmup
    turn = math.pi * min(1.0, (progress - warmup) / (1 - warmup))
    return floor + (1 - floor) * (1 + math.cos(turn)) / 2


def train(model, batches, *, steps=None, seconds=None, learning_rate=3e-3, weight_decay=0.1, clip=1.0, progress=True):
    """Trains in place for a number of steps or of seconds, whichever ends first.

        loss = cross-entropy + router_aux_loss_coef * balance

    Args:
        batches: iterable of (b, t + 1) int64; inputs are [:, :-1], targets [:, 1:]. The run also ends with it.
        learning_rate: the peak of the warm-up and cosine (see `schedule`).
        clip: largest norm of the whole gradient.
        progress: a tqdm bar on stderr.
    Returns: list of Record, one a step.
    Raises: ValueError if neither steps nor seconds is given, or one is not above 0; FloatingPointError, with the model
        as it was before that step, when the loss or the gradient is no longer finite.
    Source: Mamba (arXiv 2312.00752), appendix E.2: betas (0.9, 0.95), weight decay 0.1, clip 1.0.
    """
    from tqdm import tqdm

    for name, value in (("steps", steps), ("seconds", seconds)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}, but a run needs more than 0")
    if steps is None and seconds is None:
        raise ValueError("a run needs an end: give steps or seconds")
    groups = parameter_groups(model, weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)
    device = next(model.parameters()).device
    history, start, done = [], time.perf_counter(), 0.0
    model.train()
    with tqdm(total=100, disable=not progress, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar:
        for step, batch in enumerate(batches):
            began = time.perf_counter()
            done = max(step / steps if steps else 0.0, (began - start) / seconds if seconds else 0.0)
            if done >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * schedule(done)
            loss, balance = losses(model, batch.to(device))
            optimizer.zero_grad()
            (loss + model.config.router_aux_loss_coef * balance).backward()
            norm = clip_grad_norm_(model.parameters(), clip)
            _refuse_infinity(step, loss, norm, learning_rate)
            optimizer.step()
            speed = (batch.numel() - len(batch)) / (time.perf_counter() - began)
            history.append(Record(step, loss.item(), balance.item(), speed))
            bar.set_postfix_str(f"loss {loss.item():.2f}, {speed:,.0f} tokens/s", refresh=False)
            bar.update(100 * done - bar.n)
        bar.update(100 * min(1.0, done) - bar.n)
    return history


def _refuse_infinity(step, loss, norm, learning_rate):
    if not torch.isfinite(loss + norm):
        raise FloatingPointError(
            f"step {step}: loss {loss.item():.4g}, gradient norm {norm.item():.4g}: lower the learning rate (now at "
            f"most {learning_rate:g}) or look for the layer that overflows"
        )


@torch.no_grad()
def evaluate(model, batches):
    """Mean cross-entropy, nats a token, over batches (b, t + 1) of one shape."""
    model.eval()
    device = next(model.parameters()).device
    values = [losses(model, batch.to(device))[0] for batch in batches]
    return torch.stack(values).mean().item()
