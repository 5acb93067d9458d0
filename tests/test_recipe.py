"""A recipe says all of a run, and a wrong entry is named together with the right one."""

import json
from pathlib import Path

import pytest

from minijamba import budget
from minijamba.recipe import load_recipe, recipe_from_dict
from minijamba.tokenizer import BOS, EOS, PAD

SHIPPED = sorted((Path(__file__).parent.parent / "data" / "recipes").glob("*.toml"))
TABLES = {"model": {"preset": "tiny"}, "data": {"folder": "texts"}}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_are_whole(path):
    recipe = load_recipe(path)
    assert budget(recipe.config(recipe.data.vocab_size)).total_params > 100_000
    assert json.loads(json.dumps(recipe.to_dict()))["train"]["steps"] == recipe.train.steps


def test_defaults_changes_and_relative_folders(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text('[model]\npreset = "tiny"\nnum_experts = 2\n[data]\nfolder = "texts"\n[train]\nsteps = 7\n')
    recipe = load_recipe(file, ["train.batch=4", "log.prompt=class A", "model.num_experts=1", "seed=3"])
    assert (recipe.train.steps, recipe.train.batch, recipe.train.length, recipe.seed) == (7, 4, 256, 3)
    assert recipe.log.prompt == "class A" and recipe.data.folder == str(tmp_path / "texts")
    config = recipe.config(300)
    assert config.num_experts == 1 and config.vocab_size == 300


@pytest.mark.parametrize("name", ["tiny", "mamba-130m", "blackmamba-1.5b", "llama-2-7b"])
def test_the_tokenizer_of_a_run_is_ours_whatever_the_preset(name):
    """Documents begin with <bos> and end with <eos>, and the written config.json must say so."""
    tables = {**TABLES, "model": {"preset": name}}
    config = recipe_from_dict(tables).config(512)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (BOS, EOS, PAD)
    own = recipe_from_dict({**TABLES, "model": {"preset": name, "eos_token_id": 7}}).config(512)
    assert own.eos_token_id == 7


WRONG = {
    "train.stesp=3": "no entry train.stesp: did you mean train.steps?",
    "modle.preset=tiny": "no entry modle: did you mean model?",
    "model.hiden_size=3": "no entry model.hiden_size: did you mean model.hidden_size?",
    "train.steps=0": "train.steps is 0, but must be at least 1",
    "train.steps=many": "train.steps is 'many', but must be int",
    "train.bfloat16=1": "train.bfloat16 is 1, but must be bool",
    "train.accumulate=3": "train.batch 16 is not a multiple of train.accumulate 3",
    "train.warmup=1.5": "train.warmup is 1.5",
    "train.learning_rate=0": "must be above 0",
    "model.num_experts=0": "num_experts is 0",
    "model.preset=huge": "no preset is called 'huge'",
    "model.checkpoint=here": "either a preset or a checkpoint",
    "data.task=needle": "must name one source.*names 2",
    "train.steps": "'train.steps' is no change: write it as train.steps=100",
}


@pytest.mark.parametrize("change", WRONG)
def test_wrong_entries_are_named(tmp_path, change):
    file = tmp_path / "recipe.toml"
    file.write_text('[model]\npreset = "tiny"\n[data]\nfolder = "texts"\n')
    load_recipe(file)
    with pytest.raises(ValueError, match=f"recipe.toml: .*{WRONG[change]}"):
        load_recipe(file, [change])


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="absent.toml does not exist: give a recipe"):
        load_recipe(tmp_path / "absent.toml")
    (tmp_path / "broken.toml").write_text("[model\n")
    with pytest.raises(ValueError, match="broken.toml is not TOML"):
        load_recipe(tmp_path / "broken.toml")


def test_a_recipe_without_text_is_refused():
    with pytest.raises(ValueError, match="must name one source.*names 0"):
        recipe_from_dict({"model": {"preset": "tiny"}})


def test_a_checkpoint_brings_its_own_sizes():
    assert recipe_from_dict(TABLES | {"model": {"checkpoint": "there"}}).model["checkpoint"].endswith("/there")
    with pytest.raises(ValueError, match="leave the others out"):
        recipe_from_dict(TABLES | {"model": {"checkpoint": "there", "num_experts": 2}})


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused():
    recipe = recipe_from_dict(TABLES | {"model": {"preset": "tiny", "vocab_size": 300}})
    assert recipe.config(259).vocab_size == 300
    with pytest.raises(ValueError, match="model.vocab_size 300 is below the tokenizer's 400: leave it out"):
        recipe.config(400)
