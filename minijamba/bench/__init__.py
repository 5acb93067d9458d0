"""Every speed that is claimed is measured here, side by side with other programs in one run, and recorded.

    minijamba bench scan       ->  data/measurements/scan_cuda.json on a GPU, scan_cpu.json without
    minijamba bench conv
    minijamba bench mixer
    minijamba bench train      whole steps of training
    minijamba bench decode     models of full size: tokens written a second
    minijamba bench prefill    tokens read a second, the longest context
    minijamba bench throughput prompt and answer together
    minijamba bench load       from files to the first token
    minijamba bench agreement  the logits of one checkpoint, here and in transformers
    minijamba bench summary    the README's table, from what was recorded of whole models

`scan`, `conv` and `mixer` say what is compared, `measure` how it is measured; `records` writes and shows it. Models of
full size are compared in `serving`, each of `programs` in a process `apart`.
"""

import argparse
import json
import re
from contextlib import nullcontext
from pathlib import Path

import torch

from ..quantize import SCHEMES
from ..rungs import find_device
from .agreement import ALL, DTYPES, bench_agreement
from .conv import CONV
from .decode import bench_decode
from .load import bench_load
from .measure import MEASURES, Run, Setting, available, card, warn_of_company
from .mixer import MIXER
from .prefill import bench_prefill
from .programs import PROGRAMS
from .records import record, table
from .scan import SCAN
from .summary import jamba_table
from .throughput import bench_throughput
from .train import PREPARE, bench_train

__all__ = ["COMPONENTS", "add_arguments", "bench", "record", "run", "table"]

