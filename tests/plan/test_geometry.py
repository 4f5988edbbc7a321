"""Measures of real networks: the paper's pair, whose FLOPs were counted elsewhere, and timm's weights."""

from __future__ import annotations

import pytest

from dmae_ds.config.family import members_of
from dmae_ds.config.load import load_config
from dmae_ds.config.shipped import shipped_files
from dmae_ds.objectives.build import build_objective
from dmae_ds.plan.geometry import measure, scaled
from dmae_ds.teacher.frozen import meta_teacher
from tests.messages import refused

TINY = [
    "data.train=nowhere",
    "teacher.weights=nowhere",
    "teacher.embed_dim=48",
    "teacher.depth=8",
    "teacher.num_heads=3",
    "student.embed_dim=32",
    "student.num_heads=2",
]


# GFLOP of teacher (18 blocks), student forward and backward at batch 8, counted in a run before this project
# began.
@pytest.mark.parametrize(
    "mask_ratio, expected",
    [(0.75, (185, 157, 312)), pytest.param(0.95, (39, 101, 201), marks=pytest.mark.slow)],
)
def test_flops_are_those_that_were_counted_for_vit_large_to_base(mask_ratio, expected):
    geometry = measure(load_config("dmae_vit_large_to_base", [f"objective.mask_ratio={mask_ratio}"]), 8)
    flops = (geometry.teachers[""].flops, geometry.student.forward_flops, geometry.student.backward_flops)
    assert [value / 1e9 for value in flops] == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("dtype, size", [("fp32", 4), ("bf16", 2)])
def test_weights_are_those_that_training_builds(dtype, size):
    config = load_config("digits_dmae", [*TINY, f"teacher.dtype={dtype}"])
    geometry, (objective, _) = measure(config, 4), build_objective(config)
    assert geometry.student.parameters == sum(parameter.numel() for parameter in objective.parameters())
    vit = meta_teacher(config.teacher.name, config.teacher.overrides(), 6)
    teacher = geometry.teachers[""]
    assert teacher.depth == 6
    assert teacher.weight_bytes == size * sum(tensor.numel() for tensor in vit.state_dict().values())
    # 16 of 64 patches stay, and CLS.
    assert teacher.token_bytes == teacher.feature_bytes == size * 4 * 17 * 48
    assert teacher.id_bytes == 8 * 4 * 16


@pytest.mark.parametrize("recipe", ["digits_dmae", "digits_sdae", "digits_dino_dmae", "digits_two_teachers"])
def test_a_scaled_geometry_is_close_to_a_measured_one(recipe):
    """The scaled one only decides which sizes are measured; what does not depend on images is the same."""
    config = load_config(recipe, ["data.train=nowhere"])
    measured, estimated = measure(config, 8), scaled(measure(config, 16), 8)
    assert estimated.micro_batch == 8
    assert estimated.student.parameters == measured.student.parameters
    assert estimated.student.forward_flops == pytest.approx(measured.student.forward_flops, rel=0.01)
    assert estimated.student.activations == pytest.approx(measured.student.activations, rel=0.3)
    assert estimated.batch_bytes == pytest.approx(measured.batch_bytes, rel=0.01)
    assert estimated.teachers.keys() == measured.teachers.keys()
    pairs = [(estimated.teachers[name], measured.teachers[name]) for name in measured.teachers]
    for ours, theirs in [*pairs, (estimated.ema, measured.ema)]:
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.weight_bytes == theirs.weight_bytes
            assert ours.flops == pytest.approx(theirs.flops, rel=0.01)
            assert ours.feature_bytes == theirs.feature_bytes


def test_activations_grow_with_the_micro_batch_and_shrink_in_bf16():
    def bytes_of(micro_batch, *more):
        return measure(load_config("digits_dmae", [*TINY, *more]), micro_batch).student.activations

    small, large = bytes_of(32), bytes_of(64)
    assert 1.9 < large / small <= 2
    assert bytes_of(64, "precision=bf16") < 0.7 * large


def test_a_gpu_s_autocast_is_on_and_keeps_no_less_in_fp32_than_a_cpu_s():
    def bytes_of(device_type, precision):
        config = load_config("digits_dmae", [*TINY, f"precision={precision}"])
        return measure(config, 32, device_type=device_type).student.activations

    assert bytes_of("cuda", "fp32") == pytest.approx(bytes_of("cpu", "fp32"), rel=0.02)
    assert 0.999 * bytes_of("cpu", "bf16_autocast") < bytes_of("cuda", "bf16_autocast")
    assert bytes_of("cuda", "bf16_autocast") < 0.8 * bytes_of("cuda", "fp32")


def test_a_recipe_without_a_teacher_and_one_whose_patches_do_not_fit():
    assert measure(load_config("digits_mae", ["data.train=nowhere"]), 4).teachers == {}
    with refused("patch"):
        measure(load_config("digits_dmae", [*TINY, "teacher.patch_size=8"]), 4)


def test_a_checkpointed_block_keeps_its_input_alone():
    def activations(depth: int, checkpointed: bool) -> int:
        overrides = [
            f"student.depth={depth}",
            f"student.checkpoint_blocks={checkpointed}",
            "data.train=nowhere",
        ]
        return measure(load_config("digits_mocov3", overrides), 16).student.activations

    more = {
        checkpointed: activations(8, checkpointed) - activations(4, checkpointed) for checkpointed in (0, 1)
    }
    tokens = 2 * 16 * 65 * 64 * 4  # two views of 16 images, CLS and 64 patches, width 64, fp32
    assert more[1] == pytest.approx(4 * tokens, rel=0.01)
    assert more[0] > 10 * more[1]


@pytest.mark.parametrize("recipe", [name for name in shipped_files("recipe") if name.startswith("digits_")])
def test_every_objective_is_built_for_five_channels(recipe):
    """Fake tensors go through teacher, student and loss; colours can't be changed of what are none."""
    sections = [f"students.{name}" if name else "student" for name in members_of(load_config(recipe, []))]
    channels = [f"data.mean={[0.5] * 5}", f"data.std={[0.5] * 5}", "data.bits=16"]
    channels += [f"{section}.in_chans=5" for section in sections]
    if getattr(load_config(recipe, []).objective, "photometric", False):
        with refused("photometric", "5 channels", "16 bits"):
            load_config(recipe, channels)
        channels.append("objective.photometric=false")
    config = load_config(recipe, channels)
    teachers = config.named_teachers().values()
    if teachers:
        with refused(next(iter(teachers)).key("in_chans"), 3, "student.in_chans", 5):
            config.check_teacher()
        config = load_config(recipe, [*channels, *(f"{teacher.key('in_chans')}=5" for teacher in teachers)])
    config.check_teacher()
    five, three = measure(config, 2), measure(load_config(recipe, []), 2)
    assert five.student.forward_flops > three.student.forward_flops  # MoCo-v3 freezes the patch projection
    assert five.batch_bytes > three.batch_bytes
