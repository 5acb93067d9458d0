"""The laws of Jamba, pointed at any implementation of it through a small adapter.

    minijamba conform minijamba transformers mambapy
    minijamba conform path/to/adapter.py --record conformance.json

The judge is the naive rung of this package in float64, with the same weights. Its models are tiny, have layers of every
kind, and remember long (`long_memory`): a state that is lost or shared shows in every later logit.

An adapter is a module, or any object, with

    NAME                                                  what to call it
    PACKAGES, NOTE                                        optional: whose versions count, and how it is used here
    build(config)                                         a freshly initialised model, of a JambaConfig
    load(folder, dtype)                                   the model of a checkpoint in the released layout
    forward(model, tokens, mask=None, segments=None)      logits (b, t, v) of tokens (b, t) int64
    forward_with_cache(model, tokens, cache=None)         (logits, cache): goes on where the cache ends
    copy_cache(cache)                                     optional: an independent copy (copy.deepcopy)
    named_parameters(model)                               optional: (name, tensor) under the released names
                                                          (model.named_parameters())

`mask` (b, t) bool is True for real tokens; `segments` (b, t) int changes where a packed document begins. What the
implementation does not offer raises NotImplementedError("why"): that is reported, and is no failure. `adapters/` has
three to start from.
"""

import copy
import importlib
import importlib.metadata
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapters import ours
from .checkpoint import save
from .config import JambaConfig
from .mamba import Mamba
from .model import Jamba
from .rungs import use_rung

SHIPPED = {
    "minijamba": "minijamba.adapters.ours",
    "ours": "minijamba.adapters.ours",
    "transformers": "minijamba.adapters.transformers",
    "mambapy": "minijamba.adapters.mambapy",
}
NEEDED = ("NAME", "build", "load", "forward", "forward_with_cache")

# "mE A+ m+ AE". All experts are chosen, so that how they are weighed is the matter of one law alone.
CONFIG = JambaConfig(
    vocab_size=41,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    attn_layer_period=2,
    attn_layer_offset=1,
    expert_layer_period=3,
    expert_layer_offset=0,
    num_experts=4,
    num_experts_per_tok=4,
    mamba_d_state=4,
    mamba_dt_rank=3,
    max_position_embeddings=256,
    dtype="float32",
)
# Float32 rounds by 6e-8, some hundred times on the way to a logit: below 1e-5. A lost state is off by more than 1e-2.
TOLERANCE = 1e-4
# Implementations round activations to bfloat16 at different places: up to a bit of difference. A state that is itself
# kept in bfloat16 is off by more than four times as much.
TIMES_OURS = 2.0
HOLDS, FAILS, NOT_OFFERED = "holds", "fails", "not offered"


class Result(NamedTuple):
    """What one law found.

    error:       max |logits - judge's| / max |judge's|; of "precision" the root of their mean squares instead.
    same_choice: share of positions at which both find the same next token most likely.
    seen:        in words, in terms of the idea.
    """

    verdict: str
    seen: str = ""
    error: float | None = None
    same_choice: float | None = None


