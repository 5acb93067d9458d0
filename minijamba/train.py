"""Training: one step of it, and the loop. Recipes and runs that survive a crash are in `run`."""

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from .data import IGNORED, Batch
from .loss import cross_entropy
from .model import Jamba, Trace
from .moe import balance_loss, expert_load, waits_for_host

PARTS = {"attention": "attention", "mamba": "mamba", "mlp": "MLP", "moe": "experts"}


class Record(NamedTuple):
    """One step of a run."""

    step: int
    loss: float  # cross-entropy, nats a judged token
    balance: float  # all MoE layers together: k = even use, up to e = the same experts for all tokens; 0 without MoE
    norm: float  # of the whole gradient, before it is clipped
    learning_rate: float
    busiest: float  # tokens of the busiest expert of any layer, as a multiple of an even share; 0 without MoE
    idlest: float  # the same of the idlest
    tokens_per_second: float
    activations: tuple[float, ...]  # root mean square of the embeddings, and of the stream after every layer

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.balance) and math.isfinite(self.norm)


def losses(model: Jamba, batch: Batch, trace: Trace | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy (nats a judged token) and balance loss of a batch, each a scalar tensor."""
    trace = Trace() if trace is None else trace
    logits = model(batch.tokens, segments=batch.segments, trace=trace)
    loss = cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    return loss, balance_loss(trace.router, model.config.num_experts_per_tok) if trace.router else loss.new_zeros(())


def parameter_groups(model: Jamba, weight_decay: float) -> list[dict]:
    """The model's parameters as two AdamW groups. Matrices decay; A_log, D, norms, biases and embeddings do not.

    Decay pulls a weight to 0. For A_log that is a time scale of its own (A = -1), for a norm it silences the layer.
    """
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim > 1 and not name.endswith(("A_log", "bias")) and "embed_tokens" not in name
        groups[is_matrix].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]


def schedule(progress: float, warmup: float = 0.05, floor: float = 0.1) -> float:
    """Share of the peak learning rate after `progress` (0 to 1) of the run.

    A line up to 1 over the first `warmup`, then half a cosine down to `floor`.

    >>> [round(schedule(progress), 2) for progress in (0.0, 0.025, 0.05, 0.525, 1.0)]
    [0.0, 0.5, 1.0, 0.55, 0.1]
    """
    if progress < warmup:
        return progress / warmup
    turn = math.pi * min(1.0, (progress - warmup) / (1 - warmup))
    return floor + (1 - floor) * (1 + math.cos(turn)) / 2


class Trainer:
    """A model and its optimiser, one step at a time.

        loss = cross-entropy + router_aux_loss_coef * balance

    On a GPU the whole step, forward to update, is recorded once in a CUDA graph and replayed from then on: a small
    model would otherwise wait for Python at each of its thousand kernels. A step whose loss or gradient is not finite
    changes nothing.

    Args:
        weight_decay: of matrices alone, see `parameter_groups`.
        clip:       largest norm of the whole gradient.
        accumulate: pieces that a batch is taken in, so that one piece's activations are in memory at a time. The
                    cross-entropy and its gradient are those of the whole batch; the balance, and Sinkhorn's plan, are
                    each piece's own.
        bfloat16:   compute in bfloat16 where that is safe (torch.autocast); weights, optimiser, residual stream and
                    recurrence stay float32.
        recompute:  keep only what enters each layer, and compute the layer again for its gradient.
        graph:      "auto" takes a CUDA graph on a GPU, except where experts are not computed in bfloat16, for then the
                    host has to know how many tokens each got; False never does.
    Source: Mamba (arXiv 2312.00752), appendix E.2: betas (0.9, 0.95), weight decay 0.1, clip 1.0.
    """

    def __init__(
        self,
        model: Jamba,
        *,
        weight_decay: float = 0.1,
        clip: float = 1.0,
        accumulate: int = 1,
        bfloat16: bool = False,
        recompute: bool = False,
        graph: bool | str = "auto",
    ) -> None:
        self.model, self.clip, self.accumulate = model, clip, accumulate
        self.bfloat16, self.recompute = bfloat16, recompute
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        on_gpu = model.device.type == "cuda"
        # As a tensor the rate can change between replays of the graph.
        self.learning_rate = torch.zeros((), device=model.device)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, weight_decay), self.learning_rate, betas=(0.9, 0.95), fused=True, capturable=on_gpu
        )
        dtype = torch.bfloat16 if bfloat16 else model.dtype
        if graph == "auto":
            graph = on_gpu and not waits_for_host(model.config, dtype, model.device)
        self.graph, self.wants_graph = None, graph

    def step(self, batch: Batch, learning_rate: float) -> Tensor:
        """Trains on one batch. Returns what it measured, still on the device: `record` reads it."""
        if len(batch.tokens) % self.accumulate:
            raise ValueError(f"{len(batch.tokens)} sequences do not make {self.accumulate} equal pieces: change one")
        self.learning_rate.fill_(learning_rate)
        if not self.wants_graph:
            return self._step(batch.to(self.model.device))
        if self.graph is None:
            self._capture(batch)
        for fixed, new in zip(self._batch, batch, strict=True):
            if (fixed is None) != (new is None) or (fixed is not None and fixed.shape != new.shape):
                raise ValueError("a CUDA graph is recorded for batches of one form: keep it, or pass graph=False")
            if fixed is not None:
                fixed.copy_(new, non_blocking=True)
        self.graph.replay()
        return self._measured

    def _step(self, batch: Batch) -> Tensor:
        judged = (batch.targets != IGNORED).sum()
        measured = [self._backward(piece, judged) for piece in batch.split(self.accumulate)]
        norm = clip_grad_norm_(self.parameters, self.clip)
        loss, balance, *rest = torch.stack(measured).unbind(1)
        loss, balance = loss.sum(), balance.mean()
        # The fused AdamW leaves everything as it is where this is 1.
        self.optimizer.found_inf = (~torch.isfinite(loss + balance + norm)).float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.stack([loss, balance, norm.float(), *(value.mean() for value in rest)])

    def _backward(self, piece: Batch, judged: Tensor) -> Tensor:
        trace = Trace()
        with self._precision(), self._memory():
            loss, balance = losses(self.model, piece, trace)
        count = (piece.targets != IGNORED).sum()
        # A piece without a judged target has no mean.
        loss = torch.where(count > 0, loss * count / judged, 0.0)
        weight = self.model.config.router_aux_loss_coef / self.accumulate
        (loss + weight * balance).backward()
        with torch.no_grad():
            load = expert_load(trace.experts, self.model.config.num_experts) if trace.experts else loss.new_zeros(1)
            sizes = [_root_mean_square(h) for h in trace.hidden]
            return torch.stack([loss.detach().float(), balance.detach().float(), load.max(), load.min(), *sizes])

    def _precision(self):
        if not self.bfloat16:
            return nullcontext()
        return torch.autocast(self.model.device.type, torch.bfloat16)

    @contextmanager
    def _memory(self):
        before, self.model.recompute = self.model.recompute, self.recompute
        try:
            yield
        finally:
            self.model.recompute = before

    def _capture(self, batch: Batch) -> None:
        """Record `_step` in a CUDA graph. Steps on a side stream come first, as torch asks; they leave no trace."""
        before = [parameter.detach().clone() for parameter in self.parameters]
        states = {key: value.clone() for key, value in self._optimizer_tensors()}
        self._batch = Batch(*(None if tensor is None else tensor.to(self.model.device).clone() for tensor in batch))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step(self._batch)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._measured = self._step(self._batch)
        with torch.no_grad():
            for parameter, value in zip(self.parameters, before, strict=True):
                parameter.copy_(value)
            for key, value in self._optimizer_tensors():
                value.copy_(states[key]) if key in states else value.zero_()

    def _optimizer_tensors(self):
        for i, parameter in enumerate(self.parameters):
            for name, value in self.optimizer.state.get(parameter, {}).items():
                yield (i, name), value

    def record(self, step: int, measured: Tensor, tokens: int, began: float) -> Record:
        """What `step` measured, once the device is done with it. `began` is by the clock time.perf_counter."""
        loss, balance, norm, busiest, idlest, *activations = measured.tolist()
        speed = tokens / (time.perf_counter() - began)
        return Record(
            step, loss, balance, norm, self.learning_rate.item(), busiest, idlest, speed, tuple(activations)
        )

    def state_dict(self) -> dict:
        """All that the next step depends on, the data's position apart."""
        random = {"cpu": torch.get_rng_state()}
        if self.model.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.model.device)
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "random": random}

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        torch.set_rng_state(state["random"]["cpu"].cpu())
        if "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"].cpu(), self.model.device)


