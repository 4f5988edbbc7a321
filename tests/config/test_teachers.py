"""Several teachers in a recipe: sections know their names, taps their teachers, and no teacher is idle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dmae_ds.config.describe import all_keys
from dmae_ds.config.load import dump_config, load_config, read_saved_config
from dmae_ds.config.saved import FILE
from dmae_ds.config.teachers import split_name, taps_of, with_name
from tests.messages import refused

TEACHERS = "teachers={b: {name: vit_tiny_patch16_224, weights: 007}, a: {name: vit_small, weights: own/a}}"
TARGETS = 'objective.targets=[{tap: "a:tokens"}, {tap: "a:cls", student: cls}, {tap: "b:block/3"}]'
SEVERAL = ["teacher=null", TEACHERS, TARGETS]


def test_one_teacher_is_unnamed_and_several_are_in_one_order():
    one = load_config("digits_features")
    assert one.named_teachers() == {"": one.teacher}
    assert one.teacher.key("weights") == "teacher.weights"
    assert load_config("digits_mae").named_teachers() == {}
    config = load_config("digits_features", [*SEVERAL, "teachers.a.weight=0.5"])
    config.check_teacher()
    teachers = config.named_teachers()
    assert list(teachers) == ["a", "b"] and config.teacher is None
    assert teachers["b"].key("weights") == "teachers.b.weights"
    # A string where the schema wants one; weights of terms.
    assert teachers["b"].weights == "007" and (teachers["a"].weight, teachers["b"].weight) == (0.5, 1)
    copied = config.with_teachers({name: each.following("bf16") for name, each in teachers.items()})
    assert [each.dtype for each in copied.named_teachers().values()] == ["bf16", "bf16"]
    assert copied.teachers["a"].section == "teachers.a"


def test_each_dtype_follows_the_precision_unless_it_is_set():
    config = load_config("digits_features", [*SEVERAL, "teachers.a.dtype=fp16", "precision=bf16_autocast"])
    assert {name: each.dtype for name, each in config.named_teachers().items()} == {"a": "fp16", "b": "bf16"}
    assert [each.dtype_is_auto for each in config.named_teachers().values()] == [False, True]


def test_a_saved_recipe_is_the_same_and_its_paths_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config("digits_features", [*SEVERAL, "teachers.a.weights=a.safetensors"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "config.yaml")) == config
    Path("start").mkdir()
    (tmp_path / FILE).write_text(json.dumps({"environment": {"folder": str(tmp_path / "start")}}) + "\n")
    saved = read_saved_config(tmp_path)
    assert saved.teachers["a"].weights == str(tmp_path / "start/a.safetensors")
    assert saved.teachers["a"].key("stats") == "teachers.a.stats"


def test_names_of_taps():
    assert split_name("dino:block/18") == ("dino", "block/18") and split_name("tokens") == ("", "tokens")
    assert with_name("dino", "cls") == "dino:cls" and with_name("", "cls") == "cls"
    assert taps_of("a", ["a:tokens", "b:cls", "a:cls"]) == ("tokens", "cls")
    assert taps_of("", ["block/9"]) == ("block/9",)


@pytest.mark.parametrize(
    "overrides, words",
    [
        ([TEACHERS], ["teacher", "teachers"]),
        (["teachers.a.weights=x"], ["teacher and teachers", "teachers.NAME.KEY", "teacher=null"]),
        ([*SEVERAL, "teacher.weights=x"], ["teacher and teachers (b, a)", "teachers.NAME.KEY"]),
        ([*SEVERAL, "teachers.c.weights=x"], ["teachers.c.name", "b, a"]),
        ([*SEVERAL, "teachers.a.weight=0", "teachers.b.weight=0"], ["weight 0", "b, a"]),
        (["objective.targets=[{tap: ':tokens'}]"], ["':tokens'", "block/9"]),
        (["teacher=null", "teachers={}"], ["teachers", "empty"]),
        ([*SEVERAL, "teachers.C={name: x, weights: y}"], ["teachers", "'C'"]),
        ([*SEVERAL, "teachers.c={name: x, weights: y}"], ["teachers.c"]),
        ([*SEVERAL[:2]], ["'cls'", "a, b", "NAME:cls"]),
        ([*SEVERAL[:2], "objective.targets=[{tap: 'c:cls', student: cls}]"], ["'c:cls'", "'c'", "a, b"]),
        (["objective.targets=[{tap: 'a:tokens'}]"], ["'a:tokens'", "'tokens'"]),
        ([*SEVERAL[:2], "objective.targets=[{tap: 'a:blocks/3'}]"], ["'a:blocks/3'", "block/9"]),
        ([*SEVERAL, "objective={name: mae}"], ["mae", "teacher"]),
        ([*SEVERAL, "objective={name: dmae}"], ["dmae", "a, b", "features"]),
        ([*SEVERAL, "teachers.a.placement=pipeline"], ["teachers.a.placement", "teachers.a.stages None"]),
        ([*SEVERAL, "teachers.a.stagez=2"], ["teachers.a.stagez", "teachers.a.stages?"]),
        ([*SEVERAL, "teachers.b.weights=s3://bucket/b.pth"], ["teachers.b.weights", "s3://"]),
        ([*SEVERAL, "teachers.b.in_chans=1"], ["teachers.b.in_chans", "student.in_chans 3"]),
    ],
)
def test_a_mistake_is_one_line_that_names_the_teacher(overrides, words):
    with refused(*words):
        load_config("digits_features", overrides).check_teacher()


def test_a_licence_may_be_an_address_and_the_warning_names_the_teacher():
    seen = [*SEVERAL, "teachers.a.name=vit_dino", "objective.mask={ratio: 0.5, by: drop}"]
    config = load_config("digits_features", [*seen, "teachers.a.license=https://example.org/licence"])
    assert "teachers.a.sees" in config.teacher_warning() and "teachers.b" not in config.teacher_warning()
    assert load_config("digits_features", [*seen, "teachers.a.sees=all"]).teacher_warning() is None


def test_only_the_keys_that_one_teacher_has_not_are_listed():
    lines = [line for line in all_keys("teachers.").splitlines() if line.startswith("teachers.")]
    assert [line.split()[0] for line in lines] == ["teachers.NAME.weight"]
