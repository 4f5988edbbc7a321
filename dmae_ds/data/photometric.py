"""Photometric changes of a view, by name: published recipes of DINO, MoCo-v3, TinyMIM, on uint8 images.

DINO (Caron et al. 2021, App. A, after BYOL, App. B) and MoCo-v3 (Chen et al. 2021, Sec. 4.1) share one list:
colour jitter (brightness .4, contrast .4, saturation .2, hue .1, in random order) with probability .8, grey
with .2, Gaussian blur with a radius of .1 to 2 px, solarisation at 128. They differ in how often they blur
and solarise. The changes are torchvision's functions on PIL images, as published, but every number is drawn
here from the view's key: torchvision's classes would draw from torch's global generator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter, ImageOps

BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1
JITTER, GREY = 0.8, 0.2  # probabilities
RADIUS = (0.1, 2.0)  # px, at any size of the view
THRESHOLD = 128


@dataclass(frozen=True)
class Photometric:
    """Photometric changes with two probabilities of their own, `blur` and `solarize`.

    Called with a view, uint8 [3, H, W], and a generator; returns the same shape.
    """

    blur: float
    solarize: float

    def __call__(self, view: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        # Everything is drawn, used or not, so that one change does not shift the draws of the next.
        jitter, grey, blur, solarize = rng.random(4) < (JITTER, GREY, self.blur, self.solarize)
        factors = [rng.uniform(1 - width, 1 + width) for width in (BRIGHTNESS, CONTRAST, SATURATION)]
        hue, order, radius = rng.uniform(-HUE, HUE), rng.permutation(4), rng.uniform(*RADIUS)
        image = Image.fromarray(np.ascontiguousarray(view.transpose(1, 2, 0)))
        if jitter:
            image = _jitter(image, (*factors, hue), order)
        if grey:
            image = image.convert("L").convert("RGB")
        if blur:
            image = image.filter(ImageFilter.GaussianBlur(radius))
        if solarize:
            image = ImageOps.solarize(image, THRESHOLD)
        return np.array(image).transpose(2, 0, 1)


@dataclass(frozen=True)
class ColourJitter:
    """Brightness, contrast and saturation by factors from 1 - width to 1 + width, always, in random order.

    Called as Photometric is. It is torchvision's ColorJitter without a change of hue.
    """

    widths: tuple[float, float, float]

    def __call__(self, view: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        factors = [rng.uniform(1 - width, 1 + width) for width in self.widths]
        order = rng.permutation(3)
        image = Image.fromarray(np.ascontiguousarray(view.transpose(1, 2, 0)))
        return np.array(_jitter(image, tuple(factors), order)).transpose(2, 0, 1)


def _jitter(image: Image.Image, factors: tuple[float, ...], order: np.ndarray) -> Image.Image:
    from torchvision.transforms import functional  # takes a second to import

    changes = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    )
    for number in order:
        image = changes[number](image, factors[number])
    return image


# Values of View.photometric.
PHOTOMETRIC: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray] | None] = {
    "none": None,
    "dino1": Photometric(blur=1.0, solarize=0.0),
    "dino2": Photometric(blur=0.1, solarize=0.2),
    "dino_local": Photometric(blur=0.5, solarize=0.0),
    "moco1": Photometric(blur=1.0, solarize=0.0),
    "moco2": Photometric(blur=0.1, solarize=0.2),
    "jitter": ColourJitter((0.4, 0.4, 0.4)),  # TinyMIM's published script, of the student's copy
}
