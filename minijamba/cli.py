"""`minijamba <verb>`. One function a verb; each imports what it needs, so that --help answers at once."""

import argparse
import math
import sys
from pathlib import Path

# As checkpoint.SHIPPED, whose module would take seconds to import.
SHIPPED = Path(__file__).resolve().parents[1] / "data" / "checkpoints" / "python"
SCHEMES = ("int8", "int4", "int8-all", "int4-all")  # as quantize.SCHEMES, likewise


def main(arguments=None):
    """Runs one verb. Returns the exit status: 0, or 2 after one line on stderr for what the user can put right."""
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (ValueError, OSError, FloatingPointError) as error:
        if options.debug:
            raise
        print(f"minijamba: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nminijamba: stopped", file=sys.stderr)
        return 130


def build_parser():
    parser = argparse.ArgumentParser(prog="minijamba", description="A readable and correct Jamba in PyTorch.")
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    verbs = parser.add_subparsers(title="verbs", metavar="verb", required=True)

    verb = _verb(verbs, tour, "see a small trained Jamba counted, proved, writing and learning, in three minutes")
    verb.add_argument("--seconds", type=float, default=45, help="length of the training (45)")

    verb = _verb(verbs, lab, "open JupyterLab in the folder of notebooks")
    verb.add_argument("--no-browser", action="store_true", help="print the address only")

    verb = _verb(verbs, site, "build the course as web pages that need no network: notebooks, solutions, API reference")
    verb.add_argument("folder", nargs="?", default="build/site", metavar="DIR", help="to build in (build/site)")

    verb = _verb(verbs, assignment, "write the course as a programming assignment: stubs, a judge and a checkpoint")
    verb.add_argument("folder", metavar="DIR", help="folder to write, absent or empty")
    verb.add_argument("--solutions", action="store_true", help="with the solutions in the place of the stubs")

    verb = _verb(verbs, generate, "continue a prompt with a checkpoint")
    verb.add_argument("--model", default=SHIPPED, help="folder or Hub id of a checkpoint (the shipped one)")
    prompt = verb.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue; <bos> is put in front")
    prompt.add_argument("--tokens", metavar="IDS", type=_ids, help="ids to continue, as 1,17,5; prints ids")
    verb.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="at most so many (64)")
    verb.add_argument("--temperature", type=float, default=0.0, help="0 = always the likeliest token (0)")
    verb.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    verb.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that hold P of the mass")
    verb.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1 repeats less (1)")
    verb.add_argument("--seed", type=int, help="the same seed draws the same text")
    verb.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (auto)")
    verb.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16 (auto: the config's)")
    verb.add_argument("--quantize", choices=SCHEMES, help="experts and MLPs in fewer bits; -all: mixers, head")

    verb = _verb(verbs, train, "train a model as a recipe says, or go on with a run that was interrupted")
    verb.add_argument("recipe", metavar="RECIPE", help="TOML file, such as data/recipes/laptop.toml")
    verb.add_argument("--output", metavar="DIR", help="folder of the run (runs/NAME-OF-RECIPE)")
    verb.add_argument("--set", action="append", default=[], metavar="ENTRY=VALUE", help="as train.steps=9")
    verb.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (auto)")
    verb.add_argument("--quiet", action="store_true", help="no progress bars")

    verb = _verb(verbs, eval, "how well a checkpoint predicts held-out text, in bits per byte, and does on tasks")
    verb.add_argument("model", nargs="?", default=SHIPPED, metavar="MODEL", help="folder or Hub id (the shipped one)")
    verb.add_argument("--data", metavar="stdlib|FOLDER", help="predict its held-out part (stdlib)")
    verb.add_argument("--run", dest="run_folder", metavar="DIR", help="a finished run: its model beside a 5-gram model")
    verb.add_argument("--record", type=Path, metavar="FILE", help="with --run: write the figures, as JSON")
    verb.add_argument("--commit", metavar="HASH", help="with --record, where the files lie without their repository")
    verb.add_argument("--context", type=int, default=1024, metavar="N", help="longest piece of a text; 0 = all (1024)")
    verb.add_argument("--synthetic", nargs="+", default=[], metavar="TASK", help="tasks of minijamba.tasks, as needle")
    verb.add_argument("--length", type=int, default=256, metavar="N", help="tokens of a synthetic task (256)")
    verb.add_argument("--setting", action="append", default=[], metavar="NAME=N", help="of the task, as pairs=8")
    verb.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="tasks of lm-evaluation-harness")
    verb.add_argument("--include", metavar="FOLDER", help="folder of your own tasks for it, YAML files")
    verb.add_argument("--limit", type=int, metavar="N", help="documents of each of its tasks at most")
    verb.add_argument("--batch", type=int, default=8, metavar="B", help="texts at once (8)")
    verb.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (auto)")
    verb.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16 (auto: the config's)")

    verb = _verb(verbs, budget, "parameters, bytes and FLOPs of a model, before allocating any")
    verb.add_argument("config", nargs="?", default="jamba-v0.1", help="preset, config.json or its folder (jamba-v0.1)")
    verb.add_argument("--compare", action="store_true", help="a table of all families instead")
    verb.add_argument("--context", type=int, help="tokens (the config's longest)")
    verb.add_argument("--batch", type=int, default=1, help="sequences (1)")
    verb.add_argument("--quantize", choices=SCHEMES, help="experts and MLPs in fewer bits; -all: mixers, head")
    verb.add_argument("--memory", type=float, metavar="GIB", help="say whether that many GiB hold it")

    verb = _verb(verbs, convert, "rewrite a checkpoint of any accepted layout as safetensors, in its family's own")
    verb.add_argument("source", nargs="?", metavar="SRC", help="folder or Hub id; none with --random")
    verb.add_argument("destination", metavar="DST", help="folder to write, absent or empty")
    verb.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16 (auto: as stored)")
    verb.add_argument("--quantize", choices=SCHEMES, help="experts and MLPs in fewer bits; -all: mixers, head")
    verb.add_argument("--random", metavar="PRESET", help="random weights in full size instead of SRC, as jamba-v0.1")
    verb.add_argument("--seed", type=int, help="of --random (0)")

    verb = _verb(verbs, study, "an experiment of the course: small models that differ in one thing, trained alike")
    verb.add_argument("name", metavar="STUDY", help="twins, balance, norms, start, blackmamba or recall")
    verb.add_argument("--steps", type=int, metavar="N", help="of each model (the study's own)")
    verb.add_argument("--seeds", type=int, metavar="N", help="how many (the study's own)")
    verb.add_argument("--set", action="append", default=[], metavar="ENTRY=VALUE", help="change its recipe")
    verb.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (auto)")
    verb.add_argument("--commit", metavar="HASH", help="to record where the files lie without their repository")
    verb.add_argument("--output", type=Path, metavar="FILE", help="data/measurements/STUDY_DEVICE.json")

    verb = _verb(verbs, conform, "hold implementations of Jamba against its laws: splits, padding, packing, reuse ...")
    about = "minijamba, transformers, mambapy, path/to/adapter.py or a dotted.module (help(minijamba.conformance))"
    verb.add_argument("modules", nargs="+", metavar="MODULE", help=about)
    verb.add_argument("--record", type=Path, metavar="FILE", help="write what was found, as JSON")

    verb = _verb(verbs, bench, "measure a component and record the figures (minijamba bench --help)")
    verb.add_argument("arguments", nargs=argparse.REMAINDER, metavar="component", help="the component and its options")

    _verb(verbs, doctor, "what is installed, which rung runs here, and what to do about the rest")
    return parser


def _verb(verbs, run, help):
    verb = verbs.add_parser(run.__name__, help=help, description=help)
    verb.set_defaults(run=run)
    return verb


def _ids(text):
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of ids such as 1,17,5") from None


def tour(options):
    from .tour import tour

    tour(seconds=options.seconds)


def lab(options):
    import subprocess
    from importlib.util import find_spec

    notebooks = Path(__file__).resolve().parents[1] / "notebooks"
    if not notebooks.is_dir():
        raise ValueError(
            f"there is no folder {notebooks}: the notebooks are in the repository, not in the installed package; "
            f"clone it and run pip install -e . inside"
        )
    if find_spec("jupyterlab") is None:
        raise ValueError("JupyterLab is not installed: pip install jupyterlab")
    browser = ["--no-browser"] if options.no_browser else []
    return subprocess.call([sys.executable, "-m", "jupyterlab", *browser, str(notebooks)])


def site(options):
    import subprocess
    from importlib.util import find_spec

    repository, folder = Path(__file__).resolve().parents[1], Path(options.folder)
    if not (repository / "docs" / "conf.py").is_file():
        raise ValueError(
            f"there is no {repository / 'docs' / 'conf.py'}: the site's sources are in the repository, not in the "
            f"installed package; clone it and run pip install -e '.[site]' inside"
        )
    if find_spec("sphinx") is None:
        raise ValueError("Sphinx is not installed: pip install -e '.[site]'")
    strictly = ["-E", "-W", "--keep-going", "-n", "-q", "-j", "2"]  # from scratch; a reference that leads nowhere fails
    places = ["-c", repository / "docs", "-d", folder / "doctrees", repository, folder / "html"]
    status = subprocess.call([sys.executable, "-m", "sphinx", *strictly, *places])
    if status == 0:
        print(f"built: open {folder / 'html' / 'index.html'} in a browser")
    return status


def assignment(options):
    from .assignment import write_assignment

    write_assignment(options.folder, options.solutions)
    print(f"{options.folder}: written; pytest in it says what is attempted and what is right")


def generate(options):
    import minijamba as mj

    model = mj.load(options.model, device=options.device, dtype=options.dtype, quantize=options.quantize)
    if options.tokens is None:
        tokens, show, end = _text_prompt(model, options)
    else:
        tokens, show, end = options.tokens, lambda token: f"{token} ", lambda: ""
    mj.generate(
        model,
        tokens,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
        stream=lambda chosen: print(show(chosen[0]), end="", flush=True),
    )
    print(end())


def _text_prompt(model, options):
    """The ids of --prompt, and the stream that turns new ids into text: (ids, add, finish)."""
    from .tokenizer import ByteTokenizer

    tokenizer = _tokenizer(options.model)
    if isinstance(tokenizer, ByteTokenizer):
        print(f"minijamba: {options.model} has no tokenizer.json, so text is taken as bytes", file=sys.stderr)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {options.model} has {tokenizer.vocab_size} tokens and the model "
            f"{model.config.vocab_size}: put the right tokenizer.json beside the weights, or give ids with --tokens"
        )
    bos = model.config.bos_token_id
    decoder = tokenizer.stream()
    return ([] if bos is None else [bos]) + tokenizer.encode(options.prompt, special=True), decoder.add, decoder.finish


