"""What an objective asks of a teacher is compared with what the teacher has, before anything is read."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dmae_ds.config.load import load_config
from dmae_ds.config.networks import TeacherConfig
from dmae_ds.objectives.build import build_objective, check_network, check_superset, check_taps
from dmae_ds.objectives.feature_distillation import TeacherShape
from dmae_ds.teacher.frozen import split_tap
from tests.messages import refused

SUPERSET = ["teacher.weights=absent.safetensors", "teacher.sees=superset"]


@pytest.mark.parametrize(
    "more, words",
    [
        ([], ["teacher.sees superset", "teacher.mask_ratio None"]),
        (["teacher.sees=all", "teacher.mask_ratio=0.5"], ["teacher.sees all", "teacher.mask_ratio 0.5"]),
        (["teacher.mask_ratio=1.5"], ["teacher.mask_ratio"]),
    ],
)
def test_a_superset_goes_with_a_mask_ratio(more, words):
    with refused(*words):
        load_config("digits_dmae", [*SUPERSET, *more])


def test_a_superset_is_for_objectives_that_compare_it():
    with refused("teacher.sees=superset", "objective.name"):
        build_objective(load_config("digits_dmae", [*SUPERSET, "teacher.mask_ratio=0.5"]), device="meta")


def test_a_superset_has_more_patches_than_the_student():
    objective = SimpleNamespace(compares_superset=True, num_visible=16)
    check_superset(objective, TeacherShape(4, 32, num_superset=17))
    for num_superset in (15, 16):
        with refused("teacher.mask_ratio", f"{num_superset} patches", "student sees 16"):
            check_superset(objective, TeacherShape(4, 32, num_superset=num_superset))


@pytest.mark.parametrize(
    "name, taps, words",
    [
        (
            "vit_base_patch16_siglip_224",
            ("block/3", "cls"),
            ["'cls'", "vit_base_patch16_siglip_224", "pooled"],
        ),
        ("vit_base_patch16_224", ("pooled",), ["'pooled'", "vit_base_patch16_224", "tokens, cls"]),
        ("vit_medium_patch16_gap_240", ("relation/2", "cls"), ["'cls'"]),
        ("vit_large_patch14_xp_224", ("relation/2",), ["relation", "ParallelScalingBlock"]),
    ],
)
def test_a_tap_that_the_network_lacks_is_refused(name, taps, words):
    with refused(*words):
        check_network(TeacherConfig(name=name, weights="absent.pth"), taps)


def test_a_tap_has_its_block_s_number_or_none():
    taps = ("relation/3", "decoder/12", "tokens", "cls")
    assert [split_tap(tap) for tap in taps] == [("relation", 3), ("decoder", 12), ("tokens", 0), ("cls", 0)]


def test_an_unknown_tap_is_refused_with_the_known_ones():
    with refused("'token'", "relation/N", "tokens, cls, pooled"):
        check_taps(("token",), TeacherShape(4, 32))
    with refused("'relation/5'", "relation/1 to relation/4"):
        check_taps(("relation/5",), TeacherShape(4, 32))
