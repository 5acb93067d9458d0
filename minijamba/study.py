"""Experiments of the course: small models that differ in one thing, trained alike and looked into.

    minijamba study twins       ->  data/measurements/twins_cuda.json

On a GPU they take minutes and are recorded; notebooks run the same functions in miniature.
"""

import math
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from .bench.records import record
from .budget import budget
from .checkpoint import SHIPPED
from .config import JambaConfig
from .data import Batch, Corpus, Windows, prepare
from .families import FAMILIES
from .mamba import Mamba
from .model import Jamba, Trace
from .moe import expert_load, sinkhorn
from .probes import copying, induction_scores, needle_map, switched_off
from .recipe import Recipe, TrainRecipe, load_recipe
from .rungs import find_device
from .tasks import accuracy, task_batch
from .tokenizer import load_tokenizer
from .train import Record, evaluate, repeatable

RECIPE = Path(__file__).resolve().parents[1] / "data" / "recipes" / "python.toml"
INDUCTION = 0.3  # from this score on, a head counts as an induction head
NEEDLE_LENGTHS, NEEDLE_DEPTHS = (128, 256, 512, 1024), (0.0, 0.25, 0.5, 0.75, 1.0)
EVERY = 25  # steps between two rows of a curve
SCHEDULE = ("train.warmup=0.05", "train.floor=0.1")  # the recipe's own is for many times the steps


@dataclass(frozen=True)
class Setting:
    """What all models of a study have in common."""

    seeds: int
    device: torch.device
    recipe: Recipe
    corpus: Corpus | None = None

    def config(self) -> JambaConfig:
        return self.recipe.config(self.corpus.facts["vocab_size"])

    def batches(self, seed: int) -> Callable[[int], Batch]:
        options = self.recipe.train
        return Windows(self.corpus.tokens["train"], options.batch, options.length, seed)

    def validation(self) -> list[Batch]:
        options = self.recipe.train
        windows = Windows(self.corpus.tokens["validation"], options.batch, options.length, seed=0)
        return [windows(step) for step in range(self.recipe.log.validation_batches)]

    def bits(self, nats: float) -> float:
        """Nats a token of the validation text as bits a byte."""
        facts = self.corpus.facts["parts"]["validation"]
        return nats / math.log(2) * (facts["tokens"] - facts["documents"]) / facts["bytes"]


def fit(
    model: Jamba,
    batches: Callable[[int], Batch],
    options: TrainRecipe,
    look: Callable[[int], None] = lambda step: None,
    name: str = "",
) -> list[Record]:
    """Train a model; `look` is called before every 25th step and after the last."""
    from tqdm import tqdm

    trainer, history = options.trainer(model), []
    model.train()
    for step in tqdm(range(options.steps), name, leave=False):
        if step % EVERY == 0:
            look(step)
        batch, began = batches(step), time.perf_counter()
        measured = trainer.step(batch, options.rate(step))
        history.append(trainer.record(step, measured, batch.tokens.numel(), began))
    look(options.steps)
    return history


def curve(history: list[Record]) -> dict[str, list]:
    """Every 25th step of a history, each figure the mean since the one before."""
    groups = [history[start : start + EVERY] for start in range(0, len(history), EVERY)]
    return {
        "step": [group[-1].step for group in groups],
        **{
            name: [round(sum(getattr(record, name) for record in group) / len(group), 4) for group in groups]
            for name in ("loss", "balance", "norm", "busiest", "idlest")
        },
    }


def twin(config: JambaConfig, kind: str) -> JambaConfig:
    """The hybrid itself, or its twin with Mamba or attention in every layer, with as many parameters.

    What the mixers have more or fewer, the experts get or give.
    """
    if kind == "hybrid":
        return config
    other = {"mamba": ("A", "m"), "attention": ("m", "A")}[kind]
    return as_large_as(config, replace(config, pattern=config.schedule.replace(*other)))


def blackmamba_twin(config: JambaConfig) -> JambaConfig:
    """BlackMamba with the width, depth and experts of a hybrid, and as many parameters."""
    changed = replace(
        config, **FAMILIES["blackmamba"].same, model_type="blackmamba", pattern="m- -E", routing="sinkhorn",
        num_hidden_layers=2 * config.num_hidden_layers, router_aux_loss_coef=0.0, mamba_dt_rank="auto",
    )  # fmt: skip
    return as_large_as(config, changed)


