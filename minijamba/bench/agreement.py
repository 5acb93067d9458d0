"""Agreement: one checkpoint in transformers and here, how far the logits are apart and how often the choices are alike.

The reference is transformers in float32, over all GPUs of the machine. transformers in bfloat16 shows what rounding
does by itself, and ours is judged beside it. Random weights make the likeliest tokens nearly alike: a choice that
differs may be a near tie, and greedy texts part at the first of them. So the gaps between the likeliest are recorded.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..budget import available_memory
from ..checkpoint import load_timed
from ..config import JambaConfig
from ..generate import generate
from ..model import Trace
from ..moe import route
from ..quantize import SCHEMES, scheme
from ..rungs import find_device
from .apart import Broke, Memory, apart, say
from .load import files_of
from .measure import PEERS, warn_of_company, watch
from .programs import OURS, TRANSFORMERS, random_tokens, refuse_beyond
from .records import place, record, table
from .serving import added_to, earlier_in, numbered

EVERY = 4  # of so many positions the logits of the last one are compared
TOP = 5
FOR_WEIGHTS = 0.9  # of a GPU's free memory; transformers needs the rest for its activations
ALL = [TRANSFORMERS, OURS]
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class Side:
    """A program, the dtype that it computes in, and how our weights are held."""

    program: str
    dtype: str
    quantize: str | None = None

    @property
    def name(self) -> str:
        return f"{self.program} {self.quantize or self.dtype}"


REFERENCES = [Side(TRANSFORMERS, "float32"), Side(TRANSFORMERS, "bfloat16")]  # the second where the first does not run


@dataclass(frozen=True)
class Task:
    """What every side is asked: to read `batch` rows of `context` random tokens, and to write `new` after each."""

    model: Path
    device: torch.device
    batch: int
    context: int
    new: int
    commit: str | None = None

    @property
    def config(self) -> JambaConfig:
        return JambaConfig.from_json(self.model)

    @property
    def about(self) -> dict:
        """What answers depend on, beside the side: those that were kept hold for the same alone."""
        written = max(file.stat().st_mtime_ns for file in files_of(self.model))
        task = {name: getattr(self, name) for name in ("batch", "context", "new", "commit")}
        return task | {
            "model": str(self.model.resolve()), "written": written, "every": EVERY, "device": str(self.device),
            "torch": str(torch.__version__),
        }  # fmt: skip


class Program(NamedTuple):
    """A program that holds the checkpoint.

    read:  tokens (b, t) -> logits (b, t, v), and of every MoE layer the router's logits (b t, e) and the experts that
           were chosen (b t, k); each in any layout of b and t and on any device.
    write: (tokens (b, t), new) -> the new tokens (b, new), greedily and without an end.
    """

    read: Callable[[Tensor], tuple[Tensor, list[Tensor], list[Tensor]]]
    write: Callable[[Tensor, int], Tensor]
    devices: list[torch.device]
    facts: dict  # for the row: loading_seconds, and of transformers `functions` and how it runs its `experts`


def bench_agreement(
    model: Path,
    device: str = "auto",
    *,
    schemes: list[str | None] | None = None,
    sides: list[str] | None = None,
    batch: int = 4,
    context: int = 512,
    new: int = 64,
    dtype: str = "bfloat16",
    keep: Path | None = None,
    add: bool = False,
    commit: str | None = None,
    output: Path | None = None,
) -> Path:
    """Compare the logits, choices and texts of a checkpoint, each side in a process of its own on the same tokens.

    sides: of "transformers" and "minijamba"; the reference runs in any case.
    dtype: that they compute in, bfloat16 or float32; what is packed is multiplied in it.
    keep:  a folder where the answers of all sides stay: a later run with the same options does not ask them again.
    add:   keep the rows of the file that this run does not measure; they must be of the same device.
    Returns: the file, written anew after every row. Prints the table and the verdict.
    Raises: ValueError for what does not exist, or if transformers does not run at all.
    """
    device, model = numbered(find_device(device)), Path(model)
    task = Task(model, device, batch, context, new, commit)
    todo = _sides(ALL if sides is None else sides, [None, *SCHEMES] if schemes is None else schemes, dtype)
    _check(task)
    warn_of_company()
    (card,) = apart(machine, device)
    name, left_out, rows = f"agreement_{device.type}", {}, []
    where = {"output": output or place(name), "commit": commit, "device": card.get("name", device)}
    earlier = earlier_in(where["output"], card) if add and where["output"].exists() else None
    facts = {"card": card, "dtype": dtype, "new": new, "positions": f"every {EVERY}th", "left_out": left_out}

    def write() -> Path:
        return record(name, rows, **where, **facts) if earlier is None else added_to(name, rows, earlier, where, facts)

    with tempfile.TemporaryDirectory() if keep is None else nullcontext(keep) as folder:
        for row in _rows(todo, task, Path(folder), left_out, facts):
            rows.append(row)
            write()
    path = write()
    measurement = json.loads(path.read_text(encoding="utf-8"))
    print(table(measurement))
    print("\n".join(verdict(measurement)))
    print(f"recorded in {path}")
    return path


def _sides(programs: list[str], schemes: list[str | None], dtype: str) -> list[Side]:
    """transformers first: ours is judged beside it too. Raises: ValueError for what does not exist."""
    for program in programs:
        if program not in ALL:
            raise ValueError(f"there is no side {program!r} here: choose of {', '.join(map(repr, ALL))}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, but must be one of {', '.join(DTYPES)}")
    for name in schemes:
        scheme(name)
    theirs, ours = [Side(TRANSFORMERS, dtype)], [Side(OURS, dtype, name) for name in schemes]
    return [side for side in theirs + ours if side.program in programs]


def _check(task: Task) -> None:
    for name in ("batch", "context", "new"):
        if getattr(task, name) < 1:
            raise ValueError(f"{name} is {getattr(task, name)}, but must be at least 1")
    files_of(task.model)


def machine(device: torch.device) -> Iterator[dict]:
    """In a process of its own, so that the others find the GPUs empty: their name and number, and the memory of one."""
    facts = {}
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[1]
        facts = {"name": torch.cuda.get_device_name(device), "memory_bytes": memory, "gpus": torch.cuda.device_count()}
    yield facts


# The run


def _rows(todo: list[Side], task: Task, folder: Path, left_out: dict, facts: dict) -> Iterator[dict]:
    """The row of every side against the reference; ours also against transformers in the same dtype.

    ratio: our error over that of transformers in the same dtype: about 1 where both do no more than to round.
    `facts` gets what is known of the reference.
    """
    judge, reference = _reference(task, folder, left_out)
    facts["reference"] = {"side": judge.program, "dtype": judge.dtype, **reference["facts"]}
    facts["gaps"] = gaps(reference, task.config.num_experts_per_tok)
    peer = None
    for side in todo:
        if side == judge:
            continue
        row = {"model": task.model.name, "quantize": side.quantize, "side": side.program, "dtype": side.dtype}
        row |= {"measure": f"agreement with {judge.name}", "batch": task.batch, "context": task.context}
        try:
            answers = answers_of(side, task, folder)
        except ImportError as error:
            left_out[side.name] = str(error)
            say(f"  left out: {error}")
            continue
        except Broke as error:
            say(f"  failed: {error}")
            yield row | {"failed": str(error)}
            continue
        figures = compare(answers, reference)
        if side.program == TRANSFORMERS:
            peer = side, answers, figures["error"]
        elif peer and peer[2]:
            figures["ratio"] = figures["error"] / peer[2]
        say(f"  error {figures['error']:.1e}, the same choice at {figures['same_choice']:.2%} of the positions")
        yield row | figures | answers["facts"]
        if peer and side.program == OURS:
            yield row | {"measure": f"agreement with {peer[0].name}"} | compare(answers, peer[1])


def _reference(task: Task, folder: Path, left_out: dict) -> tuple[Side, dict]:
    for side in REFERENCES:
        try:
            return side, answers_of(side, task, folder)
        except (ImportError, Broke) as error:
            left_out[side.name] = str(error)
            say(f"  left out: {error}")
    raise ValueError(f"there is nothing to compare with: {'; '.join(f'{k}: {v}' for k, v in left_out.items())}")


def answers_of(side: Side, task: Task, folder: Path) -> dict:
    """What `answer` writes, from the folder if it is there already. Raises: as `apart`."""
    say(f"{task.model.name}, {side.name}")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{side.name.replace(' ', '_')}.pt"
    if file.exists():
        answers = torch.load(file, weights_only=True, mmap=True)
        if answers["about"] == task.about:
            say("  answered before")
            return answers
    for _ in apart(answer, side, task, file):
        pass
    return torch.load(file, weights_only=True, mmap=True)


@torch.no_grad()
def answer(side: Side, task: Task, file: Path) -> Iterator[None]:
    """In a process of its own: load, read, write, and put the answers in a file.

    logits (b, t / EVERY, v) float32, the last position among them; router (layers, b t, e) float32 and experts
    (layers, b t, k) int64, None without MoE layers; new (b, new) int64; facts for the row, with the peaks of all GPUs
    in use added up.
    Raises: ValueError for logits that are not finite.
    """
    torch.backends.cudnn.allow_tf32 = False  # on by default, and float32 convolutions would keep 11 bits of 24
    with torch.cuda.device(task.device) if task.device.type == "cuda" else nullcontext():
        program = LOAD[side.program](side, task)
        say(f"  loaded in {program.facts['loading_seconds']:.1f} s")
        answers = _asked(program, task)
        peak = sum(Memory(device).peak for device in program.devices)
    facts = {**program.facts, "peak_bytes": peak, "devices": len(program.devices)}
    aside = file.with_suffix(".part")
    torch.save({"about": task.about, "facts": facts, **answers}, aside)
    os.replace(aside, file)
    yield None


def _asked(program: Program, task: Task) -> dict[str, Tensor | None]:
    tokens = random_tokens(task.config, task.batch, task.context)
    logits, router, experts = program.read(tokens)
    logits = logits[:, (task.context - 1) % EVERY :: EVERY].float().cpu()
    if not logits.isfinite().all():
        raise ValueError("its logits are not all finite")
    say(f"  {tokens.numel():,} tokens read")
    new = program.write(tokens, task.new).cpu()
    if new.shape != (task.batch, task.new):
        raise ValueError(f"it wrote {tuple(new.shape)} tokens, not {(task.batch, task.new)}")
    say(f"  {new.numel():,} tokens written")
    router = _stacked([layer.float() for layer in router])
    return {"logits": logits, "router": router, "experts": _stacked(experts), "new": new}


def _stacked(layers: list[Tensor]) -> Tensor | None:
    return torch.stack([layer.flatten(0, -2).cpu() for layer in layers]) if layers else None


# The programs


def ours(side: Side, task: Task) -> Program:
    model, report = load_timed(task.model, task.device, side.dtype, side.quantize)

    def read(tokens: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        trace = Trace()
        logits = model(tokens.to(task.device), trace=trace)
        return logits, trace.router, trace.experts

    def write(tokens: Tensor, new: int) -> Tensor:
        return generate(model, tokens, max_new_tokens=new, stop=())

    return Program(read, write, [task.device], {"loading_seconds": report.total})


def transformers(side: Side, task: Task) -> Program:
    """Spread over all GPUs, by accelerate; with the kernels of PEERS if they can be imported, which `functions` tells.

    In float32 its experts are the plain loop. Raises: MemoryError if the weights do not fit; ImportError.
    """
    config, gpu = task.config, task.device.type == "cuda"
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if gpu else [task.device]
    room = {device: int(FOR_WEIGHTS * available_memory(device)) for device in devices}
    refuse_beyond(sum(room.values()), replace(config, dtype=side.dtype))
    options = {"experts_implementation": "eager"} if side.dtype == "float32" else {}
    if gpu:
        import_module("accelerate")
        options |= {"device_map": "auto", "max_memory": {device.index: size for device, size in room.items()}}
        for package in PEERS:
            with suppress(ImportError):
                import_module(package)
    import transformers

    transformers.logging.set_verbosity_error()
    start = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(task.model, dtype=getattr(torch, side.dtype), **options)
    facts = {"loading_seconds": time.perf_counter() - start, "experts": options.get("experts_implementation", "auto")}
    model.eval().generation_config = transformers.GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    routed = any(layer.feed_forward == "moe" for layer in config.layers)
    chosen = config.num_experts_per_tok

    def read(tokens: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        options = {"output_router_logits": True} if routed else {}
        said = model(tokens.to(model.device), use_cache=False, **options)
        router = list(said.router_logits) if routed else []
        return said.logits, router, [route(logits, chosen)[1] for logits in router]

    def write(tokens: Tensor, new: int) -> Tensor:
        tokens = tokens.to(model.device)
        text = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new)
        return text[:, tokens.shape[1] :]

    _, functions = watch(lambda: write(random_tokens(config, 1, 32), 2))
    used = sorted({parameter.device for parameter in model.parameters()}, key=str)
    return Program(read, write, used, facts | {"functions": functions})


LOAD = {OURS: ours, TRANSFORMERS: transformers}


# The figures. a is of the side that is judged, b of the reference.


def compare(answers: dict, reference: dict) -> dict:
    a, b = centred(answers["logits"]), centred(reference["logits"])
    figures = {**distance(a, b), **choices(a, b), "same_new": same_start(answers["new"], reference["new"])}
    if reference["router"] is not None:
        figures["same_experts"] = same_experts(answers["experts"], reference["experts"])
        figures["router_difference"] = (answers["router"] - reference["router"]).abs().median().item()
    return figures


def centred(logits: Tensor) -> Tensor:
    """Logits (..., v) in float64, of mean zero at each position: a constant on all of them changes no probability."""
    logits = logits.double()
    return logits - logits.mean(-1, keepdim=True)


def distance(a: Tensor, b: Tensor) -> dict:
    """How far centred logits (b, t, v) are apart.

    error:        |a - b| / |b|, each norm over the whole tensor.
    median_error, worst_error: the same of each position by itself, the middle and the largest one.
    difference:   root of the mean square of a - b, in logits.
    divergence:   mean over positions of KL(b || a) of the next token's distributions, in nats.
    """
    norm = torch.linalg.vector_norm
    each = norm(a - b, dim=-1) / norm(b, dim=-1)
    log_p, log_q = b.log_softmax(-1), a.log_softmax(-1)
    return {
        "error": (norm(a - b) / norm(b)).item(),
        "median_error": each.median().item(),
        "worst_error": each.max().item(),
        "difference": (a - b).square().mean().sqrt().item(),
        "divergence": (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
    }


def choices(a: Tensor, b: Tensor) -> dict:
    """How often logits (b, t, v) choose the same next token.

    same_choice: share of positions with the same likeliest token.
    in_top_5:    share of positions where the reference's is among the TOP likeliest of the other.
    widest_flip: in logits of the reference, how far the other's choice is below its own, where that is most; 0 if all
        are the same.
    """
    mine, theirs = a.argmax(-1, keepdim=True), b.argmax(-1, keepdim=True)
    likely = a.topk(min(TOP, a.shape[-1]), dim=-1).indices
    return {
        "same_choice": (mine == theirs).double().mean().item(),
        "in_top_5": (likely == theirs).any(-1).double().mean().item(),
        "widest_flip": (b.gather(-1, theirs) - b.gather(-1, mine)).max().item(),
    }


def same_experts(a: Tensor, b: Tensor) -> float:
    """Share of the choices (..., k) of experts that both made for the same token and layer, in any order."""
    return (a[..., :, None] == b[..., None, :]).any(-1).double().mean().item()


def same_start(a: Tensor, b: Tensor) -> float:
    """New tokens (b, new) before the first difference, mean over rows."""
    return (a == b).long().cumprod(-1).sum(-1).double().mean().item()


def gaps(reference: dict, chosen: int) -> dict:
    """How far the reference is from choosing otherwise, in logits; each a median over positions, and layers.

    next_token:    between the two likeliest tokens.
    router:        between the last expert that is chosen and the first that is not.
    rounding_step: of bfloat16, at the router's logit of that last expert.
    within_step:   share of tokens and layers where the router's gap is less than that step.
    """
    first, second = reference["logits"].topk(2, dim=-1).values.unbind(-1)
    found = {"next_token": (first - second).median().item()}
    if reference["router"] is None or reference["router"].shape[-1] <= chosen:
        return found
    ranked = reference["router"].sort(-1, descending=True).values
    gap, step = ranked[..., chosen - 1] - ranked[..., chosen], rounding_step(ranked[..., chosen - 1])
    return found | {
        "router": gap.median().item(),
        "rounding_step": step.median().item(),
        "within_step": (gap < step).double().mean().item(),
    }


def rounding_step(x: Tensor) -> Tensor:
    """The distance of bfloat16's numbers at x, which keep 8 bits: 1/128 between 1 and 2."""
    return torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - 8)


def verdict(measurement: dict) -> list[str]:
    """What the record comes to, in sentences."""
    judge, gaps = measurement["reference"], measurement["gaps"]
    against = f"{judge['side']} {judge['dtype']}"
    rows = [row for row in measurement["rows"] if row["measure"].endswith(against) and "error" in row]
    lines = [
        f"against {against}, minijamba in {row['dtype']} errs {row['ratio']:.2f} times as much as transformers in it"
        for row in rows
        if row["quantize"] is None and "ratio" in row
    ]
    if "router" in gaps:
        lines.append(
            f"the router decides for the last expert of a token by {gaps['router']:.2g} in the middle, which is "
            f"{gaps['router'] / gaps['rounding_step']:.0f} steps of bfloat16; by less than one step in "
            f"{gaps['within_step']:.2%} of the cases"
        )
    flips = [f"{row['side']} {row['quantize'] or row['dtype']} {row['widest_flip']:.2g}" for row in rows]
    lines.append(
        f"the two likeliest tokens are {gaps['next_token']:.2g} logits apart in the middle; where the choice differs, "
        f"at most: {', '.join(flips)}"
    )
    return lines