@torch.no_grad()
def long_memory(module: nn.Module, seed: int = 0, delta_bias: float = -4.6) -> nn.Module:
    """Random weights that hide no bug, in place; returns the module.

    Steps of softplus(-4.6) = 0.01 make the memory a hundred tokens long, so that a lost state shows in every later
    output; norms, biases and D are all different from their start; outputs have a size of about one.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(_value(name, parameter, noise, delta_bias))
    return module


def _value(name: str, parameter: Tensor, noise: Tensor, delta_bias: float) -> Tensor:
    if name.endswith("A_log"):
        return parameter + 0.1 * noise
    if "norm" in name or name.split(".")[-1] == "D":
        return 1 + 0.2 * noise
    if name.endswith("dt_proj.bias"):
        return delta_bias + 0.3 * noise
    if name.endswith("bias"):
        return 0.3 * noise
    if "embed" in name:
        return noise
    return noise * parameter.shape[-1] ** -0.5


class Stopped(Exception):
    """An implementation broke off; what breaks off in the laws themselves is another matter."""


class Guarded:
    """An adapter whose errors, all but NotImplementedError, come out as `Stopped`."""

    def __init__(self, adapter) -> None:
        self.adapter = adapter

    def __getattr__(self, name: str):
        part = getattr(self.adapter, name)
        return partial(_guarded, part) if callable(part) else part


def _guarded(function: Callable, *given, **named):
    try:
        return function(*given, **named)
    except NotImplementedError:
        raise
    except Exception as error:
        first, _, _ = str(error).partition("\n")
        raise Stopped(f"stopped with {type(error).__name__}: {first}") from error


class Model:
    """A loaded model behind its adapter, as the laws call it; logits come back in float64."""

    def __init__(self, adapter, model, rung: str | None = None) -> None:
        self.adapter, self.model, self.rung = adapter, model, rung

    def run(self, tokens: Tensor, **layout: Tensor) -> Tensor:
        with self._rung():
            return _logits(self.adapter.forward(self.model, tokens, **layout), tokens)

    def go_on(
        self, tokens: Tensor, cuts: Iterable[int] = (), cache=None, before: Callable = lambda cache: None
    ) -> tuple[Tensor, object]:  # fmt: skip
        """The tokens through the cache in pieces, cut before the given columns: their logits, and the cache."""
        logits = []
        for piece in tokens.tensor_split(list(cuts), dim=1):
            if cache is not None:
                before(cache)
            with self._rung():
                output, cache = self.adapter.forward_with_cache(self.model, piece, cache)
            logits.append(_logits(output, piece))
        return torch.cat(logits, dim=1), cache

    def copy(self, cache):
        return getattr(self.adapter, "copy_cache", copy.deepcopy)(cache)

    def changed(self, **changes) -> "Model":
        """The judge under another config, with the same weights."""
        model = Jamba(replace(self.model.config, model_type=None, **changes)).to(self.model.dtype).eval()
        model.load_state_dict(self.model.state_dict())
        return Model(self.adapter, model, self.rung)

    def _rung(self):
        return use_rung(self.rung) if self.rung else nullcontext()


def _logits(output: Tensor, tokens: Tensor) -> Tensor:
    expected = (*tokens.shape, CONFIG.vocab_size)
    if output.shape != expected:
        raise Stopped(f"logits must be (b, t, v), here {expected}, not {tuple(output.shape)}")
    return output.detach().cpu().double()


class Desk:
    """What the implementations of one report share: a folder for checkpoints, and what minijamba does in bfloat16."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = folder

    @torch.no_grad()
    def checkpoint(self, dtype: torch.dtype, **changes) -> Path:
        model = long_memory(Jamba(replace(CONFIG, **changes)))
        for name, parameter in model.named_parameters():
            if name.endswith(("b_layernorm.weight", "c_layernorm.weight")):
                parameter.mul_(2)  # so that the state says as much as the skip D x
        path = Path(tempfile.mkdtemp(dir=self.folder), "checkpoint")
        save(model.to(dtype), path)
        return path

    @cached_property
    def repeated(self) -> "Repeated":
        path = self.checkpoint(torch.bfloat16, num_hidden_layers=2)  # "mE A+"
        tokens = torch.arange(1, 5)[:, None].repeat(1, 256)
        return Repeated(path, tokens, judge_of(path).run(tokens)[:, -64:])

    @cached_property
    def least(self) -> float:
        """The error there of minijamba."""
        return self.repeated.worst(Model(ours, ours.load(self.repeated.path, torch.bfloat16), "parallel"))[0]


class Repeated(NamedTuple):
    """A checkpoint in bfloat16, rows that say one token over and over, and the judge's logits of their last quarter.

    The state grows by ever smaller shares of itself, which bfloat16 would round away: its 8 bits end at a 256th.
    """

    path: Path
    tokens: Tensor
    expected: Tensor

    def worst(self, model: Model) -> tuple[float, str, Tensor]:
        """Of a run at once, and with a cache one token by token: the larger error, which it was, its logits."""
        runs = {"at once": model.run(self.tokens)}
        with suppress(NotImplementedError):
            runs["token by token"] = model.go_on(self.tokens, range(1, self.tokens.shape[1]))[0]
        lasts = {how: logits[:, -64:] for how, logits in runs.items()}
        errors = {how: _root_mean_square(last, self.expected) for how, last in lasts.items()}
        how = max(errors, key=errors.get)
        return errors[how], how, lasts[how]


