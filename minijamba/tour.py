"""`minijamba tour`: a small Jamba built, proved, trained and writing, in three minutes on two cores."""

import copy
import math
import sys
from itertools import islice

import torch

import minijamba as mj

from .attention import attention
from .conv import causal_conv
from .data import random_windows, standard_library_text, token_stream
from .moe import mixture, route
from .tokenizer import BOS, BPETokenizer
from .train import evaluate, train

VOCABULARY = 1024
STATES = 4  # a channel; more would take time from the steps that a minute holds
BATCH, LENGTH = 8, 64  # sequences a step, tokens a sequence
LEARNING_RATE = 4e-3
LONGEST_MODULE = 40_000  # characters; longer modules are mostly tables
PROMPT = "class Reader:\n    def __init__(self"


def tour(seconds=75):
    """Prints the whole tour; `seconds` is the length of the training.

    Raises: AssertionError if two rungs differ, or if the training does not lower the loss.
    """
    threads = torch.get_num_threads()
    # Tensors this small gain little from a second thread, and lose much where it has to wait for other programs.
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        model = _build()
        _prove(model)
        tokenizer = _train(model, seconds)
        _write(model, tokenizer)
        _plan()
    finally:
        torch.set_num_threads(threads)
    print("\nNext: minijamba lab opens the notebooks; begin with 00_map.ipynb, a smaller one from the inside.")


def _build():
    _title("A small Jamba")
    model = mj.Jamba(mj.preset("tour", vocab_size=VOCABULARY, mamba_d_state=STATES))
    config, table = model.config, mj.budget(model.config)
    print(f"layers: {config.schedule}")
    print("        m Mamba, A attention; + MLP, E mixture of experts\n")
    for part, count in table.params.items():
        print(f"{part:<10} {count:>10,}")
    print(f"{'together':<10} {table.total_params:>10,} parameters, of which a token uses {table.active_params:,}")
    assert sum(parameter.numel() for parameter in model.parameters()) == table.total_params
    return model


def _prove(model):
    _title("The definition and the fast algorithm compute the same")
    print(f"{'component':<12} {'definition':<20} {'algorithm':<30} largest relative error, float64")
    rows = [
        ("scan", "loop over time", "associative scan in chunks", _scan),
        ("convolution", "loop over taps", "conv1d", _convolution),
        ("attention", "softmax of a matrix", "scaled_dot_product_attention", _attention),
        ("experts", "loop over tokens", "one product for each expert", _experts),
    ]
    for name, definition, algorithm, run in rows:
        _row(name, definition, algorithm, zip(run("parallel"), run("naive"), strict=True))
    _row("decoding", "whole text at once", "two caches, token by token", [_decoding(model)])


def _row(name, definition, algorithm, pairs):
    error = max(((fast - slow).abs().max() / slow.abs().max()).item() for fast, slow in pairs)
    assert error < 1e-10, f"{name}: relative error {error}"  # float64, sums of hundreds of terms in another order
    print(f"{name:<12} {definition:<20} {algorithm:<30} {error:.0e}")


def _draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def _scan(rung):
    """Steps of about 0.01, so that the state remembers hundreds of tokens and a lost one would show."""
    torch.manual_seed(0)
    x, delta, z = (_draw(2, 257, 32) for _ in range(3))
    A, B, C, state = -_draw(32, 16).exp(), _draw(2, 257, 16), _draw(2, 257, 16), _draw(2, 32, 16)
    return mj.selective_scan(
        x, delta - 4.6, A, B, C, _draw(32), z, delta_softplus=True, state=state, return_state=True, rung=rung
    )


def _convolution(rung):
    torch.manual_seed(0)
    x, weight, bias, state = _draw(2, 257, 32), _draw(32, 4), _draw(32), _draw(2, 3, 32)
    return causal_conv(x, weight, bias, state=state, return_state=True, rung=rung)


def _attention(rung):
    torch.manual_seed(0)
    return [attention(_draw(2, 257, 4, 16), _draw(2, 257, 2, 16), _draw(2, 257, 2, 16), rung=rung)]


def _experts(rung):
    torch.manual_seed(0)
    weights, indices = route(_draw(100, 4), 2)
    return [mixture(_draw(100, 32), weights, indices, _draw(4, 48, 32), _draw(4, 48, 32), _draw(4, 32, 48), rung=rung)]


@torch.no_grad()
def _decoding(model):
    model = copy.deepcopy(model).double()
    tokens = torch.randint(model.config.vocab_size, (2, 64))
    cache = model.new_cache(batch=2)
    steps = [model(tokens[:, t : t + 1], cache=cache) for t in range(64)]
    return torch.cat(steps, dim=1), model(tokens)


def _train(model, seconds):
    from tqdm import tqdm

    _title(f"Training for {seconds:g} seconds on the source of Python's standard library")
    parts = [_short_modules(part) for part in standard_library_text()]
    tokenizer = BPETokenizer.train(parts[0], VOCABULARY)
    text, held_out = (
        token_stream(tqdm(part, desc=name, unit=" modules"), tokenizer)
        for name, part in zip(("tokens to train on", "tokens held out"), parts, strict=True)
    )
    held_out_batches = list(islice(random_windows(held_out, 8, LENGTH, seed=1), 8))
    before = evaluate(model, held_out_batches)
    history = train(model, random_windows(text, BATCH, LENGTH), seconds=seconds, learning_rate=LEARNING_RATE)
    after = evaluate(model, held_out_batches)
    print(f"{len(text):,} tokens of {len(parts[0])} modules; {len(history)} steps of {BATCH} x {LENGTH} tokens")
    print("\nloss in nats a token, on modules held out")
    print(f"{'all tokens alike':<40} {math.log(VOCABULARY):.2f}")
    print(f"{'this model before training':<40} {before:.2f}")
    print(f"{'knowing how frequent each token is':<40} {unigram_loss(text, held_out):.2f}")
    print(f"{'this model after training':<40} {after:.2f}")
    assert after < before, f"training raised the loss from {before} to {after}"
    return tokenizer


def _short_modules(documents):
    return [text for name, text in documents.items() if "/" not in name and len(text) < LONGEST_MODULE]


def unigram_loss(text, held_out):
    """Nats a token of `held_out` for a model that knows each token's frequency in `text` and nothing else.

    Every count is one too high, so that no token is impossible.
    """
    counts = torch.bincount(text, minlength=VOCABULARY) + 1.0
    return -(counts / counts.sum()).log()[held_out].mean().item()


def _write(model, tokenizer):
    _title("What it writes")
    stream = tokenizer.stream()
    print(PROMPT, end="", flush=True)
    mj.generate(
        model,
        [BOS, *tokenizer.encode(PROMPT)],
        max_new_tokens=200,
        temperature=0.5,
        top_p=0.9,
        seed=0,
        stop=(),
        stream=lambda chosen: print(stream.add(chosen[0]), end="", flush=True),
    )
    print(stream.finish())


def _plan():
    _title("The released model of 52 billion parameters, at its longest context")
    print(mj.budget(mj.preset("jamba-v0.1")))


def _title(text):
    sys.stdout.flush()
    print(f"\n{text}\n{'-' * len(text)}", flush=True)