def as_large_as(config: JambaConfig, changed: JambaConfig) -> JambaConfig:
    """`changed` with the intermediate_size, a multiple of 8, that brings its parameters nearest to the config's."""
    wanted = budget(config).total_params
    sizes = range(8, 4 * config.intermediate_size, 8)
    return min(
        (replace(changed, intermediate_size=size) for size in sizes),
        key=lambda candidate: abs(budget(candidate).total_params - wanted),
    )


def build(config: JambaConfig, seed: int, device: torch.device) -> Jamba:
    torch.manual_seed(seed)
    return Jamba(config).to(device)


def trained(
    setting: Setting, model: Jamba, seed: int, name: str, look: Callable[[int], None] = lambda step: None
) -> dict:
    """Train a model as the recipe says, and what came of it."""
    options = setting.recipe.train
    history = fit(model, setting.batches(seed), options, look=look, name=f"{name}, seed {seed}")
    return {
        "seed": seed,
        "validation_loss": evaluate(model, setting.validation(), options.bfloat16),
        "tokens_per_second": sorted(record.tokens_per_second for record in history)[len(history) // 2],
        "curve": curve(history),
    }


def twins(setting: Setting) -> Iterator[dict]:
    """Hybrid, Mamba and attention: the same parameters, tokens and order of text, several seeds."""
    base, options = setting.config(), setting.recipe.train
    for seed in range(setting.seeds):
        for kind in ("hybrid", "mamba", "attention"):
            model = build(twin(base, kind), seed, setting.device)
            found = trained(setting, model, seed, kind)
            yield {
                "twin": kind,
                "schedule": model.config.schedule,
                "intermediate_size": model.config.intermediate_size,
                "parameters": budget(model.config).total_params,
                "active_parameters": budget(model.config).active_params,
                "tokens": options.steps * options.batch * options.length,
                "bits_per_byte": setting.bits(found["validation_loss"]),
                **found,
                **looked_into(model),
                "needle": needles(model, setting),
            }


def looked_into(model: Jamba) -> dict:
    """Copying in context, and the heads that do it, as `probes` measures them."""
    model.eval()
    found = {"copying": list(copying(model))}
    attending = [i for i, layer in enumerate(model.config.layers) if layer.mixer == "attention"]
    if attending:
        scores = induction_scores(model).tolist()
        heads = {
            layer: chosen
            for layer, row in zip(attending, scores, strict=True)
            if (chosen := [head for head, score in enumerate(row) if score > INDUCTION])
        }
        with switched_off(model, heads):
            off = list(copying(model))
        found |= {"induction": scores, "switched_off": heads, "copying_switched_off": off}
    return found


def needles(model: Jamba, setting: Setting) -> list[list[float]]:
    """Share of a needle's digits found in held-out source, by length and depth."""
    haystack, lengths = setting.corpus.tokens["held_out"], NEEDLE_LENGTHS
    return needle_map(model, load_tokenizer(SHIPPED), haystack, lengths=lengths, depths=NEEDLE_DEPTHS).right.tolist()


def balance(setting: Setting) -> Iterator[dict]:
    """The balance loss at several weights: what it costs, and how evenly the experts are used."""
    for seed in range(setting.seeds):
        for weight in (0.0, 0.001, 0.01):
            model = build(replace(setting.config(), router_aux_loss_coef=weight), seed, setting.device)
            yield {"weight": weight, **trained(setting, model, seed, f"weight {weight}")}


def mixers(model: Jamba) -> list[Mamba]:
    return [block.mixer for block in model.model.layers if isinstance(block.mixer, Mamba)]


@torch.no_grad()
def inner_sizes(model: Jamba, batch: Batch) -> dict[str, list[float]]:
    """Largest size of delta, before bias and softplus, B and C in every Mamba layer on a batch."""
    sizes: dict[str, list[float]] = {"delta": [], "B": [], "C": []}
    calls = [(mixer, mixer.select) for mixer in mixers(model)]

    def watched(select):
        def run(x):
            outputs = select(x)
            for name, output in zip(sizes, outputs, strict=True):
                sizes[name].append(output.abs().max().item())
            return outputs

        return run

    for mixer, select in calls:
        mixer.select = watched(select)
    try:
        model(batch.tokens, segments=batch.segments)
    finally:
        for mixer, select in calls:
            mixer.select = select
    return sizes


def norms(setting: Setting) -> Iterator[dict]:
    """With and without the inner norms: the size of delta, B and C as training goes on, and the loss."""
    batch = Batch(*(tensor[:4] for tensor in setting.validation()[0])).to(setting.device)
    for seed in range(setting.seeds):
        for inner in (True, False):
            model = build(replace(setting.config(), mamba_inner_layernorms=inner), seed, setting.device)
            sizes: list[dict] = []

            def look(step, model=model, sizes=sizes):
                largest = {name: max(values) for name, values in inner_sizes(model, batch).items()}
                sizes.append({"step": step, **largest})

            found = trained(setting, model, seed, f"inner norms {inner}", look=look)
            yield {"inner_norms": inner, **found, "sizes": sizes}


# What keeps the experts of a BlackMamba evenly used: nothing, Jamba's loss, or Sinkhorn's plan. The first two weigh
# their choice by a softmax, as Jamba does, the others by a sigmoid.
ROUTERS = {
    "softmax": {"routing": "softmax"},
    "softmax, balance loss": {"routing": "softmax", "router_aux_loss_coef": 0.01},
    "sigmoid": {"routing": "sigmoid", "model_type": None},
    "Sinkhorn": {"routing": "sinkhorn"},
}
SWEEPS = 30


def blackmamba(setting: Setting) -> Iterator[dict]:
    """BlackMamba trained with four routers that use its experts evenly, or not: loss, load, and Sinkhorn's sweeps."""
    base, options = blackmamba_twin(setting.config()), setting.recipe.train
    batch = setting.validation()[0].to(setting.device)
    for seed in range(setting.seeds):
        for name, changes in ROUTERS.items():
            model = build(replace(base, **changes), seed, setting.device)
            before = balanced(model, batch)
            found = trained(setting, model, seed, name)
            yield {
                "router": name,
                "parameters": budget(model.config).total_params,
                "active_parameters": budget(model.config).active_params,
                "tokens": options.steps * options.batch * options.length,
                "bits_per_byte": setting.bits(found["validation_loss"]),
                **found,
                **looked_into(model),
                "untrained": before,
                "trained": balanced(model, batch),
            }


@torch.no_grad()
def balanced(model: Jamba, batch: Batch) -> dict[str, list]:
    """What a batch does to the experts of every layer.

    load:     how often each is chosen in use, as a multiple of an even share.
    balanced: the same for the choice of Sinkhorn's plan.
    moved:    share of the tokens that the plan sends elsewhere.
    sweeps:   from both starts, how far the tokens' masses are from even after 1, 2, ... sweeps (`uneven`).
    """
    training = model.training
    model.eval()
    trace, e = Trace(), model.config.num_experts
    model(batch.tokens, segments=batch.segments, trace=trace)
    model.train(training)
    logits = [layer.flatten(0, 1).float() for layer in trace.router]
    plans = [sinkhorn(layer).argmax(-1, keepdim=True) for layer in logits]
    chosen = [layer.flatten(0, 1) for layer in trace.experts]
    return {
        "load": expert_load(chosen, e).tolist(),
        "balanced": expert_load(plans, e).tolist(),
        "moved": [(plan != used).float().mean().item() for plan, used in zip(plans, chosen, strict=True)],
        "sweeps": {
            name: [uneven(layer, better_start) for layer in logits]
            for name, better_start in (("better", True), ("plain", False))
        },
    }


def uneven(logits: Tensor, better_start: bool) -> list[float]:
    """Largest deviation of a token's mass from 1 / T after 1, 2, ... sweeps, as a multiple of 1 / T; logits (T, e)."""
    plans = (sinkhorn(logits.double(), sweeps, better_start=better_start) for sweeps in range(1, SWEEPS + 1))
    return [float(f"{(len(logits) * plan.sum(1) - 1).abs().max():.3g}") for plan in plans]


@torch.no_grad()
def wrong_start(model: Jamba, kind: str) -> Jamba:
    """Undo a part of Mamba's own initialisation, in place, as loading code and frameworks have done silently.

    "zero bias": every step begins with a length of softplus(0) = 0.69. "one decay": every state forgets alike, A = -1.
    """
    for mixer in mixers(model):
        if kind in ("zero bias", "both"):
            mixer.dt_proj.bias.zero_()
        if kind in ("one decay", "both"):
            mixer.A_log.zero_()
    return model


def start(setting: Setting) -> Iterator[dict]:
    """Mamba's own initialisation beside wrong ones."""
    for seed in range(setting.seeds):
        for kind in ("as in Mamba", "zero bias", "one decay", "both"):
            model = wrong_start(build(setting.config(), seed, setting.device), kind)
            yield {"start": kind, **trained(setting, model, seed, kind)}


RECALL = {"vocabulary": 256, "length": 128}
RECALL_BATCH, RECALL_RATE = 64, 3e-3
RECALL_STATES, RECALL_PAIRS = (1, 4, 16, 64), (8, 32)


def recall_config(kind: str, states: int, vocabulary: int, width: int = 64) -> JambaConfig:
    """Two layers without experts: Mamba twice, or Mamba and then attention."""
    return JambaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        attn_layer_period=2 if kind == "hybrid" else 3,
        attn_layer_offset=1 if kind == "hybrid" else 2,
        num_experts=1,
        mamba_d_state=states,
        dtype="float32",
    )


