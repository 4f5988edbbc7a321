"""The plan of a family: each student's part is what it is alone, and a shared pass counts once."""

from __future__ import annotations

import pytest

from dmae_ds.config.family import members_of
from dmae_ds.config.load import load_config
from dmae_ds.plan.geometry import measure, scaled
from dmae_ds.plan.table import describe_members

SHARED = "students.features.objective={name: dmae, decoder: {depth: 1, embed_dim: 32, num_heads: 2}}"


def test_each_student_has_its_own_part_and_its_pass_of_the_teacher():
    config = load_config("digits_family")
    family = measure(config, 4)
    alone = {name: measure(member, 4) for name, member in members_of(config).items()}
    assert family.pass_of == {"dmae": 0, "features": 1}
    for name, geometry in alone.items():
        one = family.members[name]
        assert (one.forward_flops, one.backward_flops, one.parameters, one.activations) == (
            geometry.student.forward_flops,
            geometry.student.backward_flops,
            geometry.student.parameters,
            geometry.student.activations,
        )
    assert family.teachers[""].pass_flops == (
        alone["dmae"].teachers[""].flops,
        alone["features"].teachers[""].flops,
    )
    assert family.teachers[""].flops == sum(family.teachers[""].pass_flops)
    # They take turns: the activations of one are alive at a time.
    assert family.student.activations == max(one.student.activations for one in alone.values())
    assert family.student.parameters == sum(one.student.parameters for one in alone.values())
    assert family.student_parameters == sum(one.student_parameters for one in alone.values())
    lines = describe_members(family)
    assert [line.split(":")[0].strip() for line in lines] == list(config.students)
    assert all("1.00 of the work" in line for line in lines) and "no teacher" in lines[2]
    assert describe_members(alone["dmae"]) == []
    twice = scaled(family, 8)
    assert twice.teachers[""].pass_flops == tuple(2 * flops for flops in family.teachers[""].pass_flops)
    assert twice.members["mae"].forward_flops == 2 * family.members["mae"].forward_flops


def test_a_shared_pass_counts_once():
    config = load_config("digits_family", [SHARED])
    family = measure(config, 4)
    alone = [measure(member, 4) for member in members_of(config).values()]
    assert family.pass_of == {"dmae": 0, "features": 0}
    assert family.teachers[""].flops == alone[0].teachers[""].flops == alone[1].teachers[""].flops
    # What is not shared: the two sections differ, so each prepares its own patches.
    assert family.batch_bytes < sum(one.batch_bytes for one in alone)
    trained = [one.student.forward_flops + one.student.backward_flops for one in alone[:2]]
    ratio = (sum(trained) + family.teachers[""].flops) / (sum(trained) + 2 * family.teachers[""].flops)
    assert f"{ratio:.2f} of the work" in describe_members(family)[1] and ratio < 0.95


@pytest.mark.slow
def test_a_whole_teacher_on_whole_images_saves_more_than_a_cut_one_on_a_quarter():
    """The shares that the page of families tells."""
    students = "students={small: {name: vit_small_patch16_224}, base: {name: vit_base_patch16_224}}"
    masked = ["student=null", students]
    for recipe, overrides, share in (
        ("features_dinov3_large_to_small_base", [], "0.68"),
        ("dmae_vit_large_to_base", masked, "0.84"),
    ):
        geometry = measure(load_config(recipe, overrides), 2)
        assert f"2 together: {share} of the work" in describe_members(geometry)[1]
