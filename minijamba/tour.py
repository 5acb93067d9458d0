"""`minijamba tour`: the shipped Jamba counted, proved, writing and learning, in three minutes on two cores."""

import copy
import math
import sys
from pathlib import Path

import numpy as np
import torch

import minijamba as mj

from . import data
from .attention import attention
from .checkpoint import SHIPPED
from .conv import causal_conv
from .evaluate import bits_per_byte
from .moe import mixture, route
from .tokenizer import BOS, load_tokenizer
from .train import train

BATCH, LENGTH = 4, 128  # sequences a step, tokens a sequence
LEARNING_RATE = 1e-3
PROMPTS = (
    "class Reader:\n    def __init__(self",
    'def mean(values):\n    """Return the',
)


def tour(seconds=45):
    """Prints the whole tour; `seconds` is the length of the training.

    Raises: AssertionError if two rungs differ, or if the training does not lower the loss.
    """
    threads = torch.get_num_threads()
    # Tensors this small gain little from a second thread, and lose much where it has to wait for other programs.
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        model, tokenizer = _load(), load_tokenizer(SHIPPED)
        _prove(model)
        _write(model, tokenizer)
        _train(model, tokenizer, seconds)
        _plan()
    finally:
        torch.set_num_threads(threads)
    print("\nNext: minijamba lab opens the notebooks; begin with 00_map.ipynb, the same model from the inside.")


def _load():
    _title("A small Jamba, trained on the source of Python and some packages")
    model = mj.load(device="cpu", dtype="float32")
    table = mj.budget(model.config)
    print(f"layers: {model.config.schedule}")
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


def _write(model, tokenizer):
    _title("What it writes, a token at a time")
    for prompt in PROMPTS:
        stream = tokenizer.stream()
        print(prompt, end="", flush=True)
        mj.generate(
            model,
            [BOS, *tokenizer.encode(prompt)],
            max_new_tokens=100,
            temperature=0.7,
            top_p=0.9,
            seed=4,
            stop=(),
            stream=lambda chosen, stream=stream: print(stream.add(chosen[0]), end="", flush=True),
        )
        print(stream.finish() + "\n")


def _train(model, tokenizer, seconds):
    _title(f"{seconds:g} seconds more, on a text it has never seen: the source of this package")
    parts = data.split(data.text_folder(Path(__file__).parent, (".py",)))
    held_out = data.texts(parts["validation"] | parts["held_out"])
    tokens = data.token_stream(parts["train"], tokenizer)
    before = bits_per_byte(model, tokenizer, held_out).bits_per_byte
    history = train(
        model, data.Windows(tokens, BATCH, LENGTH), seconds=seconds, learning_rate=LEARNING_RATE, weight_decay=0.0
    )
    model.eval()
    after = bits_per_byte(model, tokenizer, held_out).bits_per_byte
    print(f"{len(tokens):,} tokens of {len(parts['train'])} files; {len(history)} steps of {BATCH} x {LENGTH} tokens")
    print(f"\nbits a byte, on {len(held_out)} files held out: {', '.join(held_out)}")
    print(f"{'bytes all alike':<40} {math.log2(256):.2f}")
    print(f"{'knowing how frequent each token is':<40} {unigram_bits(tokens, tokenizer, held_out):.2f}")
    print(f"{'this model before':<40} {before:.2f}")
    print(f"{'this model after':<40} {after:.2f}")
    assert after < before, f"training raised the loss from {before} to {after} bits a byte"


def unigram_bits(tokens, tokenizer, documents):
    """Bits a byte for a model that knows each token's frequency and nothing else.

    Every count is one too high, so that no token is impossible.
    """
    counts = np.bincount(tokens, minlength=tokenizer.vocab_size) + 1.0
    bits = -np.log2(counts / counts.sum())
    coded = [bits[tokenizer.encode(text)].sum() for text in documents.values()]
    return sum(coded) / sum(len(text.encode()) for text in documents.values())


def _plan():
    _title("The released model of 52 billion parameters, at its longest context")
    print(mj.budget(mj.preset("jamba-v0.1")))


def _title(text):
    sys.stdout.flush()
    print(f"\n{text}\n{'-' * len(text)}", flush=True)
