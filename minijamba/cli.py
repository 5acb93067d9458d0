"""`minijamba <verb>`. One function a verb; each imports what it needs, so that --help answers at once."""

import argparse
import sys
from pathlib import Path


def main(arguments=None):
    """Runs one verb. Returns the exit status: 0, or 2 after one line on stderr for what the user can put right."""
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (ValueError, OSError) as error:
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

    verb = _verb(verbs, tour, "see a small Jamba built, proved, trained and writing, in three minutes")
    verb.add_argument("--seconds", type=float, default=75, help="length of the training (75)")

    verb = _verb(verbs, lab, "open JupyterLab in the folder of notebooks")
    verb.add_argument("--no-browser", action="store_true", help="print the address only")

    verb = _verb(verbs, generate, "continue a prompt with a checkpoint")
    verb.add_argument("--model", required=True, help="folder of a checkpoint, or its id on the Hugging Face Hub")
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

    verb = _verb(verbs, budget, "parameters, bytes and FLOPs of a model, before allocating any")
    verb.add_argument("config", nargs="?", default="jamba-v0.1", help="preset, config.json or its folder (jamba-v0.1)")
    verb.add_argument("--context", type=int, help="tokens (the config's longest)")
    verb.add_argument("--batch", type=int, default=1, help="sequences (1)")
    verb.add_argument("--quantize", choices=("int8", "int4"), help="weights of the experts")
    verb.add_argument("--memory", type=float, metavar="GIB", help="say whether that many GiB hold it")

    verb = _verb(verbs, convert, "read a checkpoint of any accepted layout and write the released one")
    verb.add_argument("source", metavar="SRC", help="folder or Hub id")
    verb.add_argument("destination", metavar="DST", help="folder to write, absent or empty")
    verb.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16 (auto: as stored)")

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


def generate(options):
    import minijamba as mj

    model = mj.load(options.model, device=options.device, dtype=options.dtype)
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
    from .checkpoint import locate
    from .tokenizer import ByteTokenizer, load_tokenizer

    path = locate(options.model, weights=False)
    tokenizer = load_tokenizer(path if path.is_dir() else path.parent)
    if isinstance(tokenizer, ByteTokenizer):
        print(f"minijamba: {options.model} has no tokenizer.json, so text is taken as bytes", file=sys.stderr)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {options.model} has {tokenizer.vocab_size} tokens and the model "
            f"{model.config.vocab_size}: put the right tokenizer.json beside the weights, or give ids with --tokens"
        )
    bos = model.config.bos_token_id
    decoder = tokenizer.stream()
    return ([] if bos is None else [bos]) + tokenizer.encode(options.prompt), decoder.add, decoder.finish


def convert(options):
    from .checkpoint import convert

    convert(options.source, options.destination, options.dtype)
    print(f"{options.destination}: written")


def bench(options):
    from . import bench

    parser = argparse.ArgumentParser(prog="minijamba bench")
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(options.arguments))


def budget(options):
    import minijamba as mj

    table = mj.budget(_config(options.config), options.context, options.batch, options.quantize)
    print(table)
    if options.memory is not None:
        memory = int(options.memory * 2**30)
        verdict = "fits in" if table.fits(memory) else "does not fit in"
        print(f"{verdict} {options.memory:g} GiB; the longest context that does: {table.max_context(memory):,} tokens")


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
