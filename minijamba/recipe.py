"""What a run is made of: model, text and schedule, as a TOML file that says all of it."""

import dataclasses
import difflib
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path

from . import data
from .config import JambaConfig, preset
from .model import Jamba
from .tokenizer import BOS, EOS, PAD
from .train import Trainer, schedule


@dataclass(frozen=True)
class DataRecipe:
    """[data]: where the text comes from. One source, or the standard library together with packages.

    With `task` there is no text: the batches are those of `tasks`, whose settings stand in `settings`.
    """

    standard_library: bool = False
    packages: tuple[str, ...] = ()  # installed ones, by import name
    folder: str | None = None  # of texts; a relative one is relative to the recipe's own folder
    suffixes: tuple[str, ...] = data.TEXT_SUFFIXES  # of the files in it that are texts
    vocab_size: int | None = 4096  # of the byte-pair tokenizer that is trained on it; None: every byte is a token
    task: str | None = None
    settings: dict = field(default_factory=dict)

    def __post_init__(self):
        kinds = [self.standard_library or bool(self.packages), self.folder is not None, self.task is not None]
        if sum(kinds) != 1:
            raise ValueError(
                "[data] must name one source: standard_library and packages, or folder, or task; "
                f"this one names {sum(kinds)}"
            )

    def documents(self) -> dict[str, Path | str]:
        """All documents of the source; see `data`."""
        if self.folder is not None:
            return data.text_folder(self.folder, self.suffixes)
        library = data.standard_library() if self.standard_library else {}
        return library | data.installed_packages(list(self.packages))


@dataclass(frozen=True)
class TrainRecipe:
    """[train]: how long, how much at once, how fast."""

    steps: int = 1000
    batch: int = 16  # sequences a step
    length: int = 256  # tokens a sequence
    accumulate: int = 1  # pieces that a batch is taken in
    learning_rate: float = 3e-3  # its peak
    warmup: float = 0.05  # share of the run
    floor: float = 0.1  # of the cosine, share of the peak
    weight_decay: float = 0.1
    clip: float = 1.0
    bfloat16: bool = False  # compute in bfloat16 (autocast); weights stay float32
    recompute: bool = False  # activations, for less memory and more time

    def __post_init__(self):
        least = {"steps": 1, "batch": 1, "length": 1, "accumulate": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"train.{name} is {getattr(self, name)}, but must be at least {low}")
        if self.batch % self.accumulate:
            raise ValueError(
                f"train.batch {self.batch} is not a multiple of train.accumulate {self.accumulate}: change one of them"
            )
        for name in ("warmup", "floor"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}, but must be at least 0 and below 1")
        if self.learning_rate <= 0 or self.clip <= 0 or self.weight_decay < 0:
            raise ValueError("train.learning_rate and train.clip must be above 0, train.weight_decay at least 0")

    def trainer(self, model: Jamba) -> Trainer:
        """What takes the steps of a run; `rate` gives each its learning rate."""
        same = ("weight_decay", "clip", "accumulate", "bfloat16", "recompute")
        return Trainer(model, **{name: getattr(self, name) for name in same})

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.learning_rate * schedule(step / self.steps, self.warmup, self.floor)


@dataclass(frozen=True)
class LogRecipe:
    """[log]: what is looked at on the way, each every so many steps; 0 = never."""

    save: int = 500
    validate: int = 500
    sample: int = 1000
    validation_batches: int = 8  # of train.batch sequences, always the same ones
    prompt: str = "def "  # that samples continue
    tensorboard: bool = False


@dataclass(frozen=True)
class Recipe:
    """A whole run. Two runs of one recipe, on one machine and with the same text, have the same bits."""

    model: dict  # "preset" or "checkpoint", and fields of JambaConfig; its vocabulary is the tokenizer's
    data: DataRecipe
    train: TrainRecipe
    log: LogRecipe
    seed: int = 0

    def config(self, vocab_size: int) -> JambaConfig:
        """The model's configuration, once the tokenizer has told its vocabulary."""
        changes = {name: value for name, value in self.model.items() if name not in ("preset", "checkpoint")}
        if changes.setdefault("vocab_size", vocab_size) < vocab_size:
            raise ValueError(
                f"model.vocab_size {changes['vocab_size']} is below the tokenizer's {vocab_size}: leave it out"
            )
        tokens = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
        return preset(self.model["preset"], **tokens | changes)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def load_recipe(path: str | Path, changes: list[str] = ()) -> Recipe:
    """Reads a recipe, with changes such as "train.steps=100" made to it.

    Raises: ValueError naming the file and the entry that is wrong, and the nearest name where one is unknown.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a recipe, a TOML file such as those in data/recipes")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        for change in changes:
            _apply(tables, change)
    except ValueError as error:
        raise ValueError(f"{path} is not TOML ({error})" if not changes else f"{path}: {error}") from None
    try:
        return recipe_from_dict(tables, path.parent)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def recipe_from_dict(tables: dict, home: Path = Path()) -> Recipe:
    """The recipe that the tables of a TOML file describe; relative folders in it start from `home`."""
    tables = {name: dict(value) if isinstance(value, dict) else value for name, value in tables.items()}
    _check_names(tables, [field.name for field in fields(Recipe)], "")
    model = tables.get("model", {})
    _check_names(model, ["preset", "checkpoint", *(field.name for field in fields(JambaConfig))], "model.")
    if ("preset" in model) == ("checkpoint" in model):
        raise ValueError("[model] must name either a preset or a checkpoint to start from")
    if "checkpoint" in model and len(model) > 1:
        raise ValueError("[model] names a checkpoint, whose config.json has all its sizes: leave the others out")
    for table, name in ((tables.get("data", {}), "folder"), (model, "checkpoint")):
        if isinstance(table.get(name), str):
            table[name] = str((home / table[name]).resolve())
    recipe = Recipe(
        model,
        _section(DataRecipe, tables.get("data", {}), "data."),
        _section(TrainRecipe, tables.get("train", {}), "train."),
        _section(LogRecipe, tables.get("log", {}), "log."),
        tables.get("seed", 0),
    )
    if "preset" in model:
        recipe.config(model.get("vocab_size", 2**16))  # refuses contradictions before any text is read
    return recipe


def _section(kind, table: dict, prefix: str):
    _check_names(table, [field.name for field in fields(kind)], prefix)
    values = {}
    for entry in fields(kind):
        value = table.get(entry.name, dataclasses.MISSING)
        if value is not dataclasses.MISSING:
            values[entry.name] = tuple(value) if isinstance(value, list) else value
            _check_type(entry, values[entry.name], prefix)
    return kind(**values)


def _check_type(entry: dataclasses.Field, value, prefix: str) -> None:
    kinds = {int: (int,), float: (int, float), bool: (bool,), str: (str,), dict: (dict,)}
    wanted = kinds.get(entry.type)
    if wanted and (not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted)):
        raise ValueError(f"{prefix}{entry.name} is {value!r}, but must be {entry.type.__name__}")


def _check_names(table: dict, known: list[str], prefix: str) -> None:
    for name in table:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"there is no entry {prefix}{name}: {hint}")


def _apply(tables: dict, change: str) -> None:
    """Set one entry, given as train.steps=100; the value is read as TOML, or taken as text where it is none."""
    name, equals, text = change.partition("=")
    *sections, entry = name.strip().split(".")
    if not equals or not entry:
        raise ValueError(f"{change!r} is no change: write it as train.steps=100")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for section in sections:
        tables = tables.setdefault(section, {})
    tables[entry] = value