def _tokenizer(model):
    """The tokenizer beside a checkpoint, given as its folder, its file or its id."""
    from .checkpoint import locate
    from .tokenizer import load_tokenizer

    path = locate(model, weights=False)
    return load_tokenizer(path if path.is_dir() else path.parent)


def train(options):
    from .recipe import load_recipe
    from .run import run

    folder = options.output or Path("runs") / Path(options.recipe).stem
    try:
        model = run(load_recipe(options.recipe, options.set), folder, options.device, progress=not options.quiet)
    except KeyboardInterrupt:
        print(f"\nminijamba: stopped; the same command goes on from the last checkpoint in {folder}", file=sys.stderr)
        return 130
    print(f"{model}: written; minijamba generate --model {model} --prompt TEXT continues a text with it")


def eval(options):
    if options.run_folder:
        return _evaluate_run(options)
    import minijamba as mj

    tokenizer = _tokenizer(options.model)
    model = mj.load(options.model, device=options.device, dtype=options.dtype)
    rows = []
    if options.data or not (options.tasks or options.synthetic):
        rows += _text_rows(model, tokenizer, options)
    for name in options.synthetic:
        rows += _synthetic_rows(model, name, options)
    if options.tasks:
        rows += _harness_rows(model, tokenizer, options)
    width = max(len(name) for name, _, _ in rows) + 2
    for name, measure, value in rows:
        print(f"{name:<{width}}{measure:<24}{value}")


