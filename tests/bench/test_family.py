"""`dmae-ds bench step` of a family: what is measured, and how it is compared with separate runs."""

from __future__ import annotations

import json

import pytest

from dmae_ds.bench.family import compare_families, describe_families, family_recipes
from dmae_ds.bench.save import bench_save
from dmae_ds.bench.step import bench_step
from dmae_ds.bench.stream import bench_stream
from dmae_ds.config.load import load_config
from dmae_ds.distributed.world import World
from tests.messages import refused
from tests.train.conftest import command, run


def test_all_students_then_fewer_then_each_alone():
    config = load_config("digits_family")
    recipes = family_recipes(config)
    assert list(recipes) == ["dmae + features + mae", "dmae + features", "dmae", "features", "mae"]
    assert list(recipes["dmae + features"].students) == ["dmae", "features"]
    assert recipes["mae"].teacher is None and recipes["mae"].student.depth == 4
    plain = "students.%s.objective={name: mae}"
    without = [*(plain % name for name in ("dmae", "features")), "teacher=null", "objective=null"]
    assert all(
        recipe.teacher is None for recipe in family_recipes(load_config("digits_family", without)).values()
    )
    one = config.model_copy(update={"students": {"dmae": config.students["dmae"]}})
    with refused("dmae"):
        family_recipes(one)


def test_the_ratio_is_that_of_the_separate_runs_of_each_round():
    def step(name, seconds, gflop, teacher=None):
        parts = {} if teacher is None else {"teacher": {"seconds": teacher}}
        return {"name": name, "round_seconds": seconds, "gflop": gflop, "parts": parts}

    steps = [
        step("a + b + c", [5, 6, 9], 60, 2.0),
        step("a + b", [4, 4, 4], 50, 2.0),
        step("a", [2, 4, 2], 40, 2.0),
        step("b", [2, 4, 6], 40, 1.5),
        step("c", [1, 2, 1], 20),
    ]
    three, two = compare_families(steps)
    assert three["students"] == ["a", "b", "c"] and two["students"] == ["a", "b"]
    assert three["of_separate"] == 1.0 and two["of_separate"] == 0.5  # the median of 1, .6, 1; of 1, .5, .5
    assert (three["of_separate_work"], two["of_separate_work"]) == (0.6, 0.625)
    assert three["separate_teacher_seconds"] == [2.0, 1.5, 0.0] and three["teacher_seconds"] == 2.0
    lines = describe_families([three, two])
    assert all(word in lines[1] for word in ("a + b", "0.500", "0.625", "2.000"))


def test_a_family_is_refused_where_one_student_is_measured(tmp_path):
    config, world = load_config("digits_family"), World(rank=0, local_rank=0, size=1, local_size=1)
    with refused("--against"):
        bench_step(config, world, against_mae=True, data=False, rounds=1, as_json=False)
    with refused("bench save", "dmae, features, mae"):
        bench_save(config, world, steps=1, rounds=1, folder=tmp_path)
    with refused("bench stream", "dmae, features, mae"):
        bench_stream(config, world, stages=None, sleep_ms=None, ticks=1, rounds=1)


@pytest.mark.slow
def test_a_family_is_measured(tmp_path):
    small = ["optim.global_batch=8", "optim.micro_batch=4", "--rounds", "2", "--json"]
    done = run(command(["bench", "step", "digits_family", *small], ranks=1), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert [step["name"] for step in found["steps"]] == list(family_recipes(load_config("digits_family")))
    three, two = found["families"]
    # Two passes for two students.
    assert three["of_separate_work"] == pytest.approx(1) == two["of_separate_work"]
    assert three["teacher_seconds"] > 0 and three["separate_teacher_seconds"][2] == 0
