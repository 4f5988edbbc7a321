"""timm's random erasing, mixup and cutmix, each with a keyed random generator (see objectives/augment.py).

The key is (seed, epoch, sample) for an image and (seed, step, piece) for a micro-batch, where `piece` is its
place in the global batch. So images, mixes and dropped paths are the same for any number of workers, after
any resume, and on any number of ranks that cut the global batch into the same micro-batches.
"""

from __future__ import annotations

from timm.data import Mixup
from torch import Tensor, nn

from dmae_ds.config.objectives import AugmentConfig
from dmae_ds.data.batch import Batch
from dmae_ds.data.transforms import sample_rng
from dmae_ds.models.patches import Normalize
from dmae_ds.objectives.augment import MIX_STREAM, erase_rectangles, normalized, seed_globals

# Keyed by step and piece instead of epoch and sample, so its number is above those of the samples' streams
# (data/transforms.py).
DROP_PATH_STREAM = 101


class Prepare:
    """Turns a micro-batch of the loader into the images and labels that a classifier trains on.

    augment: None for normalised images and their labels, nothing else
    """

    def __init__(
        self,
        augment: AugmentConfig | None,
        normalize: Normalize,
        *,
        num_classes: int,
        seed: int,
    ):
        self.normalize, self.seed = normalize, seed
        self.erase, self.mix, self.label_smoothing = 0.0, None, 0.0
        if augment is None:
            return
        self.erase = augment.erase
        if augment.mixes:  # which smooths the labels, too
            self.mix = Mixup(
                augment.mixup,
                augment.cutmix,
                label_smoothing=augment.label_smoothing,
                num_classes=num_classes,
            )
        else:
            self.label_smoothing = augment.label_smoothing

    def criterion(self) -> nn.CrossEntropyLoss:
        """The labels' loss, for classes [N] and for the probabilities [N, C] of mixed labels."""
        return nn.CrossEntropyLoss(label_smoothing=self.label_smoothing)

    def __call__(self, batch: Batch, *, step: int, piece: int) -> tuple[Tensor, Tensor]:
        """Normalise, erase and mix. Reseeds the global generators.

        Returns images [N, 3, H, W] float32 and labels [N] int64, or [N, C] float32 if they are mixed.
        """
        images = normalized(batch.images, self.normalize)
        if self.erase:
            erase_rectangles(self.erase, images, batch, seed=self.seed)
        if self.mix is None:
            return images, batch.labels
        seed_globals(sample_rng(self.seed, step, piece, MIX_STREAM))
        return self.mix(images, batch.labels)

    def seed_drop_path(self, *, step: int, piece: int) -> None:
        """Seed the random numbers of the network's next forward pass."""
        seed_globals(sample_rng(self.seed, step, piece, DROP_PATH_STREAM))
