"""The trained model of the repository is what its card says, is read by others, and has learned something."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minijamba import budget, data, generate, load
from minijamba.checkpoint import SHIPPED
from minijamba.evaluate import bits_per_byte, ngram_bits_per_byte
from minijamba.ngram import KneserNey
from minijamba.recipe import load_recipe
from minijamba.study import RECIPE
from minijamba.testing import assert_matches, assert_rejects
from minijamba.tokenizer import BOS, BPETokenizer

ROOT = Path(__file__).parent.parent
RECORD = json.loads((ROOT / "data" / "measurements" / "shipped_cuda.json").read_text(encoding="utf-8"))
PROMPT = "class Reader:\n    def __init__(self"


@pytest.fixture(scope="module")
def model():
    return load(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.load(SHIPPED)


@pytest.fixture(scope="module")
def library():
    """This machine's standard library. A part of a document follows from its name, so none held out was trained on."""
    return data.split(data.without_copies(data.standard_library()))


def test_it_is_a_small_real_jamba(model):
    config = model.config
    assert config.schedule == "m+ mE m+ mE A+ mE m+ mE" and config.num_experts == 8
    assert 8_000_000 < budget(config).total_params < 12_000_000
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 24_000_000
    assert len(list(SHIPPED.glob("*.safetensors"))) >= 2
    assert config.vocab_size == BPETokenizer.load(SHIPPED).vocab_size == 4096


def test_it_is_what_the_recipe_of_record_and_studies_makes(model):
    def check(recipe):
        assert replace(recipe.config(4096), dtype=model.config.dtype) == model.config
        assert json.loads(json.dumps(recipe.to_dict())) == RECORD["recipe"]

    check(load_recipe(RECIPE))
    assert_rejects(check, *(load_recipe(RECIPE, [change]) for change in ("model.intermediate_size=200", "seed=1")))


def test_transformers_gives_the_same_logits_and_tokens(model, tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    text = PROMPT + ', path, mode="r"):\n        """Reads 1984 files."""\n        self.path = path\n'
    ids = tokenizer.encode(text)
    assert AutoTokenizer.from_pretrained(SHIPPED)(text).input_ids == ids
    tokens = torch.tensor([[BOS, *ids]])
    with torch.no_grad():
        expected = theirs(tokens).logits
        # float32, eight layers of sums of hundreds of terms
        assert_matches(model(tokens), expected, 1e-5, "logits")
        shuffled = tokens.flip(1)
        assert_rejects(lambda variant: assert_matches(model(variant), expected, 1e-5), shuffled)


def test_it_predicts_new_text_better_than_counting(model, tokenizer, library):
    """Than a 5-gram model that has read all of this machine's library but what is held out."""
    new = {name: text for name, text in data.texts(library["held_out"]).items() if len(text) < 8000}
    assert len(new) >= 8
    ngram = KneserNey.fit(data.token_stream(library["train"], tokenizer), tokenizer.vocab_size)
    counted = ngram_bits_per_byte(ngram, tokenizer, new).bits_per_byte
    assert bits_per_byte(model, tokenizer, new).bits_per_byte < 0.8 * counted
    untrained = type(model)(model.config).eval()
    assert bits_per_byte(untrained, tokenizer, new).bits_per_byte > 2 * counted


def test_it_writes_python(model, tokenizer):
    """Lines of the form of Python's, with their indentation, and its words."""
    new = generate(
        model, [[BOS, *tokenizer.encode(PROMPT)]] * 4, max_new_tokens=100, temperature=0.5, top_p=0.9, seed=0, stop=()
    )
    text = "\n".join(PROMPT + tokenizer.decode(row.tolist()) for row in new)
    lines = [line for line in text.splitlines() if line.strip()]
    assert sum(line.startswith("    ") for line in lines) > 0.5 * len(lines)
    words = re.findall(r"[a-z]{3,}", text)
    frequent = {"return", "def", "self", "the", "for", "not", "and", "file"}
    assert sum(word in frequent for word in words) > 0.1 * len(words)


@pytest.mark.parametrize("quantize", [None, "int8-all"])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}], ids=["greedy", "without repetitions"])
def test_a_recorded_step_writes_the_text_of_the_plain_loop(tokenizer, quantize, options):
    """512 tokens in bfloat16 on a GPU. Without one, both are the loop, and the text is short."""
    on_gpu = torch.cuda.is_available()
    device, dtype, new = ("cuda", "bfloat16", 512) if on_gpu else ("cpu", "float32", 64)
    trained = load(device=device, dtype=dtype, quantize=quantize)
    prompts = [[BOS, *tokenizer.encode(text)] for text in (PROMPT, "import os\n\n\ndef", "#")]

    settings = {"max_new_tokens": new, "stop": ()} | options
    loop = generate(trained, prompts, graph=False, **settings)

    def check(texts):
        assert torch.equal(texts, loop)

    texts = generate(trained, prompts, **settings)
    check(texts)
    assert min(len(row.unique()) for row in texts) > (100 if on_gpu and options else 8)
    assert_rejects(check, texts.roll(1, 0), texts.roll(1, 1))


def test_the_card_says_what_the_record_says(model):
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")

    def check(record):
        table = budget(model.config)
        parts, scores = record["corpus"]["parts"], {row["model"]: row["bits_per_byte"] for row in record["rows"]}
        losses = [row["loss"] for row in record["validation"]]
        for said in (
            *(f"{parts[part]['documents']:,} documents, {parts[part]['bytes']:,} bytes" for part in data.PARTS),
            *(parts[part]["sha256"] for part in data.PARTS),
            f"**{scores['model']:.3f} bits a byte**", f"**{scores['5-gram']:.3f}**",
            f"lowest after {[row['step'] for row in record['validation']][losses.index(min(losses))]:.0f} steps",
            f"{min(losses):.3f} nats a token, and {losses[-1]:.3f} at the end",
            f"{record['device']}, {record['training_seconds']} seconds", record["commit"],
            f"{table.total_params:,} parameters, of which a token uses {table.active_params:,}",
        ):  # fmt: skip
            assert said in card, said

    check(RECORD)
    assert_rejects(check, RECORD | {"training_seconds": 3}, RECORD | {"device": "another"})
    assert {row["model"]: row["bits_per_byte"] for row in RECORD["rows"]}["model"] < 1.0
