"""Batches of random pixels, as an objective wants them: benches need no data set."""

from __future__ import annotations

import torch

from dmae_ds.config.run import RunConfig
from dmae_ds.data.batch import Batch
from dmae_ds.models.masking import PatchBatch
from dmae_ds.models.patches import Normalize
from dmae_ds.objectives.base import Objective

NUM_BATCHES = 4  # different ones, used in turn


def random_batches(
    objective: Objective, config: RunConfig, *, micro_batch: int, rank: int, device: torch.device
) -> list[PatchBatch]:
    """NUM_BATCHES prepared batches on the device, other ones on every rank."""
    normalize = Normalize(config.data.mean, config.data.std).to(device)
    batches = []
    for index in range(NUM_BATCHES):
        generator = torch.Generator().manual_seed(1000 * rank + index)
        batch = random_batch(objective, micro_batch, generator).to(device)
        batches.append(objective.prepare(batch, normalize))
    return batches


def random_batch(objective: Objective, micro_batch: int, generator: torch.Generator) -> Batch:
    """Random pixels in every view that an objective asks for, on the CPU; all labels are 0."""
    student_size = objective.student.grid[0] * objective.student.patch_size
    views = []
    for view in objective.views:
        size = view.size or student_size
        shape = (micro_batch, objective.student.channels, size, size)
        views.append(torch.randint(256, shape, dtype=torch.uint8, generator=generator))
    noise = torch.rand(micro_batch, objective.student.num_patches, generator=generator)
    zeros = torch.zeros(micro_batch, dtype=torch.int64)
    return Batch(
        views[0],
        noise,
        labels=zeros,
        sample_ids=torch.arange(micro_batch),
        epochs=zeros,
        more_views=tuple(views[1:]),
    )
