"""Recipes: what is read, what is refused, and in which words."""

from __future__ import annotations

import pytest
import yaml

from dmae_ds.config.evaluation import FinetuneConfig, LinearConfig
from dmae_ds.config.load import dump_config, load_config
from dmae_ds.config.shipped import shipped_files
from dmae_ds.errors import UserError

RECIPE = """
run: {dir: somewhere}
student: {name: vit_base_patch16_224}
teacher: {name: vit_large_patch16_224, weights: teacher.pth}
objective: {name: dmae, pairs: [[9, 18]]}
data: {train: shards}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return str(path)


@pytest.mark.parametrize("name", shipped_files("recipe"))
def test_every_shipped_recipe_is_valid_and_holds_no_more_than_it_must(name):
    config = load_config(name)
    reread = yaml.safe_load(dump_config(config))
    assert reread["run"]["dir"].startswith("runs/")


@pytest.mark.parametrize("name", shipped_files("evaluation recipe"))
def test_every_shipped_evaluation_recipe_is_valid(name):
    schema = LinearConfig if name.startswith("linear") else FinetuneConfig
    overrides = ["run.dir=out", "weights=file", "network.name=vit_base_patch16_224", "data.train=train"]
    overrides += ["distill.teacher=file"] if name.startswith("supervised") else []
    config = load_config(name, overrides, schema=schema, kind="evaluation recipe")
    assert schema.model_validate(yaml.safe_load(dump_config(config))) == config


def test_a_recipe_lies_over_what_is_below_it(recipe, tmp_path):
    below = {"optim": {"epochs": 7, "warmup_epochs": 1}, "data": {"train": "elsewhere", "flip": False}}
    config = load_config(recipe, ["optim.epochs=8"], below=below)
    assert (config.optim.epochs, config.optim.warmup_epochs, config.data.train, config.data.flip) == (
        8,
        1,
        "shards",
        False,
    )


def test_a_recipe_of_an_evaluation_is_none_of_training():
    with pytest.raises(UserError, match="recipe 'finetune_mae' is neither a file nor a shipped name"):
        load_config("finetune_mae")


def test_the_paper_and_the_published_code_differ_where_they_are_known_to():
    paper, code = (
        load_config("dmae_vit_large_to_base").objective,
        load_config("dmae_published_code").objective,
    )
    assert (paper.head, paper.normalize, paper.patch_count) == ("mlp2", "none", "round")
    assert (code.head, code.normalize, code.patch_count) == ("linear", "l2", "int")
    assert (paper.distance, paper.alpha, paper.decoder.depth, paper.mask_ratio) == ("l1", 1.0, 8, 0.75)


def test_dumped_config_reads_back_equal(recipe, tmp_path):
    config = load_config(recipe, ["objective.mask_ratio=0.9", "checkpoint.every_steps=7"])
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(str(copy)) == config


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "1E-3", ".001"])
def test_every_spelling_of_a_number_is_a_number(recipe, text):
    assert load_config(recipe, [f"optim.base_lr={text}"]).optim.base_lr == 0.001


def test_an_override_makes_the_section_it_needs(recipe):
    config = load_config(
        recipe,
        ["checkpoint.every_steps=7", "objective.decoder.depth=2", "objective.pairs=[[6, 12], [12, 24]]"],
    )
    assert (config.checkpoint.every_steps, config.objective.decoder.depth) == (7, 2)
    assert config.objective.pairs == [(6, 12), (12, 24)]


@pytest.mark.parametrize(
    "override, words",
    [
        ("objective.maskratio=0.9", "objective.maskratio is unknown; did you mean objective.mask_ratio?"),
        ("objective.decoder.dept=2", "did you mean objective.decoder.depth?"),
        ("stduent.name=x", "stduent is unknown; did you mean student?"),
        ("teacher.weigths=x", "did you mean teacher.weights?"),
        ("objective.mask_ratio=1", "objective.mask_ratio: found 1; input should be less than 1"),
        ("objective.name=foo", "objective.name 'foo': choose 'mae', 'dmae'"),
        ("objective.head=mlp4", "objective.head: found 'mlp4'"),
        ("objective.pairs=[]", "objective.pairs: found []"),
        ("optim.base_lr=fast", "optim.base_lr: found 'fast'"),
        ("optim.warmup_epochs=300", "warmup_epochs 300 is not below epochs 100"),
        ("data.crop_scale=[.5, .2]", "is not a range"),
        ("data.train=null", "data.train: found None"),
        ("mask_ratio", "is not an override; write key=value"),
        ("run.dir.name=x", "'dir' is 'somewhere', not a section"),
        ("objective.pairs=[[9, 18]", "override objective.pairs"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(recipe, override, words):
    with pytest.raises(UserError) as caught:
        load_config(recipe, [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_objective_refuses_the_options_of_another(recipe):
    with pytest.raises(UserError, match="objective.alpha is unknown"):
        load_config(recipe, ["objective={name: mae, alpha: 2}"])


def test_a_key_given_twice_is_an_error(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text(RECIPE + "data: {train: other}\n")
    with pytest.raises(UserError, match="key 'data' stands twice"):
        load_config(str(path))


def test_an_unknown_recipe_lists_the_shipped_ones():
    with pytest.raises(UserError, match="did you mean digits_dmae.*dmae_vit_large_to_base"):
        load_config("digits_dmea")