def _evaluate_run(options):
    from .bench.records import record
    from .run import held_out_scores, summary
    from .rungs import find_device

    scores = held_out_scores(options.run_folder, options.device, progress=sys.stderr.isatty())
    rows = [{"model": name, **vars(score), "bits_per_byte": score.bits_per_byte} for name, score in scores.items()]
    for row in rows:
        print(f"{row['model']:<8}{row['bits_per_byte']:.4f} bits a byte, on {row['bytes']:,} bytes held out")
    if options.record:
        facts = {"device": find_device(options.device), "output": options.record, "commit": options.commit}
        print(f"recorded in {record(options.record.stem, rows, **facts, **summary(options.run_folder))}")


def _text_rows(model, tokenizer, options):
    """(text, measure, value) of the documents that the rule of `data.split` holds out."""
    from . import data
    from .evaluate import bits_per_byte

    source = options.data or "stdlib"
    documents = data.standard_library() if source == "stdlib" else data.text_folder(source)
    held_out = data.texts(data.split(data.without_copies(documents))["held_out"])
    if not held_out:
        raise ValueError(f"{source} holds too few documents to hold one out: give three at least")
    score = bits_per_byte(
        model, tokenizer, held_out, context=options.context or None, batch=options.batch, progress=sys.stderr.isatty()
    )
    return [
        (source, "documents held out", f"{len(held_out):,}"),
        (source, "bytes", f"{score.bytes:,}"),
        (source, "tokens", f"{score.tokens:,}"),
        (source, "bits per byte", f"{score.bits_per_byte:.4f}"),
        (source, "nats per token", f"{score.nats_per_token:.4f}"),
    ]


