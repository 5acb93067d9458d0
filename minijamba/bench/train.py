"""A whole training step, forward to update, beside transformers' Jamba with mamba-ssm and causal-conv1d."""

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import load, save
from ..config import JambaConfig
from ..data import IGNORED, Batch
from ..model import Jamba
from ..rungs import find_device
from ..train import Trainer
from .measure import PEERS, PeakOfProcess, matrix_rate, warn_of_company, watch
from .records import record, table

LEARNING_RATE = 1e-4
VOCABULARY = 16384
STEPS = 8  # in a row, of which the mean is one figure

# name -> sizes and sequences a step. On a CPU, the same in small.
HYBRIDS = {
    "cuda": {
        "dense hybrid": ({"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16, "num_experts": 1,
                          "num_attention_heads": 12, "num_key_value_heads": 6}, 16),
        "MoE hybrid": ({"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_experts": 8,
                        "num_attention_heads": 8, "num_key_value_heads": 4}, 32),
    },
    "cpu": {
        "dense hybrid": ({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_experts": 1,
                          "num_attention_heads": 4, "num_key_value_heads": 2}, 2),
        "MoE hybrid": ({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_experts": 4,
                        "num_attention_heads": 4, "num_key_value_heads": 2}, 2),
    },
}  # fmt: skip
LENGTH = {"cuda": 1024, "cpu": 128}
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}
# Of first losses; another model costs up to 2 more. Logits have sizes of about one, in bfloat16 with 8 bits.
TOLERANCE = {"cuda": 0.02, "cpu": 1e-4}
OURS = "minijamba"
KERNELS, LOOP = "transformers, mamba-ssm, causal-conv1d", "transformers without kernels"
SIDES = {"cuda": [OURS, KERNELS], "cpu": [OURS, LOOP]}


def ours(folder: str, batch: Batch) -> Callable[[], Tensor]:
    """What `minijamba train` does in a step, its clipping, balance loss and measurements included."""
    trainer = Trainer(load(folder, device=batch.tokens.device).train(), weight_decay=0.01)
    return lambda: trainer.step(batch, LEARNING_RATE)[0]


def transformers(packages: tuple[str, ...], folder: str, batch: Batch) -> Callable[[], Tensor]:
    """The same optimiser; it takes the kernels of `packages` by itself, if they can be imported."""
    for package in packages:
        import_module(package)
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(batch.tokens.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    labels = batch.targets.roll(1, dims=1)  # transformers moves them back by one; the first is IGNORED

    def step():
        loss = model(batch.tokens, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


PREPARE = {
    OURS: ours,
    KERNELS: partial(transformers, PEERS),
    LOOP: partial(transformers, ()),
}


def bench_train(
    device: str = "auto",
    *,
    sides: list[str] | None = None,
    repeats: int = 5,
    commit: str | None = None,
    output: Path | None = None,
) -> Path:
    """Measure training of the two hybrids and record tokens a second and peak memory.

    Both sides start from the same weights, take the same tokens and must give the same first loss. Each figure is the
    median of `repeats` means of 8 steps in a row.

    Returns: the file. Prints the table. Raises: ValueError for a side that does not exist.
    """
    device = find_device(device)
    for side in sides or ():
        if side not in PREPARE:
            raise ValueError(f"there is no side {side!r} here: choose of {', '.join(map(repr, PREPARE))}")
    warn_of_company()
    rows, left_out = [], {}
    for name, (sizes, sequences) in HYBRIDS[device.type].items():
        with tempfile.TemporaryDirectory() as folder:
            batch = _start(sizes, sequences, device, folder)
            for side in sides or SIDES[device.type]:
                try:
                    row = _measure(side, folder, batch, device, repeats)
                except ImportError as error:
                    left_out[side] = str(error)
                    print(f"{side} is left out: {error}")
                    continue
                print(f"{name}, {side}: {row['tokens_per_second']:,.0f} tokens/s, {row['bytes'] / 2**30:.2f} GiB")
                case = {"measure": f"training step, {name}", "sizes": sizes}
                case |= {"batch": sequences, "steps": LENGTH[device.type]}
                rows.append(case | row)
        losses = [row["first_loss"] for row in rows if row["measure"].endswith(name)]
        agree = not losses or max(losses) - min(losses) < TOLERANCE[device.type]
        assert agree, f"{name}: the first losses differ: {losses}"
    facts = {"dtype": str(DTYPE[device.type]).removeprefix("torch."), "repeats": repeats, "left_out": left_out}
    rate = matrix_rate(device, DTYPE[device.type])
    path = record(f"train_{device.type}", rows, device=device, output=output, commit=commit, matrix_rate=rate, **facts)
    print(table(json.loads(path.read_text(encoding="utf-8"))))
    print(f"recorded in {path}")
    return path


@torch.no_grad()
def _start(sizes: dict, sequences: int, device: torch.device, folder: str) -> Batch:
    """Write a new model from which all sides start; returns what they are trained on.

    The targets are what this model itself takes for likeliest. Random ones would cost every new model about ln(v), so
    that equal first losses would not show that two sides hold the same model.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model = Jamba(JambaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH[device.type], **sizes))
    save(model, f"{folder}/model", dtype=DTYPE[device.type])
    generator = torch.Generator(device).manual_seed(0)
    tokens = torch.randint(3, VOCABULARY, (sequences, LENGTH[device.type]), device=device, generator=generator)
    targets = load(f"{folder}/model", device=device)(tokens).argmax(-1)
    targets[:, -1] = IGNORED
    return Batch(tokens, targets)


def _measure(side: str, folder: str, batch: Batch, device: torch.device, repeats: int) -> dict:
    with PeakOfProcess() if device.type == "cpu" else _PeakOfGPU(device) as peak:
        step = PREPARE[side](f"{folder}/model", batch)
        first, functions = watch(step)
        first = first.item()
        if side == KERNELS and {function.split(".")[0] for function in functions} != set(PEERS):
            raise ImportError(f"it ran without the kernels of {' and '.join(PEERS)}")
        for _ in range(3):
            step()
        seconds = [_mean_of_steps(step, device) for _ in range(repeats)]
    middle = statistics.median(seconds)
    return {
        "side": side,
        "milliseconds": 1e3 * middle,
        "fastest": 1e3 * min(seconds),
        "slowest": 1e3 * max(seconds),
        "tokens_per_second": batch.tokens.numel() / middle,
        "bytes": peak.bytes,
        "first_loss": first,
        "functions": functions,
    }


def _mean_of_steps(step: Callable, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(STEPS):
        loss = step()
    loss.item()  # waits for the device
    return (time.perf_counter() - start) / STEPS


class _PeakOfGPU:
    """Most bytes in use within the block, over those in use before it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        self.before = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *exception) -> None:
        self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before
