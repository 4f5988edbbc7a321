"""The images that CRD contrasts a training image with (CRD, ICLR 2020, Sec. 3.2 and its published sampler).

Every draw is keyed by (seed, epoch, sample id): the same on any rank, in any worker and after any resume.
"""

from __future__ import annotations

import numpy as np

from dmae_ds.config.evaluation import CrdConfig, FinetuneConfig, LinearConfig
from dmae_ds.data.batch import Batch
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.transforms import sample_rng
from dmae_ds.errors import UserError
from dmae_ds.evaluate.subsets import read_labels

CONTRAST_STREAM = 102  # beyond the streams of a sample (data/transforms.py)


class Contrast:
    """The training images in use, by class; an image's place in `ids` is its row in the memory.

    ids: rising sample ids [n] int64; labels: the classes [n] int64; seed: with (epoch, sample id), the key of
    every draw
    Raises UserError if only one class has images.
    """

    def __init__(self, ids: np.ndarray, labels: np.ndarray, config: CrdConfig, *, seed: int):
        self.ids, self.config, self.seed = ids, config, seed
        self._by_class = np.argsort(labels, kind="stable")  # places, ordered by class
        in_order = labels[self._by_class]
        # The places of a sample's class are by_class[first:stop].
        self._first = np.searchsorted(in_order, labels, side="left")
        self._stop = np.searchsorted(in_order, labels, side="right")
        if len(ids) and self._stop[0] - self._first[0] == len(ids):
            raise UserError(
                "distill.method crd draws images of other classes, but all training images are of one class; "
                "give data.train with at least 2 classes, or more labels"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def draw(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Return places [N] of a batch's images, and places [N, 1 + K] to score, the positive first."""
        places = np.searchsorted(self.ids, batch.sample_ids.numpy())
        keys = zip(batch.epochs.tolist(), batch.sample_ids.tolist(), places.tolist(), strict=True)
        return places, np.stack([self._draw_one(*key) for key in keys])

    def _draw_one(self, epoch: int, sample_id: int, place: int) -> np.ndarray:
        rng = sample_rng(self.seed, epoch, sample_id, CONTRAST_STREAM)
        first, stop, num = self._first[place], self._stop[place], self.config.num_negatives
        positive = place
        if self.config.positives == "relax":
            positive = self._by_class[rng.integers(first, stop)]
        num_others = len(self.ids) - (stop - first)
        # Without replacement, unless there are fewer images of other classes.
        others = rng.choice(num_others, num, replace=num > num_others)
        others += np.where(others >= first, stop - first, 0)
        return np.concatenate([[positive], self._by_class[others]])


def open_contrast(
    config: FinetuneConfig | LinearConfig, train_set: ShardSet, ids: np.ndarray
) -> Contrast | None:
    """Return the images that the recipe's CRD draws from; None for any other recipe. Raises UserError."""
    distill = getattr(config, "distill", None)
    if distill is None or distill.crd is None:
        return None
    return Contrast(ids, read_labels(train_set)[ids], distill.crd, seed=config.run.seed)