def _synthetic_rows(model, name, options, batches=8):
    """(task, measure, value): answers right, and rows with all answers right, of a task of `tasks`."""
    from inspect import signature

    import torch

    from .tasks import TASKS, accuracy, solved, task_batch

    settings = {}
    for setting in options.setting:
        key, _, value = setting.partition("=")
        if not value.isdigit():
            raise ValueError(f"{setting!r} is no setting: write it as pairs=8")
        settings[key] = int(value)
    settings.setdefault("vocabulary", model.config.vocab_size)
    if name in TASKS:
        try:
            signature(TASKS[name]).bind(options.batch, options.length, generator=None, **settings)
        except TypeError as error:
            raise ValueError(f"{name}: {error}; settings are given as --setting pairs=8") from None
    scores = []
    for step in range(batches):
        batch = task_batch(name, options.batch, options.length, seed=0, step=step, **settings).to(model.device)
        with torch.no_grad():
            logits = model(batch.tokens)
        scores.append((accuracy(logits, batch.targets), solved(logits, batch.targets)))
    answers, rows = (sum(values) / batches for values in zip(*scores, strict=True))
    title = f"{name}, {options.length} tokens"
    return [(title, "answers right", f"{answers:.1%}"), (title, "rows all right", f"{rows:.1%}")]


def _harness_rows(model, tokenizer, options):
    """(task, metric, value) of tasks of lm-evaluation-harness."""
    try:
        from .harness import run_harness
    except ImportError as error:
        raise ValueError(error) from None

    results = run_harness(
        model, options.tasks, tokenizer=tokenizer, include_path=options.include, limit=options.limit,
        batch_size=options.batch,
    )  # fmt: skip
    return [
        (task, metric.removesuffix(",none"), f"{value:.4f}" if isinstance(value, float) else str(value))
        for task, values in results.items()
        for metric, value in values.items()
    ]


def study(options):
    from .study import study

    file = study(
        options.name, options.device, steps=options.steps, seeds=options.seeds, changes=options.set,
        commit=options.commit, output=options.output,
    )  # fmt: skip
    print(f"recorded in {file}")


def convert(options):
    from .checkpoint import convert, write_random
    from .config import preset

    if options.random:
        if options.source or options.quantize:
            raise ValueError("--random takes DST, --seed and --dtype alone: convert what it writes with --quantize")
        write_random(preset(options.random), options.destination, seed=options.seed or 0, dtype=options.dtype)
    elif options.source is None or options.seed is not None:
        raise ValueError("convert takes SRC and DST, or --random PRESET with --seed and DST")
    else:
        convert(options.source, options.destination, options.dtype, quantize=options.quantize)
    print(f"{options.destination}: written")


def conform(options):
    import torch

    from .bench.records import record
    from .conformance import FAILS, conform, table

    found = conform(options.modules, progress=sys.stderr.isatty(), debug=options.debug)
    print(table(found))
    if options.record:
        facts = {name: value for name, value in found.items() if name != "rows"}
        file = record(options.record.stem, found["rows"], device=torch.device("cpu"), output=options.record, **facts)
        print(f"recorded in {file}")
    return int(any(row["verdict"] == FAILS for row in found["rows"]))


def bench(options):
    from . import bench

    parser = argparse.ArgumentParser(prog="minijamba bench")
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(options.arguments))


def budget(options):
    import minijamba as mj

    if options.compare:
        from .budget import compare

        if options.memory or options.quantize or options.batch != 1:
            raise ValueError("--compare takes --context alone: leave --batch, --quantize and --memory out")
        return print(compare(context=262144 if options.context is None else options.context))
    table = mj.budget(_config(options.config), options.context, options.batch, options.quantize)
    print(table)
    if options.memory is not None:
        memory = int(options.memory * 2**30)
        verdict = "fits in" if table.fits(memory) else "does not fit in"
        longest = table.max_context(memory)
        longest = "any number of" if longest == math.inf else f"{longest:,}"
        print(f"{verdict} {options.memory:g} GiB; the longest context that does: {longest} tokens")


def _config(name):
    from .config import PRESETS, JambaConfig, preset

    if name in PRESETS:
        return preset(name)
    if not Path(name).exists():
        raise ValueError(f"{name!r} is no file, and no preset: {', '.join(PRESETS)}")
    return JambaConfig.from_json(name)


def doctor(options):
    from .doctor import report

    print(report())
