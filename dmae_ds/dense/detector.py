"""torchvision's Mask R-CNN on a ViT with a feature pyramid: "ViTDet-style", or the plain heads of 2017.

Left out of ViTDet's published code: relative positions, the cascade, RoIAlign shifted by half a pixel.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from timm.layers import LayerNorm2d
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from dmae_ds.config.detection import DetectorConfig
from dmae_ds.dense.backbone import map_blocks
from dmae_ds.dense.pyramid import SCALES, FourMapPyramid, SimplePyramid
from dmae_ds.dense.trunk import VitTrunk, quarter_ends
from dmae_ds.errors import UserError

NUM_LEVELS = len(SCALES) + 1
ASPECT_RATIOS = (0.5, 1.0, 2.0)
ANCHOR_SCALE = 8  # edge of a level's anchor in strides: 32 to 512 px for patches of 16

PYRAMIDS = {"simple": SimplePyramid, "fpn": FourMapPyramid}


class Backbone(nn.Module):
    """Trunk and pyramid, as torchvision's detectors take them."""

    def __init__(self, trunk: VitTrunk, pyramid: nn.Module, out_channels: int):
        super().__init__()
        self.trunk, self.pyramid, self.out_channels = trunk, pyramid, out_channels

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Map images [N, 3, H, W] to five levels [N, C, h, w]."""
        return self.pyramid(self.trunk(images))


class Canvas(GeneralizedRCNNTransform):
    """torchvision's normalisation, resizing and padding, on a canvas that does not depend on the batch.

    In eval mode images are made smaller as training makes them: antialiased, which torchvision does not do.
    square: edge of the canvas, or None for the smallest one that holds the batch's images
    """

    def __init__(self, *args, square: int | None, **kwargs):
        super().__init__(*args, **kwargs)
        self.square = square

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Bring an image [3, h, w] to the size that torchvision gives it; boxes and masks are left to it."""
        if self.training or target is not None:
            return super().resize(image, target)
        height, width = image.shape[-2:]
        scale = min(self.min_size[-1] / min(height, width), self.max_size / max(height, width))
        size = [int(height * scale), int(width * scale)]
        return F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0], None

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        """Pad normalised images [3, h, w] by zeros, below and on the right, to one batch [N, 3, H, W]."""
        if self.square is None:
            return super().batch_images(images, size_divisible)
        batch = images[0].new_zeros(len(images), len(images[0]), self.square, self.square)
        for place, image in zip(batch, images, strict=True):
            place[:, : image.shape[1], : image.shape[2]] = image
        return batch


class KnownScales(MultiScaleRoIAlign):
    """RoIAlign with the strides of the pyramid's first four levels.

    torchvision guesses them from the first batch, and wrongly where its images are smaller than the canvas.
    """

    def __init__(self, strides: Sequence[int], output_size: int):
        names = [str(number) for number in range(len(strides))]
        super().__init__(names, output_size, sampling_ratio=2)
        self.scales = [1 / stride for stride in strides]
        levels = [stride.bit_length() - 1 for stride in strides]  # log2
        # A box of 224 px belongs to the level of stride 16 (FPN, Eq. 1).
        self.map_levels = initLevelMapper(levels[0], levels[-1], canonical_scale=224, canonical_level=4)


