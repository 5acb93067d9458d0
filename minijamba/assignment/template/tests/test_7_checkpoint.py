"""Part 7: a trained checkpoint in your model."""

import ast
import sys
from functools import cache
from pathlib import Path

import adapters
import torch
from judge import CHECKPOINT, EXACT, in_pieces, points, released

import minijamba as mj
from minijamba.testing import assert_matches
from minijamba.tokenizer import BOS, load_tokenizer

TEXT = "class Reader:\n    def __init__(self, path):\n        self."
ALLOWED = {"torch", "einops", "safetensors", "my_jamba"} | sys.stdlib_module_names


@cache
def prompt():
    return torch.tensor([[BOS, *load_tokenizer(CHECKPOINT).encode(TEXT)]])


@cache
def reference(dtype):
    return mj.load(CHECKPOINT, device="cpu", dtype=dtype)


@points(3)
def test_every_weight_is_loaded():
    yours = dict(adapters.load(CHECKPOINT).named_parameters())
    stored = released(reference("float32"))
    missing, more = sorted(stored.keys() - yours.keys()), sorted(yours.keys() - stored.keys())
    assert not missing and not more, f"released names that your model lacks: {missing}; that are unknown: {more}"
    different = [name for name in stored if yours[name].shape != stored[name].shape]
    assert not different, f"shapes differ from the file's: {different}"
    different = [name for name in stored if not torch.equal(yours[name].float(), stored[name])]
    assert not different, f"values differ from the file's, perhaps the random ones are still there: {different}"
    narrow = [name for name, weight in yours.items() if weight.dtype != torch.float32]
    assert not narrow, f"weights are not float32: {narrow}"


@points(3)
@torch.no_grad()
def test_values_of_the_logits():
    own, trace = reference("float64"), mj.Trace()
    expected = own(prompt(), trace=trace)
    wrong = {
        "final_layernorm is left out": own.lm_head(trace.hidden[-1]),
        "the last layer is left out": own.lm_head(own.model.final_layernorm(trace.hidden[-2])),
        "lm_head is left out": own.model.final_layernorm(trace.hidden[-1]),
    }
    yours = adapters.load(CHECKPOINT)
    # float32, eight layers of sums of hundreds of terms
    assert_matches(yours(prompt(), None)[0], reference("float32")(prompt()), 1e-4, "logits in float32", wrong)
    assert_matches(yours.double()(prompt(), None)[0], expected, EXACT, "logits in float64", wrong)


@points(2)
@torch.no_grad()
def test_any_split_gives_the_same_logits():
    yours, t = adapters.load(CHECKPOINT).double(), prompt().shape[1]
    expected = reference("float64")(prompt())
    lengths = [5, 1, t - 6]
    alone = torch.cat([reference("float64")(piece) for piece in prompt().split(lengths, dim=1)], dim=1)
    wrong = {"the caches are forgotten between calls: one for each layer, returned and given back": alone}
    assert_matches(in_pieces(yours, prompt(), lengths), expected, EXACT, f"logits in pieces of {lengths}", wrong)


@points(1)
@torch.no_grad()
def test_it_writes_the_same_text_reading_each_token_once():
    yours, new, read = adapters.load(CHECKPOINT), 12, []
    yours.get_submodule("model.embed_tokens").register_forward_pre_hook(lambda _, given: read.append(given[0].shape[1]))
    found = adapters.greedy(yours, prompt(), new)
    expected = mj.generate(reference("float32"), prompt(), max_new_tokens=new, stop=())
    wrong = {
        "the prompt is returned, too: return the new tokens alone": torch.cat([prompt(), expected], dim=1),
        "each token is chosen after the first of the call: take the logits of the last, logits[:, -1]":
            reference("float32")(prompt())[:, :1].argmax(-1).expand(-1, new),
    }  # fmt: skip
    assert_matches(found, expected, 0, "text", wrong)
    needed = prompt().shape[1] + new
    assert sum(read) <= needed, (
        f"your model reads {sum(read)} tokens for {new} new ones: with the cache it needs {needed}"
    )


@points(1)
def test_the_model_is_your_own():
    module = sys.modules[type(adapters.load(CHECKPOINT)).__module__]
    for file in Path(module.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            others = {name.split(".")[0] for name in names} - ALLOWED
            assert not others, f"{file.name} imports {sorted(others)}: minijamba is the judge, write the model yourself"
