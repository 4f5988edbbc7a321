"""Segmenters: a timm ViT, a neck, and UperNet (transformers' head) or a linear head.

    logits = segmenter(pixels)      # normalised [N, C, H, W], any size -> [N, classes, H, W]

UperNet's neck makes maps of strides 4, 8, 16 and 32 px of a ViT of patch 16 (MAE, A.4, after BEiT).
"""

from __future__ import annotations

import math

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from dmae_ds.config.segmentation import LinearHeadConfig, UperNetConfig
from dmae_ds.dense.backbone import block_maps, keep_maps, map_blocks
from dmae_ds.dense.norm import BatchNormOverRanks, norm_over_ranks
from dmae_ds.errors import UserError

AUXILIARY_MAP = 2  # of the neck's four maps


class Neck(nn.Module):
    """Four maps of one grid to x4, x2, x1 and /2 of it: transposed convolutions, identity, max pooling."""

    def __init__(self, dim: int):
        super().__init__()
        self.levels = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(dim, dim, 2, stride=2),
                    BatchNormOverRanks(dim),
                    nn.GELU(),
                    nn.ConvTranspose2d(dim, dim, 2, stride=2),
                ),
                nn.ConvTranspose2d(dim, dim, 2, stride=2),
                nn.Identity(),
                # ceil_mode: also of a grid of one patch
                nn.MaxPool2d(2, stride=2, ceil_mode=True),
            ]
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Four times [N, D, h, w] -> [N, D, 4h, 4w], [N, D, 2h, 2w], [N, D, h, w], [N, D, h/2, w/2]."""
        return [level(one) for level, one in zip(self.levels, maps, strict=True)]


class UperNet(nn.Module):
    """Neck, UperNet's head, and in training an auxiliary head on the third map."""

    norm = False  # whether the maps are behind the ViT's final norm

    def __init__(self, config: UperNetConfig, *, dim: int, depth: int, num_classes: int):
        super().__init__()
        classes = _transformers_heads()
        settings = classes.UperNetConfig(
            hidden_size=config.channels,
            pool_scales=config.pool_scales,
            num_labels=num_classes,
            auxiliary_channels=config.auxiliary_channels,
        )
        self.blocks = map_blocks(depth)
        self.neck = Neck(dim)
        self.head = norm_over_ranks(classes.UperNetHead(settings, [dim] * 4))
        self.auxiliary = norm_over_ranks(classes.UperNetFCNHead(settings, [dim] * 4, in_index=AUXILIARY_MAP))
        self.apply(_initialize)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Logits [N, classes, 4h, 4w] of the ViT's four maps [N, D, h, w]."""
        return self.head(self.neck(maps))

    def both(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The logits, and those of the auxiliary head [N, classes, h, w]."""
        levels = self.neck(maps)
        return self.head(levels), self.auxiliary(levels)


class LinearHead(nn.Module):
    """Batch norm, dropout and a 1x1 convolution on the last block's map (DINOv3, linear segmentation)."""

    norm = True

    def __init__(self, config: LinearHeadConfig, *, dim: int, depth: int, num_classes: int):
        super().__init__()
        self.blocks = [depth]
        self.batch_norm = BatchNormOverRanks(dim)
        self.dropout = nn.Dropout2d(config.dropout)
        self.classifier = nn.Conv2d(dim, num_classes, 1)
        self.apply(_initialize)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Logits [N, classes, h, w] of the map [N, D, h, w]."""
        return self.classifier(self.dropout(self.batch_norm(maps[0])))

    def both(self, maps: list[Tensor]) -> tuple[Tensor, None]:
        """The logits, and None: there is no auxiliary head."""
        return self(maps), None


HEADS = {"upernet": UperNet, "linear": LinearHead}


class Segmenter(nn.Module):
    """A ViT with one of HEADS.

    frozen: the ViT stays in eval mode and gets no gradients
    """

    def __init__(
        self,
        vit: VisionTransformer | Eva,
        config: UperNetConfig | LinearHeadConfig,
        *,
        num_classes: int,
        seed: int,
        frozen: bool = False,
    ):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.decoder = HEADS[config.name](
                config, dim=vit.embed_dim, depth=len(vit.blocks), num_classes=num_classes
            )
        keep_maps(vit, norm=self.decoder.norm)
        self.backbone, self.frozen = vit.requires_grad_(not frozen), frozen
        self.num_classes = num_classes

    def train(self, mode: bool = True) -> Segmenter:
        """Set training mode, but of a frozen ViT."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def logit_maps(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits on the head's grid, and the auxiliary head's if there is one.

        images: normalised [N, C, H, W]
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = block_maps(self.backbone, images, self.decoder.blocks, norm=self.decoder.norm)
        return self.decoder.both(maps)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes, H, W] in float32 of normalised images [N, C, H, W]."""
        maps = block_maps(self.backbone, images, self.decoder.blocks, norm=self.decoder.norm)
        return self.to_pixels(self.decoder(maps), images)

    def to_pixels(self, logits: Tensor, images: Tensor) -> Tensor:
        """Enlarge logits to the images' size, bilinear: [N, classes, H, W] in float32.

        A grid of patches may end outside of the image; that part is cut off.
        """
        height, width = images.shape[2:]
        size = [_round_up(side, patch) for side, patch in zip((height, width), self.patch_size, strict=True)]
        enlarged = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
        return enlarged[..., :height, :width]

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return tuple(self.backbone.patch_embed.patch_size)


def _round_up(side: int, patch: int) -> int:
    return math.ceil(side / patch) * patch


def _initialize(module: nn.Module) -> None:
    """As the published code of these heads: He's normal for convolutions, N(0, .01^2) for the last one."""
    if not isinstance(module, nn.Conv2d):
        return
    if module.bias is None:
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    else:  # convolutions before a batch norm have no bias
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)


def _transformers_heads():
    """transformers' module of UperNet. Raises UserError where it is not installed."""
    try:
        from transformers.models.upernet import modeling_upernet
    except ImportError:
        raise UserError(
            'head.name upernet requires transformers, which is not installed; pip install "dmae-ds[dense]"'
        ) from None
    return modeling_upernet