class Detector(MaskRCNN):
    """Mask R-CNN whose training pass also returns what distillation compares.

    Images are float [3, h, w] from 0 to 1, of any sizes; targets are {"boxes" [M, 4], "labels" [M] from 1,
    "masks" uint8 [M, h, w]}. In eval mode a call returns torchvision's detections.
    """

    def losses(
        self, images: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[dict[str, Tensor], list[Tensor], Tensor]:
        """Losses by torchvision's names, the levels of the pyramid, and the padded batch they are made of."""
        batch, targets = self.transform(images, targets)
        levels = self.backbone(batch.tensors)
        proposals, of_proposals = self.rpn(batch, levels, targets)
        _, of_boxes = self.roi_heads(levels, proposals, batch.image_sizes, targets)
        return {**of_proposals, **of_boxes}, list(levels.values()), batch.tensors

    def pyramid(self, batch: Tensor) -> list[Tensor]:
        """The five levels of the pyramid [N, C, h, w] of a padded batch [N, 3, H, W]."""
        return list(self.backbone(batch).values())

    def objectness(self, levels: list[Tensor]) -> list[Tensor]:
        """Objectness logits [N, A, h, w] of the anchors of each level."""
        return self.rpn.head(levels)[0]


def build_heads(kind: str, channels: int, num_classes: int) -> dict[str, nn.Module]:
    """Heads by their argument of MaskRCNN; num_classes: with background.

    vitdet: two convolutions in the proposals' head, four in the box head, layer norm in box and mask heads
    (ViTDet, A.2); plain: one, none, no norm (Mask R-CNN)
    """
    is_vitdet = kind == "vitdet"
    four, norm = [channels] * 4, LayerNorm2d if is_vitdet else None
    if is_vitdet:
        box_head: nn.Module = FastRCNNConvFCHead((channels, 7, 7), four, [4 * channels], norm_layer=norm)
    else:
        box_head = TwoMLPHead(channels * 7 * 7, 4 * channels)
    return {
        "rpn_head": RPNHead(channels, len(ASPECT_RATIOS), conv_depth=2 if is_vitdet else 1),
        "box_head": box_head,
        "box_predictor": FastRCNNPredictor(4 * channels, num_classes),
        "mask_head": MaskRCNNHeads(channels, four, 1, norm_layer=norm),
        "mask_predictor": MaskRCNNPredictor(channels, channels, num_classes),
    }


def build_trunk(vit: VisionTransformer | Eva, config: DetectorConfig) -> VitTrunk:
    """The trunk of a timm ViT with the recipe's windows and the maps that its pyramid needs.

    Raises UserError for patches, blocks or windows that don't go together.
    """
    depth, patch_size = len(vit.blocks), vit.patch_embed.patch_size[0]
    if patch_size % 4:
        raise UserError(
            f"network.name has patches of {patch_size} px, and a detector's pyramid has strides of a quarter "
            "of a patch in whole pixels; choose a network with patches of 4, 8 or 16 px"
        )
    maps = map_blocks(depth)
    if config.pyramid == "fpn" and len(set(maps)) < len(maps):
        raise UserError(
            f"detector.pyramid fpn takes the maps of four blocks, and the network has {depth}; "
            "set detector.pyramid=simple"
        )
    wanted = quarter_ends(depth) if config.global_blocks is None else config.global_blocks
    beyond = [number for number in wanted if number > depth]
    if beyond:
        raise UserError(f"detector.global_blocks names block {beyond[0]}, and the network has {depth}")
    taps = maps if config.pyramid == "fpn" else [depth]
    return VitTrunk(vit, taps, window=config.window, global_blocks=wanted)


def build_detector(
    trunk: VitTrunk,
    config: DetectorConfig,
    *,
    num_classes: int,
    sizes: tuple[int, int],
    pixels: tuple[Sequence[float], Sequence[float]],
) -> Detector:
    """Put a detector together; new weights are drawn from torch's global generator.

    num_classes: without background
    sizes: in eval mode images are resized to this shorter edge unless the longer one gets longer than the
    second number; equal numbers: on a square canvas. Training images come in their size
    pixels: mean and standard deviation of the channels
    """
    short, long = sizes
    channels = config.channels
    strides = [int(trunk.patch_size / scale) for scale in SCALES]
    anchors = [(ANCHOR_SCALE * stride,) for stride in [*strides, 2 * strides[-1]]]
    detector = Detector(
        Backbone(trunk, PYRAMIDS[config.pyramid](trunk.width, channels), channels),
        rpn_anchor_generator=AnchorGenerator(anchors, (ASPECT_RATIOS,) * len(anchors)),
        rpn_pre_nms_top_n_train=2 * config.proposals,
        rpn_pre_nms_top_n_test=config.proposals,
        rpn_post_nms_top_n_train=config.proposals,
        rpn_post_nms_top_n_test=config.proposals,
        box_batch_size_per_image=config.rois,
        box_roi_pool=KnownScales(strides, 7),
        mask_roi_pool=KnownScales(strides, 14),
        **build_heads(config.heads, channels, num_classes + 1),
    )
    # Every level's stride divides the canvas, so anchors and maps agree to the pixel.
    divisor = 4 * trunk.patch_size
    detector.transform = Canvas(
        short,
        long,
        *pixels,
        size_divisible=divisor,
        square=-(-long // divisor) * divisor if short == long else None,
        _skip_resize=True,
    )
    return detector