class Case:
    """The implementation that is examined."""

    def __init__(self, adapter, desk: Desk) -> None:
        self.adapter, self.desk = adapter, desk

    def models(self, **changes) -> tuple[Model, Model]:
        """The judge, and theirs: both from one checkpoint in float32."""
        path = self.desk.checkpoint(torch.float32, **changes)
        return judge_of(path), Model(self.adapter, self.adapter.load(path, torch.float32))


def judge_of(path: Path) -> Model:
    """The definition, with the weights of a checkpoint."""
    return Model(ours, ours.load(path, torch.float64), "naive")


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Random tokens, 0 left out: it is the padding token."""
    return torch.randint(1, CONFIG.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# The laws. Each takes a case and returns what it found; its docstring is the law.


def plain_run(case: Case) -> Result:
    """A plain run has the logits of the definition."""
    judge, model = case.models()
    tokens = draw(2, 40)
    return _compare(model.run(tokens), judge.run(tokens))


def token_by_token(case: Case) -> Result:
    """Tokens given one at a time, through the cache, get the logits of the plain run."""
    judge, model = case.models()
    tokens, cuts = draw(2, 16), range(1, 16)
    return _compare(model.go_on(tokens, cuts)[0], judge.run(tokens), _losses(judge, tokens, cuts))


def every_split(case: Case) -> Result:
    """A sequence given in two or three pieces of any size, through the cache, gets the logits of the plain run."""
    judge, model = case.models()
    tokens, splits = draw(2, 16), [*((at,) for at in range(1, 16)), (3, 8), (7, 9), (2, 13)]
    expected, found = judge.run(tokens), {cuts: model.go_on(tokens, cuts)[0] for cuts in splits}
    worst = max(splits, key=lambda cuts: _error(found[cuts], expected))
    result = _compare(found[worst], expected, _losses(judge, tokens, worst))
    if result.verdict == HOLDS:
        return result
    wrong = [cuts for cuts in splits if not _error(found[cuts], expected) <= TOLERANCE]
    sizes = " + ".join(str(piece.shape[1]) for piece in tokens.tensor_split(worst, dim=1))
    same = torch.cat([found[cuts][:, cuts[0] :].argmax(-1) == expected[:, cuts[0] :].argmax(-1) for cuts in wrong], 1)
    seen = f"{len(wrong)} of {len(splits)} splits are wrong; worst, {sizes} tokens: {result.seen}"
    return result._replace(seen=seen, same_choice=float(same.double().mean()))


def left_padding(case: Case) -> Result:
    """In a batch padded on the left, each row gets the logits that it has alone."""
    return _padding(case, torch.arange(11) >= 11 - torch.tensor([11, 6, 1])[:, None])


def right_padding(case: Case) -> Result:
    """In a batch padded on the right, each row gets the logits that it has alone."""
    return _padding(case, torch.arange(11) < torch.tensor([11, 6, 1])[:, None])


def _padding(case: Case, mask: Tensor) -> Result:
    judge, model = case.models()
    tokens = draw(*mask.shape).masked_fill(~mask, CONFIG.pad_token_id)
    alone = torch.cat([judge.run(row[real][None])[0] for row, real in zip(tokens, mask, strict=True)])
    mistakes = {"as if padding were text": lambda: judge.run(tokens)[mask]}
    return _compare(model.run(tokens, mask=mask)[mask], alone, mistakes)


def packing(case: Case) -> Result:
    """Documents packed into one row get the logits that each has alone."""
    judge, model = case.models()
    tokens, lengths = draw(2, 16), [(5, 1, 7, 3), (4, 9, 2, 1)]
    segments = torch.stack([torch.arange(4).repeat_interleave(torch.tensor(row)) for row in lengths])
    documents = [document for row, sizes in zip(tokens, lengths, strict=True) for document in row.split(sizes)]
    alone = torch.cat([judge.run(document[None])[0] for document in documents]).view(2, 16, -1)
    mistakes = {
        "as if all were one document": partial(judge.run, tokens),
        "as if attention alone kept the documents apart, and convolution and recurrence ran on": partial(
            _deaf_to_borders(judge).run, tokens, segments=segments
        ),
    }
    return _compare(model.run(tokens, segments=segments), alone, mistakes)


def reuse(case: Case) -> Result:
    """A cache can be copied and both copies continued, each through an answer and a second turn."""
    judge, model = case.models()
    prompt, answers, turn = draw(2, 9), [draw(2, 5, seed=1), draw(2, 5, seed=2)], draw(2, 4, seed=3)

    def talk(model: Model, copied: Callable, before: Callable = lambda cache: None) -> Tensor:
        _, cache = model.go_on(prompt)
        logits = []
        for answer, kept in zip(answers, (cache, copied(cache)), strict=True):
            written, kept = model.go_on(answer, range(1, 5), kept)
            logits += [written, model.go_on(turn, (), kept, before)[0]]
        return torch.cat(logits, dim=1)

    def the_same(cache):
        return cache

    expected = torch.cat([judge.run(torch.cat([prompt, answer, turn], dim=1))[:, 9:] for answer in answers], dim=1)
    mistakes = {
        "as if both copies were one, so that the second answer goes on from the first": partial(talk, judge, the_same),
        "the answers are right, then as if the recurrent state were lost before the second turn": partial(
            talk, judge, judge.copy, _lose("state")
        ),
    }
    return _compare(talk(model, model.copy), expected, mistakes)


def router_weights(case: Case) -> Result:
    """Experts count by a softmax over all of them, of which the k largest are kept as they are, not renormalised."""
    judge, model = case.models(num_experts_per_tok=2)
    tokens = draw(2, 40)
    variants = {
        "as if the weights were made to add up to one, as by a softmax after the choice": {"norm_topk_prob": True},
        "as if each weight were a sigmoid": {"routing": "sigmoid"},
        "as if one expert were chosen, not two": {"num_experts_per_tok": 1},
    }
    mistakes = {seen: partial(judge.changed(**changes).run, tokens) for seen, changes in variants.items()}
    return _compare(model.run(tokens), judge.run(tokens), mistakes)


def initialisation(case: Case) -> Result:
    """A new model starts as Mamba does: steps spread over 0.001 to 0.1, A_log = log(1..n), D = 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = case.adapter.build(replace(CONFIG, hidden_size=64))
    named = list(getattr(case.adapter, "named_parameters", nn.Module.named_parameters)(model))
    bias, A_log, D = (
        [parameter.detach().cpu().double() for name, parameter in named if name.endswith(end)]
        for end in ("dt_proj.bias", ".A_log", ".D")
    )
    if not (bias and A_log and D):
        raise NotImplementedError("no parameters are named dt_proj.bias, A_log and D: give named_parameters")
    shortest, longest = (float(step) for step in F.softplus(torch.cat(bias)).aminmax())
    faults = []
    # A hundredth for rounding. Of 128 log-uniform draws, all within one decade of two is out of the question.
    if shortest < 0.99e-3 or longest > 1.01e-1:
        faults.append(f"steps are {shortest:.2g} to {longest:.2g}, not 0.001 to 0.1")
    elif longest < 10 * shortest:
        faults.append(f"steps are {shortest:.2g} to {longest:.2g}, not spread over 0.001 to 0.1")
    if any((a - torch.arange(1.0, a.shape[-1] + 1).log()).abs().max() > 1e-6 for a in A_log):
        faults.append("A_log is not log(1..n)")
    if any((d != 1).any() for d in D):
        faults.append("D is not 1")
    return Result(FAILS if faults else HOLDS, "; ".join(faults))


