"""Recipes: what is read, what is refused, and what the messages carry."""

from __future__ import annotations

import pytest
import yaml

from dmae_ds.config.dense import DenseConfig
from dmae_ds.config.describe import ROOTS
from dmae_ds.config.evaluation import FinetuneConfig
from dmae_ds.config.load import dump_config, load_config
from dmae_ds.config.shipped import command_of, shipped_files
from dmae_ds.errors import UserError
from tests.messages import refused

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
def test_every_shipped_recipe_is_valid(name):
    config = load_config(name)
    reread = yaml.safe_load(dump_config(config))
    assert reread["run"]["dir"].startswith("runs/")


@pytest.mark.parametrize(
    "precision, dtype", [("fp32", "fp32"), ("bf16_autocast", "bf16"), ("bf16", "bf16"), ("fp16", "fp16")]
)
def test_the_teachers_dtype_follows_the_precision_unless_it_is_set(recipe, tmp_path, precision, dtype):
    for more in ([], ["teacher.dtype=auto"]):
        config = load_config(recipe, [f"precision={precision}", *more])
        assert config.teacher.dtype == dtype and config.teacher.dtype_is_auto
    # The run folder has what was chosen, and keeps it at another precision.
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "config.yaml")) == config
    later = load_config(str(tmp_path / "config.yaml"), ["precision=fp32"]).teacher
    assert later.dtype == dtype and not later.dtype_is_auto
    placed = config.teacher.model_copy(update={"placement": "zero3"})
    assert placed.dtype_is_auto  # what chooses a placement doesn't set the dtype
    for other in ("fp32", "bf16", "fp8"):
        assert (
            load_config(recipe, [f"precision={precision}", f"teacher.dtype={other}"]).teacher.dtype == other
        )


@pytest.mark.parametrize("name", shipped_files("evaluation recipe"))
def test_every_shipped_evaluation_recipe_is_valid(name):
    schema = ROOTS[f"dmae-ds {command_of(name)}"]
    overrides = ["run.dir=out", "weights=file", "network.name=vit_base_patch16_224", "data.train=train"]
    overrides += ["data.val=val"] if issubclass(schema, DenseConfig) else []
    overrides += ["distill.teacher=file"] if name.startswith(("supervised", "g2sd")) else []
    config = load_config(name, overrides, schema=schema, kind="evaluation recipe")
    assert schema.model_validate(yaml.safe_load(dump_config(config))) == config


def test_a_recipe_takes_what_it_does_not_give_from_below(recipe, tmp_path):
    below = {"optim": {"epochs": 7, "warmup_epochs": 1}, "data": {"train": "elsewhere", "flip": False}}
    config = load_config(recipe, ["optim.epochs=8"], below=below)
    assert (config.optim.epochs, config.optim.warmup_epochs) == (8, 1)
    assert (config.data.train, config.data.flip) == ("shards", False)


def test_an_evaluation_recipe_is_not_a_training_recipe():
    with refused("finetune_mae", "mae_vit_base"):
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
        ("objective.maskratio=0.9", ["objective.maskratio", "objective.mask_ratio?"]),
        ("objective.decoder.dept=2", ["objective.decoder.dept", "objective.decoder.depth?"]),
        ("stduent.name=x", ["stduent", "student?"]),
        ("teacher.weigths=x", ["teacher.weigths", "teacher.weights?"]),
        ("objective.mask_ratio=1", ["objective.mask_ratio", "found 1", "less than 1"]),
        ("objective.name=foo", ["objective.name", "'foo'", "'mae', 'dmae'"]),
        ("objective.head=mlp4", ["objective.head", "'mlp4'", "mlp2"]),
        ("objective.pairs=[]", ["objective.pairs", "[]"]),
        ("optim.base_lr=fast", ["optim.base_lr", "'fast'"]),
        ("optim.warmup_epochs=300", ["warmup_epochs", 300, "epochs", 100]),
        ("data.crop_scale=[.5, .2]", ["crop_scale", 0.5, 0.2]),
        ("data.train=null", ["data.train", None]),
        ("mask_ratio", ["'mask_ratio'", "key=value"]),
        ("run.dir.name=x", ["run.dir.name", "'dir'", "'somewhere'"]),
        ("objective.pairs=[[9, 18]", ["objective.pairs", "YAML"]),
        ("objective={name: mae, alpha: 2}", ["objective.alpha"]),  # an option of another objective
        ("teacher.format=mea", ["teacher.format", "'mea'", "mae?", "hf"]),
        ("teacher.pretrained=true", ["teacher.weights", "teacher.pretrained"]),
        (
            "teacher={name: vit_small_patch16_224, pretrained: true}",
            ["teacher.pretrained", "vit_small", "tag"],
        ),
        ("teacher={name: vit_x.mae, pretrained: true, format: hf}", ["teacher.pretrained", "hf", "timm"]),
        ("teacher.mean=[0, 0, 0]", ["teacher.mean", "teacher.std"]),
        ("teacher.stages=2", ["teacher.placement replicated", "teacher.stages 2"]),
        ("teacher.placement=pipeline", ["teacher.placement pipeline", "teacher.stages None"]),
        ("teacher.stats=file", ["teacher.stats", "teacher.standardize", "zscore", "none"]),
        ("data.buffer_gib=2", ["data.buffer_gib", "data.block"]),
        ("data.cache_gib=2", ["data.cache_gib", "data.cache_dir"]),
        ("data.shuffle_buffer=9", ["data.shuffle_buffer", "data.num_samples"]),
        ("data={train: x, num_samples: 9, repeat: 2}", ["data.repeat", "data.num_samples"]),
        ("eval.knn_k=9", ["eval.knn_k", "eval.knn_every"]),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(recipe, override, words):
    with refused(*words):
        load_config(recipe, [override])


