"""timm's random erasing, mixup and cutmix for a whole micro-batch, each image keyed, for classifiers.

timm draws from the global generators of `random`, numpy and torch; they are seeded before every draw. In
the trainer two consecutive images of the global batch are mixed with each other, by one draw keyed by the
first one's (epoch, sample id): so the images of a step are the same on any number of ranks, with any gradient
accumulation and after any resume. timm's own batch mode makes one draw a micro-batch and mixes the first
image with the last: the same distribution for each image, but tied to how the batch is cut.

All numbers are drawn on the host and then applied to all images at once: one image or pair at a time would be
hundreds of small kernels on a GPU.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from timm.data import Mixup
from timm.data.mixup import cutmix_bbox_and_lam, mixup_target, one_hot
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
            erase_rectangles(self.config.erase, images, batch, seed=self.seed)
        smoothing = self.config.label_smoothing
        if self.mix is None:
            return images, mixup_target(batch.labels, self.num_classes, lam=1.0, smoothing=smoothing)
        assert len(images) % 2 == 0, "the schema keeps the two images of a mix in one micro-batch"
        epochs, ids, draws = batch.epochs.tolist(), batch.sample_ids.tolist(), []
        for first in range(0, len(images), 2):
            seed_globals(sample_rng(self.seed, epochs[first], ids[first], MIX_STREAM))
            draws.append(draw_mix(self.mix, images.shape))
        off = smoothing / self.num_classes
        labels = one_hot(batch.labels, self.num_classes, on_value=1.0 - smoothing + off, off_value=off)
        return mix_pairs(images, labels, draws)


def draw_mix(mix: Mixup, shape: torch.Size) -> tuple[float, ...]:
    """Draw how two images of this shape are mixed, as timm's batch mode does for a micro-batch of two.

    Returns the shares of the own and of the other label, those of the own and of the other image, and the
    rectangle (top, bottom, left, right) in which the other image replaces the own one.
    """
    lam, is_cut = mix._params_per_batch()
    if lam == 1.0 or not is_cut:
        return (lam, 1.0 - lam, lam, 1.0 - lam, 0, 0, 0, 0)
    rectangle, lam = cutmix_bbox_and_lam(
        shape, lam, ratio_minmax=mix.cutmix_minmax, correct_lam=mix.correct_lam
    )
    return (lam, 1.0 - lam, 1.0, 0.0, *rectangle)


def mix_pairs(images: Tensor, labels: Tensor, draws: list[tuple[float, ...]]) -> tuple[Tensor, Tensor]:
    """Mix consecutive images [N, 3, H, W] and labels [N, C] two by two, by N / 2 draws of `draw_mix`."""
    numbers = to_device(torch.tensor(draws, dtype=torch.float32), images.device)  # [N / 2, 8]
    height, width = images.shape[-2:]
    # [N, ...] -> [N / 2, 2, ...]
    pairs, pair_labels = images.unflatten(0, (-1, 2)), labels.unflatten(0, (-1, 2))
    own_label, other_label = numbers[:, 0, None, None], numbers[:, 1, None, None]
    mixed_labels = pair_labels * own_label + pair_labels.flip(1) * other_label
    own, other, top, bottom, left, right = numbers[:, 2:, None, None, None, None].unbind(1)
    others = pairs.flip(1)
    rows = torch.arange(height, device=images.device)[:, None]
    columns = torch.arange(width, device=images.device)
    # [N / 2, 1, 1, H, W]
    is_cut = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    mixed = torch.where(is_cut, others, pairs * own + others * other)
    return mixed.flatten(0, 1), mixed_labels.flatten(0, 1)


def erase_rectangles(probability: float, images: Tensor, batch: Batch, *, seed: int) -> None:
    """Fill a random rectangle of some images [N, 3, H, W] with noise, in place; each is keyed by its sample.

    It seeds the global generators.
    """
    erasing = RandomErasing(probability, mode="pixel", device="cpu")
    rows, noises = [], []
    samples = zip(batch.epochs.tolist(), batch.sample_ids.tolist(), strict=True)
    for row, (epoch, sample_id) in enumerate(samples):
        seed_globals(sample_rng(seed, epoch, sample_id, ERASE_STREAM))
        image = _Written(images.shape[1:], images.dtype)
        erasing(image)
        if image.pixels is not None:
            rows.append(row)
            noises.append(image.pixels)
    if not rows:
        return
    noise, index = (to_device(tensor, images.device) for tensor in (torch.stack(noises), torch.tensor(rows)))
    images.index_copy_(0, index, torch.where(noise.isnan(), images.index_select(0, index), noise))


class _Written:
    """Takes the place of an image [3, H, W], and keeps what is written into it; the rest is NaN."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype):
        self.shape, self.dtype = shape, dtype
        self.pixels: Tensor | None = None

    def size(self) -> torch.Size:
        return self.shape

    def __setitem__(self, place: tuple[slice, ...], pixels: Tensor) -> None:
        if self.pixels is None:
            self.pixels = torch.full(self.shape, torch.nan, dtype=self.dtype)
        self.pixels[place] = pixels


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy what was drawn on the host, without waiting for a GPU that is busy."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def normalized(images: Tensor, normalize: nn.Module) -> Tensor:
    """Return images uint8 [N, 3, H, W] as normalised float32 of the same shape."""
    # [N, 3, H, W] -> [N, H, W, 3] to be normalised -> [N, 3, H, W]
    return normalize(images.movedim(1, -1)).movedim(-1, 1).contiguous()


def seed_globals(rng: np.random.Generator) -> None:
    """Seed `random`, numpy's and torch's global generators."""
    random.seed(int(rng.integers(2**63)))
    np.random.seed(int(rng.integers(2**32)))
    torch.manual_seed(int(rng.integers(2**63)))