def _root_mean_square(h: Tensor) -> Tensor:
    wide = torch.promote_types(h.dtype, torch.float32)
    return torch.linalg.vector_norm(h, dtype=wide).float() / h.numel() ** 0.5


@contextmanager
def repeatable() -> Iterator[None]:
    """Inside the block the same run has the same bits every time: only algorithms that add in a fixed order."""
    # cuBLAS reads this when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


class Watch:
    """Remembers the size of every layer's output, and tells which one grew first when a run breaks."""

    GROWN = 3.0  # times its usual size; a healthy layer moves by a few per cent within a hundred steps

    def __init__(self, model: Jamba, steps: int = 200) -> None:
        self.names = ["the embeddings"] + [
            f"layer {i} ({', '.join(PARTS[part] for part in layer if part)})"
            for i, layer in enumerate(model.config.layers)
        ]
        self.history: deque[Record] = deque(maxlen=steps)

    def see(self, record: Record) -> None:
        self.history.append(record)

    def verdict(self) -> str:
        """The layer whose output left its usual size first, given that the last record seen is the broken one.

        The usual size is the median of those remembered. Where several grew in the same step, the lowest did.
        """
        *before, last = self.history
        if before:
            usual = torch.tensor([record.activations for record in before]).median(0).values.tolist()
            for record in self.history:
                for name, size, normal in zip(self.names, record.activations, usual, strict=True):
                    if not size <= self.GROWN * max(normal, 1e-12):
                        times = f"{size / max(normal, 1e-12):.3g} times its usual {normal:.3g}"
                        return f"{name} grew first, at step {record.step}: its output had a size of {size:.3g}, {times}"
        for name, size in zip(self.names, last.activations, strict=True):
            if not math.isfinite(size):
                return f"{name} is the first whose output is not finite"
        return "no layer's output had grown, so it is the head, the loss or the gradient"


