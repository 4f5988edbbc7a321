"""RandAugment of timm for the loader's workers, seeded by the sample's key.

Images are the same in any worker and after any resume.
"""

from __future__ import annotations

import random

import numpy as np
from PIL import Image, ImageOps
from timm.data import rand_augment_transform


class RandAugment:
    """RandAugment of timm on views, uint8 [3, H, W].

    spec: timm's notation, such as rand-m9-mstd0.5-inc1
    mean: mean colour of the data, which fills the pixels that a shift or a rotation uncovers
    """

    def __init__(self, spec: str, *, img_size: int, mean: tuple[float, float, float]):
        # as in timm.data.create_transform: shifts of at most .45 of the side, bicubic, the data's mean colour
        fill = tuple(min(255, round(255 * value)) for value in mean)
        self.transform = rand_augment_transform(
            spec,
            {
                "translate_const": int(img_size * 0.45),
                "img_mean": fill,
                "interpolation": Image.Resampling.BICUBIC,
            },
        )
        for op in self.transform.ops:
            if op.name.startswith("Posterize"):
                op.aug_fn = _posterize

    def __call__(self, view: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        # timm draws from the global generators of `random` and numpy
        random.seed(int(rng.integers(2**63)))
        np.random.seed(int(rng.integers(2**32)))
        image = self.transform(Image.fromarray(np.ascontiguousarray(view.transpose(1, 2, 0))))
        return np.array(image).transpose(2, 0, 1)


def _posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    """Posterize, also to the 0 bits of timm's full magnitude: a black image, which Pillow 13.0 refuses."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return ImageOps.posterize(image, min(8, bits_to_keep))
