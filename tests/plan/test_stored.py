"""When stored features pay, and a recipe that reads them is planned without a teacher's network."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dmae_ds.config.load import load_config
from dmae_ds.plan.choose import placements
from dmae_ds.plan.cost import Machine
from dmae_ds.plan.geometry import measure
from dmae_ds.plan.search import search
from dmae_ds.plan.stored import StoredPlan, describe_stored, image_bytes, plan_stored
from dmae_ds.plan.teacher_memory import Placement, stream_bytes, teacher_bytes
from dmae_ds.plan.work import step_work
from dmae_ds.teacher.stored import AHEAD

STORED = ["teacher.placement=cache", "teacher.cache=features", "teacher.weights=null"]


def planned(**changes) -> StoredPlan:
    numbers = {"live_s": 3.0, "student_s": 1.0, "teacher_s": 2.0, "storage_gb_s": 100.0}
    return StoredPlan(images=1000, steps=10, image_bytes=1e6, **{**numbers, **changes})


@pytest.mark.parametrize(
    ("changes", "runs", "write_s", "stored_s"),
    [
        ({}, 2, 20, 1.0),
        ({"teacher_s": 1.9}, 1, 19, 1.0),
        ({"storage_gb_s": 0.05}, 3, 20, 2.0),  # 100 MB a step take 2 s to read and to write
        ({"storage_gb_s": 0.02}, None, 50, 5.0),
    ],
)
def test_storing_pays_when_the_time_saved_is_more_than_the_teachers(changes, runs, write_s, stored_s):
    one = planned(**changes)
    assert (one.runs, one.write_s, one.stored_s) == (runs, pytest.approx(write_s), stored_s)
    assert one.read_gb_s(4) == pytest.approx(0.1 / 4)


def test_a_recipe_that_reads_features_has_no_network_of_a_teacher():
    live, stored = (load_config("digits_dmae", more) for more in ([], STORED))
    with_teacher, without = measure(live, 4), measure(stored, 4)
    assert without.teachers[""].feature_bytes == with_teacher.teachers[""].feature_bytes > 0
    assert (
        teacher_bytes(without.teachers[""], Placement("cache"), 1)
        == 0
        < with_teacher.teachers[""].weight_bytes
    )
    narrow = replace(with_teacher.teachers[""], feature_bytes=with_teacher.teachers[""].feature_bytes // 2)
    for standardize, number in (("none", 2), ("layer_norm", 4)):  # a target is in float32
        of_bf16 = load_config("digits_dmae", ["teacher.dtype=bf16", f"teacher.standardize={standardize}"])
        assert image_bytes(of_bf16, replace(with_teacher, teachers={"": narrow})) == 17 * 128 * number
    assert stream_bytes(without, {"": Placement("cache")}) == (1 + AHEAD) * stream_bytes(
        with_teacher, {"": Placement()}
    )
    assert placements(without.teachers[""], gpus=8, gpus_per_node=8) == [("cache", None)]
    assert step_work(stored, without, 1)["teacher"][0] == 0 < step_work(live, with_teacher, 1)["teacher"][0]


def test_the_plan_counts_their_bytes():
    config, machine = load_config("digits_dmae", []), Machine(gpus=1, gpus_per_node=1, memory_gib=80.0)
    result = search(config, machine)
    one = plan_stored(config, machine, result, steps=100)
    assert one.image_bytes == 17 * 128 * 4 and one.images == 100 * 64
    assert one.student_s <= one.live_s
    assert any("8,704" in line for line in describe_stored(config, machine, result, steps=100))