def precision(case: Case) -> Result:
    """In bfloat16 the recurrence computes in float32: rounding does not add up along a sequence."""
    repeated, least = case.desk.repeated, case.desk.least
    model = Model(case.adapter, case.adapter.load(repeated.path, torch.bfloat16))
    error, how, logits = repeated.worst(model)
    if not logits.isfinite().all():
        return Result(FAILS, f"{how}, logits are not finite")
    seen = f"{how} off by {error:.1%} after 200 tokens, minijamba by {least:.1%}"
    if error <= TIMES_OURS * least:
        return Result(HOLDS, seen, error, _same(logits, repeated.expected))
    return Result(FAILS, f"{seen}: rounding adds up in the state", error, _same(logits, repeated.expected))


LAWS = (
    plain_run, token_by_token, every_split, left_padding, right_padding, packing, reuse, router_weights,
    initialisation, precision,
)  # fmt: skip


def _lose(what: str) -> Callable:
    def lose(cache) -> None:
        for layer in cache.layers:
            if hasattr(layer, what):
                getattr(layer, what).zero_()

    return lose


def _losses(judge: Model, tokens: Tensor, cuts: Sequence[int]) -> dict[str, Callable[[], Tensor]]:
    """What may be lost between two calls."""

    def losing(what: str) -> Tensor:
        return judge.go_on(tokens, cuts, before=_lose(what))[0]

    def apart() -> Tensor:
        return torch.cat([judge.run(piece) for piece in tokens.tensor_split(list(cuts), dim=1)], dim=1)

    return {
        "as if the recurrent state were lost between the pieces": partial(losing, "state"),
        "as if the convolution's window were lost between the pieces": partial(losing, "window"),
        "as if each piece were a sequence of its own": apart,
    }


