"""RandAugment, random erasing, mixup and cutmix, timm's, each keyed before it draws.

timm draws from the global generators of `random`, numpy and torch. Here these are seeded right before every use from the
key of what is drawn for: (seed, epoch, sample) for a picture, (seed, step, piece) for a micro-batch, the piece being its
place in the global batch. So pictures, mixes and dropped paths are the same on any workers, after any resume, and on any
number of ranks that cut the global batch into the same micro-batches.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import Mixup, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

from dmae_ds.config.evaluation import AugmentConfig
from dmae_ds.data.batch import Batch
from dmae_ds.data.transforms import ERASE_STREAM, sample_rng
from dmae_ds.models.patches import Normalize

# Keyed by step and piece instead of epoch and sample: streams beyond those of a sample (data/transforms.py).
MIX_STREAM, DROP_PATH_STREAM = 100, 101


class RandAugment:
    """timm's RandAugment on uint8 [3, H, W], in the loader's workers.

    spec: timm's notation, such as rand-m9-mstd0.5-inc1; mean: of the data, which fills what a shift or turn uncovers
    """

    def __init__(self, spec: str, *, img_size: int, mean: tuple[float, float, float]):
        # as timm.data.create_transform has it: shifts of at most .45 of the side, bicubic, the data's mean colour
        fill = tuple(min(255, round(255 * value)) for value in mean)
        self.transform = rand_augment_transform(spec, {"translate_const": int(img_size * 0.45), "img_mean": fill, "interpolation": Image.Resampling.BICUBIC})
        for op in self.transform.ops:
            if op.name.startswith("Posterize"):
                op.aug_fn = _posterize

    def __call__(self, view: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        random.seed(int(rng.integers(2**63)))
        np.random.seed(int(rng.integers(2**32)))
        image = self.transform(Image.fromarray(np.ascontiguousarray(view.transpose(1, 2, 0))))
        return np.array(image).transpose(2, 0, 1)


def _posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    """At full magnitude timm keeps 0 bits: a black picture, where Pillow still makes one; 13.0 refuses."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return ImageOps.posterize(image, min(8, bits_to_keep))


class Prepare:
    """A micro-batch as the loader gives it -> what a classifier trains on, on its device.

    augment None: normalised pictures and their labels, nothing else
    """

    def __init__(self, augment: AugmentConfig | None, normalize: Normalize, *, num_classes: int, seed: int, device: torch.device):
        self.normalize, self.seed = normalize, seed
        self.erasing = RandomErasing(augment.erase, mode="pixel", device=device) if augment is not None and augment.erase else None
        mixes = augment is not None and (augment.mixup or augment.cutmix)
        self.mix = Mixup(augment.mixup, augment.cutmix, label_smoothing=augment.label_smoothing, num_classes=num_classes) if mixes else None
        # mixed labels are smoothed by the mixing
        self.label_smoothing = 0.0 if augment is None or mixes else augment.label_smoothing

    def criterion(self) -> nn.CrossEntropyLoss:
        """The labels' loss; it takes classes [N], and the probabilities [N, C] that mixing makes of them."""
        return nn.CrossEntropyLoss(label_smoothing=self.label_smoothing)

    def __call__(self, batch: Batch, *, step: int, piece: int) -> tuple[Tensor, Tensor]:
        """Returns images [N, 3, H, W] float32 and labels [N] int64, mixed ones [N, C] float32. Reseeds the global generators."""
        images = normalized(batch.images, self.normalize)
        if self.erasing is not None:
            for row, (epoch, sample_id) in enumerate(zip(batch.epochs.tolist(), batch.sample_ids.tolist(), strict=True)):
                seed_globals(sample_rng(self.seed, epoch, sample_id, ERASE_STREAM))
                self.erasing(images[row])  # in place
        if self.mix is None:
            return images, batch.labels
        seed_globals(sample_rng(self.seed, step, piece, MIX_STREAM))
        return self.mix(images, batch.labels)

    def seed_drop_path(self, *, step: int, piece: int) -> None:
        """Key what the network draws in its next forward pass."""
        seed_globals(sample_rng(self.seed, step, piece, DROP_PATH_STREAM))


def normalized(images: Tensor, normalize: Normalize) -> Tensor:
    """uint8 [N, 3, H, W] -> float32 [N, 3, H, W]."""
    # [N, 3, H, W] -> [N, H, W, 3] to be normalised -> [N, 3, H, W]
    return normalize(images.movedim(1, -1)).movedim(-1, 1).contiguous()


def seed_globals(rng: np.random.Generator) -> None:
    """Seed `random`, numpy's and torch's global generators."""
    random.seed(int(rng.integers(2**63)))
    np.random.seed(int(rng.integers(2**32)))
    torch.manual_seed(int(rng.integers(2**63)))