def test_several_mistakes_are_a_line_each(recipe):
    with pytest.raises(UserError) as error:
        load_config(recipe, ["optim.base_lr=fast", "data.train=null", "stduent.name=x"])
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    for key in ("optim.base_lr", "data.train", "stduent"):
        assert sum(line.startswith(key) for line in lines) == 1


@pytest.mark.parametrize(
    "objective, has_teacher, accepted",
    [("mae", False, True), ("mae", True, False), ("dmae", True, True), ("dmae", False, False)],
)
def test_a_teacher_goes_with_an_objective_that_uses_it(recipe, objective, has_teacher, accepted):
    overrides = [f"objective={{name: {objective}}}", *([] if has_teacher else ["teacher=null"])]
    config = load_config(recipe, overrides)
    if accepted:
        config.check_teacher()
    else:
        with refused(f"objective {objective}", "teacher"):
            config.check_teacher()


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["distill.method=deit_hard"], ["deit_hard", "pool=cls"]),
        (["distill.method=logits"], ["logits", "temperature None"]),
        (["distill.method=features", "distill.temperature=2"], ["features", "temperature 2"]),
        (["optim.layer_decay=2"], ["optim.layer_decay", "found 2"]),
        (["augment.rand_augment=random"], ["augment.rand_augment", "'random'", "rand-m9-mstd0.5-inc1"]),
        (["format=mea"], ["format", "'mea'", "mae"]),
    ],
)
def test_a_mistake_in_an_evaluation_recipe_is_one_line(overrides, words):
    given = ["run.dir=out", "weights=file", "network.name=vit_base_patch16_224", "data.train=train"]
    if any(override.startswith("distill") for override in overrides):
        given.append("distill.teacher=file")
    with refused(*words):
        load_config("finetune_mae", [*given, *overrides], schema=FinetuneConfig, kind="evaluation recipe")


def test_a_key_given_twice_is_an_error(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text(RECIPE + "data: {train: other}\n")
    with refused("twice.yaml", "line", "'data'"):
        load_config(str(path))


def test_an_unknown_recipe_lists_the_shipped_ones():
    with refused("digits_dmea", "digits_dmae?", "dmae_vit_large_to_base"):
        load_config("digits_dmea")


TEXTS = [
    "exp #2",
    "2024-05-01",
    "2024-13-45",
    "off",
    "007",
    "1e5",
    "12:30:00",
    "0b_",
    "a: b",
    "[x",
    "*best",
    "&x",
    "!run",
    "~",
    "@home",
    "- x",
    "a=b",
    "'s",
    ".nan",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("key", ["run.dir", "teacher.weights", "deepspeed"])
def test_where_a_string_is_wanted_the_text_counts_as_it_stands(recipe, tmp_path, key, text):
    config = load_config(recipe, [f"{key}={text}"])
    place = config
    for name in key.split("."):
        place = getattr(place, name)
    assert place == text
    (tmp_path / "copy.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "copy.yaml")) == config


@pytest.mark.parametrize(
    "override, expected",
    [("run.dir='exp #2'", "exp #2"), ('run.dir="007"', "007"), ("run.dir=  exp \r", "exp")],
)
def test_quotes_and_white_space_around_a_text_are_not_part_of_it(recipe, override, expected):
    assert load_config(recipe, [override]).run.dir == expected


def test_null_removes_an_optional_text_and_is_refused_elsewhere(recipe):
    assert load_config(recipe, ["data.val=x", "data.val=null"]).data.val is None
    with refused("run.dir", "None"):
        load_config(recipe, ["run.dir=null"])
    with refused("objective.head", "'off'", "mlp2"):
        load_config(recipe, ["objective.head=off"])
    with refused("run.seed", 2**64):
        load_config(recipe, [f"run.seed={2**64}"])


def test_texts_inside_a_section_a_list_and_a_recipe_count_as_well(recipe, tmp_path):
    config = load_config(recipe, ["data={train: 2024-05-01, val: 007}", "run={dir: off}", "run.seed=007"])
    assert (config.data.train, config.data.val, config.run.dir) == ("2024-05-01", "007", "off")
    assert config.run.seed == 7
    with refused("log.trackers", "'off'", "tensorboard"):
        load_config(recipe, ["log.trackers=[off]"])
    path = tmp_path / "dates.yaml"
    path.write_text(RECIPE.replace("somewhere", "2024-05-01").replace("shards", "1e3"))
    config = load_config(str(path))
    assert (config.run.dir, config.data.train) == ("2024-05-01", "1e3")


def test_the_name_of_an_objective_decides_which_of_its_keys_are_strings(recipe):
    config = load_config(recipe, ["objective.head=mlp3", "objective={name: sdae}", "objective.folds=2"])
    assert (config.objective.name, config.objective.folds) == ("sdae", 2)
    own = ["objective={name: 'tests.train.toy:Toy'}", "run.dir=1_000"]
    assert load_config(recipe, own).run.dir == "1_000"


def test_a_recipe_that_is_not_utf_8_is_one_line(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("run: {dir: Größe}".encode("latin-1"))
    with refused("latin.yaml", "UTF-8"):
        load_config(str(path))
