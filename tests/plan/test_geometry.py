"""What the planner says of real networks: the measured FLOPs of the paper's pair, and the weights that timm builds."""

from __future__ import annotations

import pytest

from dmae_ds.config.load import load_config
from dmae_ds.errors import UserError
from dmae_ds.objectives.build import build_objective
from dmae_ds.plan.geometry import measure
from dmae_ds.teacher.frozen import meta_teacher

TINY = [
    "data.train=nowhere",
    "teacher.weights=nowhere",
    "teacher.embed_dim=48",
    "teacher.depth=8",
    "teacher.num_heads=3",
    "student.embed_dim=32",
    "student.num_heads=2",
]


# GFLOP of teacher (18 blocks), student forward and backward at batch 8, counted in a run before this project began.
@pytest.mark.parametrize(
    "mask_ratio, expected",
    [(0.75, (185, 157, 312)), pytest.param(0.95, (39, 101, 201), marks=pytest.mark.slow)],
)
def test_flops_are_those_that_were_counted_for_vit_large_to_base(mask_ratio, expected):
    found = measure(load_config("dmae_vit_large_to_base", [f"objective.mask_ratio={mask_ratio}"]), 8)
    flops = (found.teacher.flops, found.student.forward_flops, found.student.backward_flops)
    assert [value / 1e9 for value in flops] == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("dtype, size", [("fp32", 4), ("bf16", 2)])
def test_weights_are_those_that_training_builds(dtype, size):
    config = load_config("digits_dmae", [*TINY, f"teacher.dtype={dtype}"])
    found, (objective, _) = measure(config, 4), build_objective(config)
    assert found.student.parameters == sum(parameter.numel() for parameter in objective.parameters())
    vit = meta_teacher(config.teacher.name, config.teacher.overrides(), 6)
    assert found.teacher.depth == 6
    assert found.teacher.weight_bytes == size * sum(tensor.numel() for tensor in vit.state_dict().values())
    # 16 of 64 patches stay, and CLS.
    assert (
        found.teacher.token_bytes == found.teacher.feature_bytes == size * 4 * 17 * 48
        and found.teacher.id_bytes == 8 * 4 * 16
    )


def test_activations_grow_with_the_micro_batch_and_shrink_in_bf16():
    def bytes_of(micro_batch, *more):
        return measure(load_config("digits_dmae", [*TINY, *more]), micro_batch).student.activations

    small, large = bytes_of(32), bytes_of(64)
    assert 1.9 < large / small <= 2
    assert bytes_of(64, "precision=bf16") < 0.7 * large


def test_a_recipe_without_a_teacher_and_one_that_can_not_be():
    assert measure(load_config("digits_mae", ["data.train=nowhere"]), 4).teacher is None
    with pytest.raises(UserError, match="one mask can't serve both"):
        measure(load_config("digits_dmae", [*TINY, "teacher.patch_size=8"]), 4)
