"""What an objective shows a teacher, as plain values: stored features are of exactly these inputs."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import torch
from isal import isal_zlib

from dmae_ds.config.family import objectives_of
from dmae_ds.config.run import RunConfig
from dmae_ds.data.batch import DTYPES, Batch
from dmae_ds.errors import UserError
from dmae_ds.models.masking import PatchBatch
from dmae_ds.models.patches import Normalize
from dmae_ds.objectives.base import Objective

NUM_IMAGES = 4


def inputs_identity(objective: Objective, config: RunConfig) -> dict:
    """Views, patches and masks of an objective, as JSON values; the masks by what is kept of a fixed batch.

    Raises UserError where features of one image can't be told from those of others.
    """
    student = objective.student
    if len(set(objective.pass_of.values())) > 1:
        raise UserError(
            "stored features are of one pass of the teacher, and students of this family show it different "
            "patches; store and read them for those that show the same (dmae_ds/train/FAMILIES.md)"
        )
    prepared = _prepare(objective, config, NUM_IMAGES)
    names = ", ".join(dict.fromkeys(one.name for one in objectives_of(config)))
    _check_rows(prepared, _prepare(objective, config, NUM_IMAGES // 2), names)
    ids = torch.cat([prepared.ids_keep, prepared.ids_masked], dim=1).contiguous()
    return {
        "views": [dataclasses.asdict(view) for view in objective.views],
        "student.img_size (patches)": list(student.grid),
        "student.patch_size": student.patch_size,
        "patches that the student sees": objective.num_visible,
        "patches of the teacher's input": prepared.ids_keep.shape[1],
        "RandAugment": objective.rand_augment,
        "masks of a fixed batch": isal_zlib.crc32(ids.numpy().tobytes()),
    }


def _prepare(objective: Objective, config: RunConfig, num_images: int) -> PatchBatch:
    """Prepare a fixed batch on the CPU, and leave all random generators as they were."""
    student, bits = objective.student, config.data.bits
    sides = [view.size or student.grid[0] * student.patch_size for view in objective.views]
    views = [_spread((num_images, student.channels, side, side)) * 255 for side in sides]
    views = [view.round().to(DTYPES[bits]) for view in views]
    numbers = torch.arange(num_images)
    noise = _spread((num_images, student.num_patches))
    batch = Batch(views[0], noise, numbers % 2, numbers, numbers * 0, tuple(views[1:]))
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        prepared = objective.prepare(batch, Normalize(config.data.mean, config.data.std))
    random.setstate(states[0])
    np.random.set_state(states[1])
    return prepared


def _spread(shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers in [0, 1) that look random and are the same everywhere: golden-ratio steps."""
    return (
        ((torch.arange(torch.Size(shape).numel(), dtype=torch.float64) * 0.6180339887498949) % 1)
        .view(shape)
        .float()
    )


def _check_rows(whole: PatchBatch, half: PatchBatch, name: str) -> None:
    """Raise UserError unless rows are view after view, each with the images in their order."""
    num_views, rest = divmod(len(whole.visible), NUM_IMAGES)
    is_whole = not rest and len(half.visible) == num_views * (NUM_IMAGES // 2)
    if is_whole:
        first = whole.ids_keep.unflatten(0, (num_views, -1))[:, : NUM_IMAGES // 2].flatten(0, 1)
        is_whole = torch.equal(first, half.ids_keep)
    if not is_whole:
        raise UserError(
            f"features of objective {name} can't be stored: its `prepare` does not give a row for each view "
            "and image, view after view"
        )