def recall(setting: Setting) -> Iterator[dict]:
    """How many pairs a state of n numbers a channel can hold, with and without an attention layer above it."""
    for seed in range(setting.seeds):
        for pairs in RECALL_PAIRS:
            batches = partial(_pairs, seed, pairs)
            for kind in ("mamba", "hybrid"):
                for states in RECALL_STATES:
                    model = build(recall_config(kind, states, RECALL["vocabulary"]), seed, setting.device)
                    name = f"{kind}, {states} states, {pairs} pairs, seed {seed}"
                    fit(model, batches, setting.recipe.train, name=name)
                    accuracy = recalled(model, batches(10**6))
                    yield {"twin": kind, "states": states, "pairs": pairs, "seed": seed, "accuracy": accuracy}


@lru_cache(maxsize=4096)  # drawing a batch takes longer than training on it, and eight models see the same ones
def _pairs(seed: int, pairs: int, step: int) -> Batch:
    return task_batch("associative_recall", RECALL_BATCH, seed=seed, step=step, pairs=pairs, **RECALL)


@torch.no_grad()
def recalled(model: Jamba, batch: Batch) -> float:
    model.eval()
    batch = batch.to(model.device)
    return accuracy(model(batch.tokens), batch.targets)


# name -> what runs, and steps and seeds of the recorded study.
STUDIES = {
    "twins": (twins, 1500, 3),
    "balance": (balance, 400, 3),
    "norms": (norms, 400, 3),
    "start": (start, 400, 3),
    "blackmamba": (blackmamba, 1500, 3),
    "recall": (recall, 3000, 3),
}


