"""Teacher dropping: an image learns from the teacher it is worst at, from others by chance (UNIC).

Of each image the teacher with the largest loss stays; each other one is dropped with probability p, and what
stays is scaled so that the teachers' weights keep their sum. The draws are keyed by (epoch, sample id): the
same on any number of ranks and after a resume.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dmae_ds.data.batch import Batch
from dmae_ds.data.transforms import sample_rng
from dmae_ds.objectives.augment import to_device

DROP_STREAM = 101  # beyond the streams of a sample (data/transforms.py) and mixing's (augment.py)


def draw_drops(batch: Batch, num_teachers: int, *, seed: int) -> Tensor:
    """Return a draw in [0, 1) for each image and teacher, [N, teachers] float32, on the images' device."""
    samples = zip(batch.epochs.tolist(), batch.sample_ids.tolist(), strict=True)
    draws = [
        sample_rng(seed, epoch, sample_id, DROP_STREAM).random(num_teachers) for epoch, sample_id in samples
    ]
    return to_device(torch.from_numpy(np.stack(draws)).float(), batch.images.device)


def drop_factors(losses: Tensor, weights: Tensor, draws: Tensor, probability: float) -> Tensor:
    """Return the factor of each image's loss under each teacher, [N, teachers], 0 where it is dropped.

    losses: [N, teachers], with the teachers' weights [teachers] in them
    draws: [N, teachers]; a teacher whose draw is below the probability is dropped, unless its loss is largest
    """
    worst = torch.nn.functional.one_hot(losses.argmax(dim=1), losses.shape[1]).bool()
    kept = (worst | (draws >= probability)).to(losses.dtype)
    total = weights.to(losses).sum()
    return kept * total / (kept * weights.to(losses)).sum(dim=1, keepdim=True).clamp(min=1e-12)
