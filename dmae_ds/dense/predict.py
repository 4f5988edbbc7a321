"""Classes of every pixel of an image of any size, by a segmenter and sliding windows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import resize

from dmae_ds.config.segmentation import SegmentConfig
from dmae_ds.data.dense_transforms import fit_size
from dmae_ds.dense.segmenter import Segmenter
from dmae_ds.errors import UserError
from dmae_ds.evaluate.windows import slide
from dmae_ds.models.patches import Normalize
from dmae_ds.objectives.augment import normalized

LONGEST = 4  # times the short side: ADE20K's common evaluation resizes into 2048 x 512


@dataclass(frozen=True)
class Predictor:
    """Resizes an image, averages logits over windows, and resizes them back.

    short_side: of the resized image, in px, less where the long side would be more than LONGEST times it
    window, stride: in px
    """

    short_side: int
    window: int
    stride: int

    @classmethod
    def of(cls, config: SegmentConfig, img_size: int) -> Predictor:
        """The recipe's, for a network that was trained on crops of img_size px.

        Raises UserError for windows that would leave pixels out.
        """
        if config.stride is not None and config.stride > img_size:
            raise UserError(
                f"stride {config.stride} is more than network.img_size {img_size}, the side of the windows; "
                "choose a smaller one"
            )
        stride = config.stride or max(1, img_size * 2 // 3)
        return cls(config.short_side or img_size, img_size, stride)

    @torch.inference_mode()
    def __call__(self, segmenter: Segmenter, image: Tensor, normalize: Normalize) -> Tensor:
        """Predict int64 [H, W] for an image uint8 [C, H, W] on the segmenter's device, in eval mode."""
        height, width = image.shape[1:]
        size = fit_size(height, width, self.short_side, LONGEST * self.short_side)
        pixels = normalized(resize(image[None], list(size), antialias=True), normalize)
        logits = slide(pixels, segmenter, window=self.window, stride=self.stride)
        logits = F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
        return logits[0].argmax(dim=0)