COMPONENTS = {component.name: component for component in (SCAN, CONV, MIXER)}
# Those of whole models, each a function that measures and records.
WHOLE = {
    "train": bench_train, "decode": bench_decode, "prefill": bench_prefill, "throughput": bench_throughput,
    "load": bench_load, "agreement": bench_agreement,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The components that can be measured, as verbs of the parser, and their options."""
    verbs = parser.add_subparsers(title="components", metavar="component", required=True)
    for name, component in COMPONENTS.items():
        choices = f"sides: {'; '.join(component.sides)}. Measures: {'; '.join(component.measures)}."
        verb = verbs.add_parser(name, help=component.help, description=component.help, epilog=choices)
        verb.set_defaults(component=name)
        verb.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (auto)")
        verb.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="instead of the device's")
        verb.add_argument("--sides", nargs="+", metavar="SIDE", help="what to compare, the first with all others")
        verb.add_argument(
            "--measure", nargs="+", action="append", metavar=("MEASURE", "CASE"),
            help="instead of the device's table: what to measure and where, as forward 1x512 8x2048; may be repeated",
        )  # fmt: skip
        verb.add_argument("--repeats", type=int, metavar="N", help="the median of so many calls")
        for size in component.plans["cpu"].sizes:
            verb.add_argument(f"--{size}", type=int, metavar="N", help="instead of the device's")
        verb.add_argument("--commit", metavar="HASH", help="to record where the files lie without their repository")
        verb.add_argument("--output", type=Path, metavar="FILE", help="data/measurements/COMPONENT_DEVICE.json")
    help = "whole training steps of two small hybrids, beside transformers' Jamba with its kernels"
    verb = verbs.add_parser("train", help=help, description=help, epilog=f"sides: {'; '.join(PREPARE)}")
    verb.set_defaults(component="train")
    verb.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (auto)")
    verb.add_argument("--sides", nargs="+", metavar="SIDE", help="what to compare")
    verb.add_argument("--repeats", type=int, default=5, metavar="N", help="the median of so many means (5)")
    verb.add_argument("--commit", metavar="HASH", help="to record where the files lie without their repository")
    verb.add_argument("--output", type=Path, metavar="FILE", help="data/measurements/train_DEVICE.json")
    _add_serving(verbs)
    _add_load(verbs)
    _add_agreement(verbs)
    help = "the README's table of the 52-billion model, from what was recorded"
    verbs.add_parser("summary", help=help, description=help).set_defaults(component="summary")


def _add_serving(verbs) -> None:
    helps = {
        "decode": "tokens that models of full size write a second, beside transformers and vLLM",
        "prefill": "tokens that models of full size read a second, beside transformers and vLLM",
        "throughput": "prompt and answer of models of full size from end to end",
    }
    for name, help in helps.items():
        verb = verbs.add_parser(name, help=help, description=help, epilog=f"sides: {'; '.join(PROGRAMS)}")
        verb.set_defaults(component=name)
        _add_common(verb, name)
        verb.add_argument("--models", nargs="+", metavar="PRESET", help="as jamba-v0.1")
        verb.add_argument("--cases", nargs="+", metavar="CASE", help="batch and tokens of context, as 1x1024 64x8192")
        verb.add_argument("--sides", nargs="+", metavar="SIDE", help="what to compare")
        verb.add_argument("--repeats", type=int, metavar="N", help="calls of which the median counts")
        verb.add_argument("--kv", choices=("int8",), help="how ours keeps keys and values, if not in the model's dtype")
        verb.add_argument("--add", action="store_true", help="keep what the file has and this run does not measure")
        if name != "prefill":
            verb.add_argument("--new", type=int, metavar="N", help="tokens that are written")
    verbs.choices["decode"].add_argument("--loop", action="store_true", help="also step by step, without a CUDA graph")
    verbs.choices["prefill"].add_argument("--longest", action="store_true", help="also the longest context that runs")
    verbs.choices["prefill"].add_argument("--tries", type=int, default=2, metavar="N", help="of --longest (2)")


def _add_load(verbs) -> None:
    help = "seconds from the files of a checkpoint to the first token, beside the reading of the files alone"
    verb = verbs.add_parser("load", help=help, description=help)
    verb.set_defaults(component="load")
    verb.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder of a checkpoint")
    verb.add_argument("--cached", action="store_true", help="also with files that are in the page cache")
    verb.add_argument("--saved", action="store_true", help="also as int8-all, written beside it for a while")
    _add_common(verb, "load")


def _add_agreement(verbs) -> None:
    help = "one checkpoint here and in transformers: how far the logits are apart, how often the choices are alike"
    verb = verbs.add_parser("agreement", help=help, description=help, epilog=f"sides: {'; '.join(ALL)}")
    verb.set_defaults(component="agreement")
    verb.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder of a checkpoint")
    verb.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...; transformers takes all GPUs (auto)")
    verb.add_argument("--schemes", nargs="+", choices=("none", *SCHEMES), help="how our weights are held")
    verb.add_argument("--sides", nargs="+", metavar="SIDE", help="what to compare with transformers in float32")
    verb.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help=f"that they compute in ({DTYPES[0]})")
    verb.add_argument("--batch", type=int, default=4, metavar="N", help="rows of tokens (4)")
    verb.add_argument("--context", type=int, default=512, metavar="N", help="tokens of a row (512)")
    verb.add_argument("--new", type=int, default=64, metavar="N", help="tokens that are written after each row (64)")
    verb.add_argument("--keep", type=Path, metavar="DIR", help="where answers stay, so that no side is asked again")
    verb.add_argument("--add", action="store_true", help="keep what the file has and this run does not measure")
    verb.add_argument("--commit", metavar="HASH", help="to record where the files lie without their repository")
    verb.add_argument("--output", type=Path, metavar="FILE", help="data/measurements/agreement_DEVICE.json")


def _add_common(verb, name: str) -> None:
    verb.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (auto)")
    verb.add_argument("--schemes", nargs="+", choices=(*SCHEMES, "none"), help="how our weights are held")
    verb.add_argument("--memory", type=float, metavar="GIB", help="of a GPU, for a process with packed weights")
    verb.add_argument("--commit", metavar="HASH", help="to record where the files lie without their repository")
    verb.add_argument("--output", type=Path, metavar="FILE", help=f"data/measurements/{name}_DEVICE.json")


def run(options: argparse.Namespace) -> int:
    """Measure what the parsed options ask for. Returns the exit status."""
    options = vars(options)
    if options["component"] == "summary":
        print(jamba_table())
        return 0
    if options["component"] in WHOLE:
        WHOLE[options.pop("component")](**_words_read(options))
        return 0
    if options["measure"]:
        options["measure"] = {name: [_case(word) for word in words] for name, *words in options["measure"]}
    bench(options.pop("component"), **options)
    return 0


def _words_read(options: dict) -> dict:
    if options.get("cases"):
        options["cases"] = [_case(word) for word in options["cases"]]
    if options.get("schemes"):
        options["schemes"] = [None if word == "none" else word for word in options["schemes"]]
    return options


def _case(word: str) -> tuple[int, int]:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", word):
        raise ValueError(f"{word!r} is no case: give batch and length as 8x2048")
    batch, steps = word.split("x")
    return int(batch), int(steps)


def bench(
    component: str,
    device: str = "auto",
    *,
    dtype: str | None = None,
    sides: list[str] | None = None,
    measure: dict[str, list[tuple[int, int]]] | None = None,
    repeats: int | None = None,
    commit: str | None = None,
    output: Path | None = None,
    **sizes: int | None,
) -> Path:
    """Measure a component, ours and others', and record the figures. What is None is as the device's plan has it.

    All sides get the same numbers, each in its own layout, and must give the same results before they are timed.

    Args:
        component: "scan", "conv" or "mixer".
        sides:     names of what is compared; the table shows the others as multiples of the first.
        measure:   name of a measure -> cases (batch, steps) at which to take it.
        repeats:   each time is the median of so many calls, of fewer where they take too long.
        commit:    to record when the files lie here without their repository.
        output:    file to record in; data/measurements/<component>_<device>.json when None.
    Returns: the file. Prints the table.
    Raises: ValueError for a device, side or measure that does not exist.
    """
    from tqdm import tqdm

    component = COMPONENTS[component]
    device = find_device(device)
    plan = component.plans[_known(device.type, component.plans, "device")]
    sizes = plan.sizes | {size: value for size, value in sizes.items() if value is not None}
    setting = Setting(device, getattr(torch, dtype or plan.dtype), sizes)
    names = [_known(name, component.sides, "side") for name in sides or plan.sides]
    cases = {_known(name, component.measures, "measure"): pairs for name, pairs in (measure or plan.cases).items()}

    warn_of_company()
    sides, left_out = available(component, names, setting)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        ceilings = card(device) if device.type == "cuda" else {}
        run = Run(component, setting, sides, repeats or plan.repeats, ceilings, left_out)
        rows = [
            {"measure": name, "batch": batch, "steps": steps, **row}
            for name, batch, steps in tqdm([(name, *case) for name in cases for case in cases[name]], leave=False)
            for row in MEASURES[name](run, batch, steps)
        ]
    facts = {"repeats": run.repeats, "dtype": str(setting.dtype).removeprefix("torch."), **sizes}
    facts |= {"card": ceilings, "left_out": left_out}
    path = record(f"{component.name}_{device.type}", rows, device=device, output=output, commit=commit, **facts)
    print(table(json.loads(path.read_text(encoding="utf-8"))))
    print(f"recorded in {path}")
    return path


def _known(name: str, names, kind: str) -> str:
    if name not in names:
        raise ValueError(f"there is no {kind} {name!r} here: choose of {', '.join(map(repr, names))}")
    return name
