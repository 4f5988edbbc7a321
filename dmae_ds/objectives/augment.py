"""Random erasing, mixup and cutmix on the device, timm's, keyed before they draw; for whoever trains a classifier.

timm draws from the global generators of `random`, numpy and torch, which are seeded right before every use. In the trainer two
neighbours of the global batch are mixed with each other, by one draw keyed by the first one's (epoch, sample id): so the pictures of a
step are the same on any number of ranks, under any accumulation and after any resume. timm's own batch mode has one draw a micro-batch
and pairs the first picture with the last: the same distribution of each picture, tied to how the batch is cut.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

from dmae_ds.config.objectives import AugmentConfig
from dmae_ds.data.batch import Batch
from dmae_ds.data.transforms import ERASE_STREAM, sample_rng
from dmae_ds.models.masking import PatchBatch

MIX_STREAM = 100  # beyond those of a sample (data/transforms.py)


@dataclass
class LabelledBatch(PatchBatch):
    """targets [N, C]: how much of each class is in a picture, float32, rows of sum 1."""

    targets: Tensor


class MixedPictures:
    """A micro-batch as the loader gives it -> normalised pictures and their soft labels.

    seed: of the draws
    """

    def __init__(self, config: AugmentConfig, *, num_classes: int, seed: int):
        self.config, self.num_classes, self.seed = config, num_classes, seed
        self.mix = (
            Mixup(
                config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=num_classes
            )
            if config.mixes
            else None
        )

    def __str__(self) -> str:
        config = self.config
        return f"smoothing {config.label_smoothing:g}, mixup {config.mixup:g}, cutmix {config.cutmix:g}, erase {config.erase:g}, {config.rand_augment or 'no RandAugment'}"

    def __call__(self, batch: Batch, normalize: nn.Module) -> tuple[Tensor, Tensor]:
        """Returns images [N, 3, H, W] and targets [N, C], float32. Reseeds the global generators. N is even where pictures are mixed."""
        images = normalized(batch.images, normalize)
        if self.config.erase:
            erase_rectangles(
                RandomErasing(self.config.erase, mode="pixel", device=images.device),
                images,
                batch,
                seed=self.seed,
            )
        if self.mix is None:
            return images, mixup_target(
                batch.labels, self.num_classes, lam=1.0, smoothing=self.config.label_smoothing
            )
        assert len(images) % 2 == 0, "the schema keeps two neighbours in one micro-batch"
        epochs, ids, targets = batch.epochs.tolist(), batch.sample_ids.tolist(), []
        for first in range(0, len(images), 2):
            seed_globals(sample_rng(self.seed, epochs[first], ids[first], MIX_STREAM))
            _, found = self.mix(
                images[first : first + 2], batch.labels[first : first + 2]
            )  # the pictures in place
            targets.append(found)
        return images, torch.cat(targets)


def erase_rectangles(erasing: RandomErasing, images: Tensor, batch: Batch, *, seed: int) -> None:
    """Random erasing of images [N, 3, H, W], in place, each keyed by its sample. Reseeds the global generators."""
    for row, (epoch, sample_id) in enumerate(
        zip(batch.epochs.tolist(), batch.sample_ids.tolist(), strict=True)
    ):
        seed_globals(sample_rng(seed, epoch, sample_id, ERASE_STREAM))
        erasing(images[row])


def normalized(images: Tensor, normalize: nn.Module) -> Tensor:
    """uint8 [N, 3, H, W] -> float32 [N, 3, H, W]."""
    # [N, 3, H, W] -> [N, H, W, 3] to be normalised -> [N, 3, H, W]
    return normalize(images.movedim(1, -1)).movedim(-1, 1).contiguous()


def seed_globals(rng: np.random.Generator) -> None:
    """Seed `random`, numpy's and torch's global generators."""
    random.seed(int(rng.integers(2**63)))
    np.random.seed(int(rng.integers(2**32)))
    torch.manual_seed(int(rng.integers(2**63)))
