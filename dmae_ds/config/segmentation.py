"""Schema of the recipes of `dmae-ds eval segment`. Defaults: MAE's UperNet of ViT-B on ADE20K."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from dmae_ds.config.dense import DenseConfig
from dmae_ds.config.objective_base import Section
from dmae_ds.config.run import Unit


class UperNetConfig(Section):
    """UperNet on four maps of the ViT (Xiao et al. 2018), with an auxiliary convolution in training."""

    name: Literal["upernet"]
    channels: PositiveInt = 768  # width of the head; BEiT's small ones have 512
    # Sides of the grids that the last map is pooled to.
    pool_scales: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 3, 6)
    auxiliary_channels: PositiveInt = 256  # width of the auxiliary head on the third map
    auxiliary_weight: NonNegativeFloat = 0.4  # weight of its loss


class LinearHeadConfig(Section):
    """Batch norm, dropout and one linear layer on the last block's map."""

    name: Literal["linear"]
    dropout: Unit = 0.1  # share of the map's channels that are left out of an image in training


HeadSection = Annotated[UperNetConfig | LinearHeadConfig, Field(discriminator="name")]


class SegmentDistillConfig(Section):
    """Distillation of a larger segmenter's logits, pixel by pixel (G2SD, supplement 1.3)."""

    teacher: str  # best.safetensors of `dmae-ds eval segment`, of the same classes
    weight: PositiveFloat = 3.0  # of the divergence, next to the loss of the label maps
    temperature: PositiveFloat = 1.0  # of both softmaxes; the loss is multiplied by its square


class SegmentAugmentConfig(Section):
    """What training sees of an image; crops have network.img_size px."""

    scale: tuple[PositiveFloat, PositiveFloat] = (0.5, 2.0)  # of the image before it is cropped
    # Largest share of a crop that one class may fill; other crops are drawn instead, ten at most. 1: any.
    max_class_share: Annotated[float, Field(gt=0, le=1)] = 0.75
    flip: bool = True  # mirror half of the crops
    photometric: bool = True  # brightness, contrast, saturation and hue

    @model_validator(mode="after")
    def _scale_is_a_range(self):
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"augment.scale {list(self.scale)} is not a range; give low <= high")
        return self


class SegmentConfig(DenseConfig):
    """Training of a segmenter on label maps: the ViT with a head, or with frozen=true the head alone."""

    head: HeadSection = UperNetConfig(name="upernet")
    frozen: bool = False  # train the head alone
    augment: SegmentAugmentConfig = SegmentAugmentConfig()
    # Short side that images are resized to, in px, before scale jitter and in validation; null:
    # network.img_size, the side of crops and windows.
    short_side: PositiveInt | None = None
    stride: PositiveInt | None = None  # of the windows, in px; null: two thirds of network.img_size
    distill: SegmentDistillConfig | None = None

    @model_validator(mode="after")
    def _frozen_has_no_drop_path(self):
        if self.frozen and (self.drop_path or self.optim.layer_decay < 1):
            raise ValueError(
                f"frozen trains the head alone, which has no drop_path {self.drop_path:g} and no "
                f"optim.layer_decay {self.optim.layer_decay:g}; set drop_path=0 optim.layer_decay=1"
            )
        return self
