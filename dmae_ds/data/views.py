"""One crop of an image, as an objective specifies it: plain values without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class View:
    """A random resized crop, flipped half of the time if data.flip is on, then changed photometrically.

    Draws are keyed by (seed, epoch, sample id, number of the view); see `transforms.sample_rng`.
    """

    size: int | None = None  # px; None: the student's img_size
    scale: tuple[float, float] | None = None  # share of the image's area; None: data.crop_scale
    photometric: str = "none"  # a name in photometric.PHOTOMETRIC
    copy_of: int | None = None  # an earlier view's place: the same crop and flip as that, before its changes
