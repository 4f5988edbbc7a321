"""Random erasing, mixup and cutmix, timm's, each keyed before it draws (objectives/augment.py says how).

The key is that of what is drawn for: (seed, epoch, sample) for a picture, (seed, step, piece) for a micro-batch, the piece being its
place in the global batch. So pictures, mixes and dropped paths are the same on any workers, after any resume, and on any
number of ranks that cut the global batch into the same micro-batches.
"""

from __future__ import annotations

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

from dmae_ds.config.objectives import AugmentConfig
from dmae_ds.data.batch import Batch
from dmae_ds.data.transforms import sample_rng
from dmae_ds.models.patches import Normalize
from dmae_ds.objectives.augment import MIX_STREAM, erase_rectangles, normalized, seed_globals

# Keyed by step and piece instead of epoch and sample: streams beyond those of a sample (data/transforms.py).
DROP_PATH_STREAM = 101


class Prepare:
    """A micro-batch as the loader gives it -> what a classifier trains on, on its device.

    augment None: normalised pictures and their labels, nothing else
    """

    def __init__(
        self,
        augment: AugmentConfig | None,
        normalize: Normalize,
        *,
        num_classes: int,
        seed: int,
        device: torch.device,
    ):
        self.normalize, self.seed = normalize, seed
        self.erasing = (
            RandomErasing(augment.erase, mode="pixel", device=device)
            if augment is not None and augment.erase
            else None
        )
        mixes = augment is not None and augment.mixes
        self.mix = (
            Mixup(
                augment.mixup,
                augment.cutmix,
                label_smoothing=augment.label_smoothing,
                num_classes=num_classes,
            )
            if mixes
            else None
        )
        # mixed labels are smoothed by the mixing
        self.label_smoothing = 0.0 if augment is None or mixes else augment.label_smoothing

    def criterion(self) -> nn.CrossEntropyLoss:
        """The labels' loss; it takes classes [N], and the probabilities [N, C] that mixing makes of them."""
        return nn.CrossEntropyLoss(label_smoothing=self.label_smoothing)

    def __call__(self, batch: Batch, *, step: int, piece: int) -> tuple[Tensor, Tensor]:
        """Returns images [N, 3, H, W] float32 and labels [N] int64, mixed ones [N, C] float32. Reseeds the global generators."""
        images = normalized(batch.images, self.normalize)
        if self.erasing is not None:
            erase_rectangles(self.erasing, images, batch, seed=self.seed)
        if self.mix is None:
            return images, batch.labels
        seed_globals(sample_rng(self.seed, step, piece, MIX_STREAM))
        return self.mix(images, batch.labels)

    def seed_drop_path(self, *, step: int, piece: int) -> None:
        """Key what the network draws in its next forward pass."""
        seed_globals(sample_rng(self.seed, step, piece, DROP_PATH_STREAM))
