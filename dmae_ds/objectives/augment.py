"""timm's random erasing, mixup and cutmix on the device, each keyed before it draws, for classifiers.

timm draws from the global generators of `random`, numpy and torch; they are seeded right before every use. In
the trainer two consecutive images of the global batch are mixed with each other, by one draw keyed by the
first one's (epoch, sample id): so the images of a step are the same on any number of ranks, with any gradient
accumulation and after any resume. timm's own batch mode makes one draw a micro-batch and mixes the first
image with the last: the same distribution for each image, but tied to how the batch is cut.
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

MIX_STREAM = 100  # beyond the streams of a sample (data/transforms.py)


@dataclass
class LabelledBatch(PatchBatch):
    """A batch with soft labels: targets [N, classes] float32, rows of sum 1."""

    targets: Tensor


class MixedImages:
    """Turns a micro-batch of the loader into normalised, mixed images and their soft labels.

    seed: with (epoch, sample id), the key of every draw
    """

    def __init__(self, config: AugmentConfig, *, num_classes: int, seed: int):
        self.config, self.num_classes, self.seed = config, num_classes, seed
        self.mix = None
        if config.mixes:
            smoothing = config.label_smoothing
            self.mix = Mixup(config.mixup, config.cutmix, label_smoothing=smoothing, num_classes=num_classes)

    def __str__(self) -> str:
        config = self.config
        return (
            f"smoothing {config.label_smoothing:g}, mixup {config.mixup:g}, cutmix {config.cutmix:g}, "
            f"erase {config.erase:g}, {config.rand_augment or 'no RandAugment'}"
        )

    def __call__(self, batch: Batch, normalize: nn.Module) -> tuple[Tensor, Tensor]:
        """Return images [N, 3, H, W] and targets [N, classes], float32.

        N must be even where images are mixed. It seeds the global generators.
        """
        images = normalized(batch.images, normalize)
        if self.config.erase:
            erasing = RandomErasing(self.config.erase, mode="pixel", device=images.device)
            erase_rectangles(erasing, images, batch, seed=self.seed)
        if self.mix is None:
            smoothing = self.config.label_smoothing
            return images, mixup_target(batch.labels, self.num_classes, lam=1.0, smoothing=smoothing)
        assert len(images) % 2 == 0, "the schema keeps the two images of a mix in one micro-batch"
        epochs, ids, targets = batch.epochs.tolist(), batch.sample_ids.tolist(), []
        for first in range(0, len(images), 2):
            seed_globals(sample_rng(self.seed, epochs[first], ids[first], MIX_STREAM))
            pair = slice(first, first + 2)
            _, pair_targets = self.mix(images[pair], batch.labels[pair])  # changes the images in place
            targets.append(pair_targets)
        return images, torch.cat(targets)


def erase_rectangles(erasing: RandomErasing, images: Tensor, batch: Batch, *, seed: int) -> None:
    """Erase random rectangles of images [N, 3, H, W] in place, each draw keyed by its sample.

    It seeds the global generators.
    """
    samples = zip(batch.epochs.tolist(), batch.sample_ids.tolist(), strict=True)
    for row, (epoch, sample_id) in enumerate(samples):
        seed_globals(sample_rng(seed, epoch, sample_id, ERASE_STREAM))
        erasing(images[row])


def normalized(images: Tensor, normalize: nn.Module) -> Tensor:
    """Return images uint8 [N, 3, H, W] as normalised float32 of the same shape."""
    # [N, 3, H, W] -> [N, H, W, 3] to be normalised -> [N, 3, H, W]
    return normalize(images.movedim(1, -1)).movedim(-1, 1).contiguous()


def seed_globals(rng: np.random.Generator) -> None:
    """Seed `random`, numpy's and torch's global generators."""
    random.seed(int(rng.integers(2**63)))
    np.random.seed(int(rng.integers(2**32)))
    torch.manual_seed(int(rng.integers(2**63)))