def study(
    name: str,
    device: str = "auto",
    *,
    steps: int | None = None,
    seeds: int | None = None,
    changes: list[str] = (),
    folder: str | Path = "runs/study",
    commit: str | None = None,
    output: Path | None = None,
) -> Path:
    """Run a study on the shipped model's recipe, with few steps and a schedule for them, and record it.

    Args:
        steps, seeds: instead of the study's own.
        changes: to the recipe, as "train.batch=8".
        folder:  where the tokens of its text are kept, those of each text in a folder of their own.
    Returns: the file, data/measurements/<name>_<device>.json unless `output` names another.
    Raises: ValueError for an unknown study, or steps or seeds below 1.
    """
    if name not in STUDIES:
        raise ValueError(f"there is no study {name!r}: choose of {', '.join(STUDIES)}")
    if name == "recall" and changes:
        raise ValueError("recall is trained on a task, not by the recipe: there is nothing of it to change")
    device = find_device(device)
    run, own_steps, own_seeds = STUDIES[name]
    steps, seeds = own_steps if steps is None else steps, own_seeds if seeds is None else seeds
    if min(steps, seeds) < 1:
        raise ValueError(f"{steps} steps and {seeds} seeds train nothing: give at least one of each")
    recipe = load_recipe(RECIPE, [*SCHEDULE, f"train.steps={steps}", *changes])
    if name == "recall":
        task = {"batch": RECALL_BATCH, "length": RECALL["length"], "learning_rate": RECALL_RATE, "weight_decay": 0.0}
        recipe = replace(recipe, train=TrainRecipe(steps, **task))
    setting = Setting(seeds, device, recipe)
    if name != "recall":
        tokenizer = load_tokenizer(SHIPPED)
        text = f"tokens-{zlib.crc32(repr(recipe.data).encode()):08x}"  # another text must not find these tokens
        corpus = prepare(recipe.data.documents(), tokenizer, Path(folder) / text, progress=True)
        corpus.facts["vocab_size"] = tokenizer.vocab_size
        setting = replace(setting, corpus=corpus)
    rows = []
    with repeatable():
        for row in run(setting):
            rows.append(row)
            print({key: value for key, value in row.items() if not isinstance(value, list | dict)}, flush=True)
    facts = {"seeds": seeds, "train": vars(recipe.train) | (RECALL if name == "recall" else {})}
    return record(f"{name}_{device.type}", rows, device=device, output=output, commit=commit, **facts)
