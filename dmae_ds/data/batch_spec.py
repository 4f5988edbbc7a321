"""Settings of training batches: crops, order, and which images are this rank's.

Plain values without torch. Worker processes receive a pickled copy and compute every batch from it
(batch.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dmae_ds.data.pixels import RGB, PixelFormat
from dmae_ds.data.views import View
from dmae_ds.errors import UserError

Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class BatchSpec:
    """Settings of training batches; a rank has `accumulation` micro-batches of `micro_batch` images a step.

    With `repeat` above 1 a decoded image gives that many batch rows, each with its own crops and mask; steps,
    global_batch and micro_batch count rows. With a `subset` an epoch is those samples alone, in an order of
    their own.
    """

    img_size: int
    num_patches: int  # length of the mask noise
    crop_scale: tuple[float, float]  # share of the image's area
    flip: bool
    seed: int
    global_batch: int
    micro_batch: int
    accumulation: int = 1
    rank: int = 0
    world_size: int = 1
    views: tuple[View, ...] = (View(),)  # crops of each image (`Batch.views`); the mask belongs to the first
    repeat: int = 1  # divides micro_batch
    crop: str = "torchvision"  # a name in transforms.CROPS
    augment: Augment | None = None  # called with each view, uint8 [3, H, W]
    subset: np.ndarray | None = None  # ids [n] of the samples that are used; None: all
    block: int = 1  # consecutive samples that are read at once (order.py)
    pixels: PixelFormat = RGB  # what images are decoded to
    replay: int | None = None  # step s shows what step s % replay showed; None: every step is new

    def check(self) -> None:
        """Raise UserError for settings that contradict each other."""
        product = self.micro_batch * self.accumulation * self.world_size
        if self.global_batch != product:
            raise UserError(
                f"global_batch {self.global_batch} is not micro_batch {self.micro_batch} x accumulation "
                f"{self.accumulation} x world_size {self.world_size} = {product}"
            )
        if self.micro_batch % self.repeat:
            raise UserError(
                f"data.repeat {self.repeat} does not divide the micro-batch of {self.micro_batch} images; "
                f"change data.repeat or optim.micro_batch"
            )
        if self.subset is not None and self.block > 1:
            raise UserError(
                f"data.block {self.block} reads many consecutive samples for the few of a subset; set "
                f"data.block=1"
            )
