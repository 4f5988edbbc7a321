"""Every shipped recipe's step at full size on a fake GPU: nothing waits, copies, reads or mixes devices.

Not run on a GPU; what fake CUDA can and cannot show is in dmae_ds/plan/fake_cuda.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from dmae_ds.config.shipped import shipped_files
from dmae_ds.objectives import mae
from tests.fake_cuda.step import watch_step

PRECISIONS = ("fp32", "bf16_autocast", "bf16", "fp16")
REPRESENTATIVE = "dmae_vit_large_to_base"
# These have every objective and kind of network; the other recipes at full size differ in sizes.
FAST = re.compile(
    f"digits_|scenes_|clipart_dmae|{REPRESENTATIVE}$|radio_like|adapt_|features_dinov3_large_to_small$"
)
RECIPES = shipped_files("recipe")
# Most kernels of a step of one micro-batch of 8 images, in any precision: about 5% above those counted. The
# bounds of recipes that run their blocks twice are estimates.
MOST_KERNELS = json.loads(Path(__file__).with_name("kernels.json").read_text())


def cases() -> list:
    """(recipe, precision): many in one precision and one in all of them, the rest slow."""
    made = []
    for recipe in RECIPES:
        for precision in PRECISIONS:
            fast = recipe == REPRESENTATIVE or (precision == "bf16_autocast" and FAST.match(recipe))
            made.append(pytest.param(recipe, precision, marks=[] if fast else pytest.mark.slow))
    return made


@pytest.mark.parametrize("recipe, precision", cases())
def test_a_step_neither_waits_nor_copies_nor_reads_nor_mixes_devices(recipe, precision):
    report = watch_step(recipe, precision=precision)
    assert report.findings == {}
    assert 100 < report.kernels <= MOST_KERNELS[recipe]


@pytest.mark.parametrize("precision", ["bf16_autocast", pytest.param("bf16", marks=pytest.mark.slow)])
def test_neither_does_a_rotary_student_with_registers(precision):
    student = ["student.name=vit_small_patch16_dinov3_qkvb", "student.img_size=224", "student.depth=4"]
    report = watch_step(REPRESENTATIVE, *student, precision=precision)
    assert report.findings == {} and report.kernels > 100


def test_neither_does_dropping_a_teacher():
    report = watch_step("digits_two_teachers", "objective.teacher_drop=0.5")
    assert report.findings == {} and report.kernels <= 1.1 * MOST_KERNELS["digits_two_teachers"]


def test_a_loop_over_patches_exceeds_the_bound(monkeypatch):
    def one_by_one(patches):
        pieces = patches.flatten(0, 1).split(1)
        return torch.cat([(piece - piece.mean()) / piece.std() for piece in pieces]).view_as(patches)

    monkeypatch.setattr(mae, "normalize_patches", one_by_one)
    assert watch_step("mae_vit_base").kernels > MOST_KERNELS["mae_vit_base"]


def test_every_recipe_has_a_bound_of_kernels():
    assert set(MOST_KERNELS) == set(RECIPES)