def _deaf_to_borders(judge: Model) -> Model:
    """The judge, with Mamba layers that do not hear where a document begins."""
    model = copy.deepcopy(judge.model)
    for module in model.modules():
        if isinstance(module, Mamba):
            module.register_forward_pre_hook(lambda _, given: (given[0], replace(given[1], documents=None), *given[2:]))
    return Model(judge.adapter, model, judge.rung)


def _compare(actual: Tensor, expected: Tensor, mistakes: dict[str, Callable[[], Tensor]] | None = None) -> Result:
    """The verdict on logits (..., v); where they are wrong, the first mistake that gives the same ones names it."""
    if not actual.isfinite().all():
        return Result(FAILS, "logits are not finite")
    error, same = _error(actual, expected), _same(actual, expected)
    if error <= TOLERANCE:
        return Result(HOLDS, "", error, same)
    named = (seen for seen, wrong in (mistakes or {}).items() if _error(actual, wrong()) <= TOLERANCE)
    return Result(FAILS, next(named, "logits differ, by no mistake that is known here"), error, same)


def _error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().nan_to_num(nan=torch.inf).max() / expected.abs().max())


def _root_mean_square(actual: Tensor, expected: Tensor) -> float:
    return float(((actual - expected).norm() / expected.norm()).nan_to_num(nan=torch.inf))


def _same(actual: Tensor, expected: Tensor) -> float:
    return float((actual.argmax(-1) == expected.argmax(-1)).double().mean())


# The report.


def conform(modules: Sequence, laws: Sequence[Callable] = LAWS, *, progress: bool = False, debug: bool = False) -> dict:
    """Holds each implementation against the laws.

    Args:
        modules:  adapters, or their names as `find` takes them.
        progress: a bar on stderr.
        debug:    let an error of an implementation through, which otherwise fails the law with its message.
    Returns: what `table` shows and `bench.records.record` writes: sides with their versions and notes, the laws, the
        tolerances, and rows, one for each side and law: side, law, verdict, seen, error, same_choice (see `Result`).
    Raises:  ValueError for a name that leads to no adapter.
    """
    from tqdm import tqdm

    adapters = [find(module) if isinstance(module, str) else _checked(module, repr(module)) for module in modules]
    sides = {adapter.NAME: _about(adapter) for adapter in adapters}
    if len(sides) < len(adapters):
        raise ValueError(f"two adapters are called the same, {', '.join(sides)}: give each a NAME of its own")
    rows = []
    with tempfile.TemporaryDirectory() as folder, tqdm(total=len(adapters) * len(laws), disable=not progress) as bar:
        desk = Desk(folder)
        for adapter in adapters:
            for law in laws:
                bar.set_description(f"{adapter.NAME}, {_title(law)}")
                result = _examine(law, Case(adapter if debug else Guarded(adapter), desk))
                rows.append({"side": adapter.NAME, "law": _title(law), **result._asdict()})
                bar.update()
    said = {_title(law): law.__doc__.split("\n")[0] for law in laws}
    return {"sides": sides, "laws": said, "tolerance": TOLERANCE, "times_ours": TIMES_OURS, "rows": rows}


