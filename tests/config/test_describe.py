"""`dmae-ds recipes`: every recipe has a line, every key a default and a comment, and both can be searched."""

from __future__ import annotations

import pytest

from dmae_ds.config.data import DataConfig
from dmae_ds.config.describe import ROOTS, all_keys, comment_of, keys_of
from dmae_ds.config.load import load_config
from dmae_ds.config.objectives import DinoConfig
from dmae_ds.config.run import OptimConfig, RunConfig
from dmae_ds.config.shipped import recipe_list, recipe_text, shipped_files, shipped_objectives
from tests.messages import refused

SCHEMAS = [RunConfig, *ROOTS.values(), *shipped_objectives().values()]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_every_key_is_explained(schema):
    assert not [key.name for key in keys_of(schema) if not (key.comment or key.choices)]


def test_comments_stand_behind_a_key_or_above_it():
    assert comment_of(OptimConfig, "clip_grad").startswith("limit of the global gradient norm")
    above = comment_of(DataConfig, "repeat")
    assert above.startswith("Crops of an image") and above.endswith("every fourth epoch.")
    assert comment_of(ROOTS["dmae-ds eval finetune"].model_fields["optim"].annotation, "base_lr")


def test_a_line_has_the_key_its_default_and_its_choices():
    keys = {key.name: key for key in keys_of(OptimConfig, "optim.")}
    assert str(keys["optim.clip_grad"]).startswith("optim.clip_grad = 0.0  # ")
    assert str(keys["optim.betas"]).startswith("optim.betas = [0.9, 0.95]  # ")
    lines = all_keys().splitlines()
    assert any(line.startswith("run.dir = (required)") for line in lines)
    assert any(line.startswith("precision = fp32  # one of fp32, bf16") for line in lines)
    assert any(line.startswith("objective.distill = null") for line in lines)
    # Sections that an evaluation shares with training stand there once.
    assert sum(line.startswith("data.train = ") for line in lines) == 2  # of training, of dense tasks
    assert any("head.name=linear:" in line for line in lines) and "head.channels = 768" in all_keys("head.")
    assert sum(line.startswith("optim.base_lr = ") for line in lines) == 3
    for name in shipped_objectives():
        assert any(line.startswith("# ") and f"objective.name={name}:" in line for line in lines)
    assert "name" not in {key.name for key in keys_of(DinoConfig)}


def test_the_keys_can_be_searched():
    lines = [line for line in all_keys("KNN").splitlines() if line and not line.startswith("#")]
    assert len(lines) >= 4 and all("knn" in line.lower() for line in lines)
    with refused("no_such_word"):
        all_keys("no_such_word")


def test_every_recipe_is_listed_with_a_sentence_and_can_be_shown():
    lines = [line.strip().split("  ", 1) for line in recipe_list().splitlines() if line.startswith("  ")]
    sentences = {name: text.strip() for name, text in lines}
    recipes = shipped_files("recipe")
    assert set(sentences) == {*recipes, *shipped_files("evaluation recipe")}
    assert all(len(text) > 20 for text in sentences.values())
    assert recipe_text("finetune_mae").startswith("# ")
    assert recipe_text("digits_mae") == recipes["digits_mae"].read_text().rstrip("\n")
    assert load_config("digits_mae").objective.name == "mae"
    with refused("digits_mea", "digits_mae"):
        recipe_text("digits_mea")
