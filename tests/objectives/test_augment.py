"""Mixing and erasing all images at once gives, bit for bit, what timm gives one image or pair at a time."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch.utils._python_dispatch import TorchDispatchMode

from dmae_ds.config.objectives import AugmentConfig
from dmae_ds.data.batch import Batch
from dmae_ds.data.transforms import ERASE_STREAM, sample_rng
from dmae_ds.models.patches import Normalize
from dmae_ds.objectives.augment import MIX_STREAM, MixedImages, normalized, seed_globals

NORMALIZE = Normalize((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
CLASSES, SEED = 5, 3
OFF = {"rand_augment": None, "erase": 0.0, "mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.1}


def make_batch(num: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num, 3, 16, 24), generator=generator, dtype=torch.uint8)
    ids = torch.arange(num)
    return Batch(images, None, ids % CLASSES, ids * 7, ids % 2)


def one_at_a_time(config: AugmentConfig, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    images = normalized(batch.images, NORMALIZE)
    erasing = RandomErasing(config.erase, mode="pixel", device="cpu")
    mix = Mixup(config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=CLASSES)
    epochs, ids, targets = batch.epochs.tolist(), batch.sample_ids.tolist(), []
    if config.erase:
        for row, image in enumerate(images):
            seed_globals(sample_rng(SEED, epochs[row], ids[row], ERASE_STREAM))
            erasing(image)
    for first in range(0, len(images), 2):
        seed_globals(sample_rng(SEED, epochs[first], ids[first], MIX_STREAM))
        pair = slice(first, first + 2)
        targets.append(mix(images[pair], batch.labels[pair])[1])
    return images, torch.cat(targets)


@pytest.mark.parametrize(
    "changes",
    [
        {"mixup": 0.8},
        {"cutmix": 1.0},
        {"mixup": 0.8, "cutmix": 1.0, "erase": 0.5},
        {"mixup": 0.01, "erase": 1.0},  # some pairs are not mixed at all
    ],
    ids=str,
)
def test_all_at_once_is_one_at_a_time(changes):
    config, batch = AugmentConfig(**{**OFF, **changes}), make_batch(48)
    images, targets = MixedImages(config, num_classes=CLASSES, seed=SEED)(batch, NORMALIZE)
    expected, expected_targets = one_at_a_time(config, batch)
    assert torch.equal(images, expected) and torch.equal(targets, expected_targets)
    assert not torch.equal(images, normalized(batch.images, NORMALIZE))
    assert images.is_contiguous() and targets.dtype == torch.float32


class Kernels(TorchDispatchMode):
    """Counts operators on tensors of the whole batch's images, by their number of images."""

    def __init__(self, num: int):
        super().__init__()
        self.num, self.counts = num, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.counts["all" if out.dim() and len(out) in (self.num, self.num // 2) else "other"] += 1
        return out


def test_the_number_of_operations_on_images_does_not_grow_with_them():
    config = AugmentConfig(**{**OFF, "mixup": 0.8, "cutmix": 1.0})
    mixed, counts = MixedImages(config, num_classes=CLASSES, seed=SEED), []
    for num in (8, 128):
        batch = make_batch(num)
        with Kernels(num) as kernels:
            mixed(batch, NORMALIZE)
        counts.append(sum(kernels.counts.values()))
    assert counts[0] == counts[1] < 40
