"""Several students in a recipe: their sections, the recipe of each alone, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmae_ds.config.batch import group_size, split_recipe
from dmae_ds.config.describe import all_keys
from dmae_ds.config.family import check_one_student, members_of, name_of_part, student_names
from dmae_ds.config.features import FeaturesConfig
from dmae_ds.config.load import dump_config, load_config, read_saved_config, student_folders
from tests.messages import refused

NET = "name: vit_tiny_patch16_224, img_size: 32, patch_size: 4"
FAMILY = [
    "student=null",
    f"students={{b: {{{NET}, weights: 007}}, a: {{{NET}, objective: {{name: mae}}}}}}",
]


def test_each_member_is_a_recipe_of_its_own():
    config = load_config("digits_dmae", [*FAMILY, "students.b.depth=3", "run.dir=RUNS"])
    b, a = members_of(config).values()
    assert list(members_of(config)) == ["b", "a"]  # in the recipe's order
    assert (b.student.depth, b.student.weights, b.objective.name) == (3, "007", "dmae")
    assert b.teacher == config.teacher and a.teacher is None and a.objective.name == "mae"
    assert Path(a.run.dir) == Path("RUNS/a") and a.students is None and "objective" not in dict(a.student)
    assert load_config("digits_dmae").students is None
    one = load_config("digits_dmae")
    assert members_of(one) == {"": one} and student_names(one) == one.student.name
    assert student_names(config) == "b vit_tiny_patch16_224, a vit_tiny_patch16_224"
    check_one_student(one, "bench save")
    with refused("bench save", "b, a"):
        check_one_student(config, "bench save")


def test_a_member_has_the_teachers_that_it_taps(monkeypatch):
    teachers = "teachers={x: {name: vit_tiny, weights: x}, y: {name: vit_tiny, weights: y}}"
    term = "objective: {name: features, targets: [{tap: '%s:tokens'}]}"
    students = f"students={{one: {{{NET}, {term % 'x'}}}, two: {{{NET}, {term % 'y'}}}}}"
    recipe = ["student=null", "objective=null", "teacher=null", teachers, students]
    config = load_config("digits_features", recipe)
    config.check_teacher()
    assert [list(member.teachers) for member in members_of(config).values()] == [["x"], ["y"]]
    with monkeypatch.context() as patch:  # an objective whose module alone knows its taps
        patch.setattr(FeaturesConfig, "tapped", ())
        assert [list(member.teachers) for member in members_of(config).values()] == [["x", "y"]] * 2
    config = load_config(
        "digits_features", [*recipe, "students.two.objective.targets=[{tap: 'x:cls', student: cls}]"]
    )
    with refused("teachers.y"):
        config.check_teacher()


def test_a_member_can_be_written_and_read_again(tmp_path):
    config = load_config("digits_dmae", [*FAMILY, f"run.dir={tmp_path}"])
    for name, member in {**members_of(config), "": config}.items():
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.yaml").write_text(dump_config(member))
    assert load_config(str(tmp_path / "config.yaml")) == config
    assert read_saved_config(tmp_path / "a").student == members_of(config)["a"].student
    assert student_folders(tmp_path) == [tmp_path / "b", tmp_path / "a"]
    assert student_folders(tmp_path / "a") == [tmp_path / "a"]
    with refused(tmp_path, tmp_path / "a", tmp_path / "b"):
        read_saved_config(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["student=null"], ["student"]),
        ([FAMILY[1]], ["student", "students"]),
        ([*FAMILY, "student.depth=2"], ["student and students (b, a)", "students.NAME.KEY", "student=null"]),
        (["students.b.depth=2"], ["student and students (b)", "students=null"]),
        ([*FAMILY, "students.c.depth=2"], ["students.c.name", "b, a"]),
        (["student=null", "students={}"], ["students", "empty"]),
        (["student=null", f"students={{A: {{{NET}}}}}"], ["students", "'A'"]),
        (["student=null", f"students={{checkpoints: {{{NET}}}}}"], ["students", "'checkpoints'"]),
        ([*FAMILY, "students.b.objective={name: mae}"], ["objective", "students"]),
        ([*FAMILY, "objective=null"], ["students.b.objective"]),
        ([*FAMILY, "students.b.dept=3"], ["students.b.dept", "students.b.depth"]),
        ([*FAMILY, "students.a.objective.mask_rati=0.5"], ["students.a.objective.mask_ratio"]),
        ([*FAMILY, "students.a.depth=0"], ["students.a.depth", "0"]),
        ([*FAMILY, "students.a.objective={name: adapt}"], ["adapt", "students.a.weights"]),
        ([*FAMILY, "students.a.in_chans=1"], ["students.a.in_chans"]),
        (["objective=null"], ["objective"]),
    ],
)
def test_a_mistake_is_one_line_with_its_key(overrides, words):
    with refused(*words):
        load_config("digits_dmae", overrides)


def test_what_all_members_need_together():
    config = load_config("digits_dmae", [*FAMILY, "teacher=null"])
    with refused("dmae", "teacher"):
        config.check_teacher()
    targets = "targets: [{tap: tokens}, {name: masked, tap: tokens, where: masked}]"
    masked = f"{{name: features, mask: {{whole_pass: true, every: %d}}, {targets}}}"
    for every, size in ((2, 2), (3, 6)):
        members = [f"students.a.objective={masked % every}", f"students.b.objective={masked % 2}"]
        config = load_config("digits_dmae", [*FAMILY, *members, "objective=null"])
        assert group_size(config) == size
    assert split_recipe(load_config("digits_dmae", [*FAMILY, "optim.micro_batch=9"]), 1) == (8, 8)


def test_every_key_is_listed_and_parts_have_a_place_for_the_member():
    assert "students.NAME.objective" in all_keys("students.NAME")
    assert name_of_part("val", "pixel", [""]) == "val/pixel"
    assert name_of_part("val", "a/pixel", ["a"]) == "a/val/pixel"
    assert name_of_part("val", "loss", ["a"]) == "val/loss"