def broken(record: Record, watch: Watch) -> FloatingPointError:
    """What to raise for a step that is not finite."""
    return FloatingPointError(
        f"step {record.step}: loss {record.loss:.4g}, gradient norm {record.norm:.4g}, not finite; {watch.verdict()}. "
        f"The model is as it was before this step. Lower the learning rate (now {record.learning_rate:.3g})"
    )


def train(
    model: Jamba,
    batches: Callable[[int], Batch],
    *,
    steps: int | None = None,
    seconds: float | None = None,
    learning_rate: float = 3e-3,
    progress: bool = True,
    **options,
) -> list[Record]:
    """Trains in place for a number of steps or of seconds, whichever ends first.

    Args:
        batches: step -> Batch, as `data.Windows`.
        learning_rate: the peak of the warm-up and cosine (see `schedule`).
        progress: a tqdm bar on stderr.
        options: of `Trainer`.
    Returns: list of Record, one a step.
    Raises: ValueError if neither steps nor seconds is given, or one is not above 0; FloatingPointError, with the model
        as it was before that step, when the loss or the gradient is no longer finite.
    """
    from tqdm import tqdm

    for name, value in (("steps", steps), ("seconds", seconds)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}, but a run needs more than 0")
    if steps is None and seconds is None:
        raise ValueError("a run needs an end: give steps or seconds")
    trainer, watch, history = Trainer(model, **options), Watch(model), []
    start = time.perf_counter()
    model.train()
    with tqdm(total=100, disable=not progress, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar:
        while True:
            began = time.perf_counter()
            done = max(len(history) / steps if steps else 0.0, (began - start) / seconds if seconds else 0.0)
            bar.update(100 * min(1.0, done) - bar.n)
            if done >= 1:
                return history
            batch = batches(len(history))
            measured = trainer.step(batch, learning_rate * schedule(done))
            record = trainer.record(len(history), measured, batch.tokens.numel(), began)
            watch.see(record)
            if not record.finite:
                raise broken(record, watch)
            history.append(record)
            bar.set_postfix_str(f"loss {record.loss:.2f}, {record.tokens_per_second:,.0f} tokens/s", refresh=False)


@torch.no_grad()
def evaluate(model: Jamba, batches: list[Batch], bfloat16: bool = False) -> float:
    """Mean cross-entropy over batches, nats a judged token."""
    training = model.training
    model.eval()
    total, judged = 0.0, 0
    with torch.autocast(model.device.type, torch.bfloat16) if bfloat16 else nullcontext():
        for batch in batches:
            count = int((batch.targets != IGNORED).sum())
            total += losses(model, batch.to(model.device))[0].double() * count
            judged += count
    model.train(training)
    return (total / judged).item()