@torch.no_grad()
def _examine(law: Callable, case: Case) -> Result:
    try:
        return law(case)
    except NotImplementedError as reason:
        return Result(NOT_OFFERED, str(reason))
    except Stopped as error:
        return Result(FAILS, str(error))


def find(name: str):
    """The adapter of that name: one that is shipped, path/to/adapter.py, or a dotted.module.

    Raises: ValueError if there is none, if it is not whole, or if a package that it needs is not installed.
    """
    dotted = SHIPPED.get(name, name)
    try:
        adapter = _from_file(Path(name)) if name.endswith(".py") else importlib.import_module(dotted)
    except ModuleNotFoundError as error:
        if f"{dotted}.".startswith(f"{error.name}."):
            known = ", ".join(SHIPPED)
            raise ValueError(f"{name!r} is no module: give {known}, path/to/adapter.py or a dotted.module") from None
        raise ValueError(f"the adapter {name} needs {error.name}, which is not installed: pip install it") from None
    except ImportError as error:
        raise ValueError(f"the adapter {name} cannot be imported: {error}") from None
    return _checked(adapter, name)


def _from_file(path: Path):
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; give the path of an adapter, or {', '.join(SHIPPED)}")
    sys.path.append(str(path.parent.resolve()))  # it may import its neighbours, as if Python ran it
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _checked(adapter, name: str):
    missing = [part for part in NEEDED if not hasattr(adapter, part)]
    if missing:
        raise ValueError(f"{name} is no adapter, it lacks {', '.join(missing)}: see help(minijamba.conformance)")
    return adapter


def _about(adapter) -> dict:
    versions = {package: _version(package) for package in getattr(adapter, "PACKAGES", ())}
    return {"versions": versions, "note": getattr(adapter, "NOTE", "")}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _title(law: Callable) -> str:
    return law.__name__.replace("_", " ")


def table(found: dict) -> str:
    """What `conform` found, or a record of it, in Markdown: a line a law, a column a side, then what was seen."""
    titles = [" ".join([name, *side["versions"].values()]) for name, side in found["sides"].items()]
    cells = {(row["side"], row["law"]): _cell(row) for row in found["rows"]}
    lines = [["law", *titles], *([law, *(cells[side, law] for side in found["sides"])] for law in found["laws"])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)] for line in lines)
    shown = [f"| {' | '.join(line)} |" for line in padded]
    legend = "In brackets: the largest error of a logit over the largest logit; of precision, the root mean square."
    notes = [f"- {name}: {side['note']}." for name, side in found["sides"].items() if side["note"]]
    seen = [
        f"- {row['side']}, {row['law']}: {row['verdict']}, {row['seen']}."
        for row in found["rows"]
        if row["verdict"] != HOLDS
    ]
    listed = ["", *notes, *seen] if notes or seen else []
    return "\n".join([*shown, "", legend, *listed])


def _cell(row: dict) -> str:
    error = row["error"]
    figures = [] if error is None else [f"{error:.1%}" if error > TOLERANCE else f"{error:.0e}"]
    if row["verdict"] == FAILS and row["same_choice"] is not None:
        figures.append(f"same next token {row['same_choice']:.0%}")
    verdict = f"**{FAILS}**" if row["verdict"] == FAILS else row["verdict"]
    return f"{verdict} ({', '.join(figures)})" if figures else verdict
