"""Schema of the recipes that train a detector: `dmae-ds eval detect`.

Defaults are ViTDet's for ViT-B and COCO, with Mask R-CNN in place of the cascade (ViTDet, A.2).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from dmae_ds.config.dense import DenseConfig, DenseOptimConfig
from dmae_ds.config.objective_base import Section
from dmae_ds.config.run import Unit


class DetectorConfig(Section):
    """Mask R-CNN on a ViT: pyramid, windows, heads."""

    # simple: ViTDet's, from the last map; fpn: an FPN on four blocks' maps (SdAE, Table 4).
    pyramid: Literal["simple", "fpn"] = "simple"
    window: PositiveInt | None = 14  # edge of an attention window in patches; null: global attention
    # Blocks with global attention, counted from 1; null: the last of each quarter: 3, 6, 9, 12 of 12.
    global_blocks: tuple[PositiveInt, ...] | None = None
    # vitdet: two convolutions propose, the box head has four, layer norm; plain: Mask R-CNN's of 2017.
    heads: Literal["vitdet", "plain"] = "vitdet"
    channels: PositiveInt = 256  # of the pyramid and the heads; the box head ends with four times as many
    proposals: PositiveInt = 1000  # boxes of an image that go from the first stage to the second
    rois: PositiveInt = 512  # of them, those that an image trains the box head with

    @model_validator(mode="after")
    def _nothing_is_ignored(self):
        if self.global_blocks is not None and self.window is None:
            raise ValueError(
                "detector.global_blocks requires detector.window; set that too, or remove global_blocks"
            )
        return self


class RichnessConfig(Section):
    """Feature-richness distillation from a larger detector (G2SD, supplement 1.2)."""

    teacher: str  # best.safetensors or last.safetensors of `dmae-ds eval detect`
    alpha: NonNegativeFloat = 0.001  # weight of the pyramids' squared differences
    beta: NonNegativeFloat = 0.1  # weight of the proposals' cross-entropy
    warmup_steps: NonNegativeInt = 500  # linear rise of both weights from 0


class DetectOptimConfig(DenseOptimConfig):
    """ViTDet's training of ViT-B on COCO."""

    global_batch: PositiveInt = 64
    unit: Literal["steps", "epochs"] = "epochs"
    length: PositiveFloat = 100.0
    evaluate_every: PositiveFloat = 5.0
    save_every: PositiveFloat = 1.0
    warmup_steps: NonNegativeInt = 250
    decay: Literal["poly", "cosine", "steps"] = "steps"
    milestones: tuple[Unit, ...] = (0.889, 0.963)
    weight_decay: NonNegativeFloat = 0.1
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.7


class DetectConfig(DenseConfig):
    """A detector that is trained on boxes and masks, and measured by box and mask AP."""

    optim: DetectOptimConfig = DetectOptimConfig()
    detector: DetectorConfig = DetectorConfig()
    # Shorter edge of images in pixels, and the longest that the other may get; null: the longer edge becomes
    # network.img_size, on a square canvas.
    resize: tuple[PositiveInt, PositiveInt] | None = None
    # Training images are resized to this range of shares of the square canvas, then cropped or padded to it
    # (large-scale jitter); null: they are resized as in evaluation.
    jitter: tuple[PositiveFloat, PositiveFloat] | None = (0.1, 2.0)
    flip: bool = True  # mirror half of the training images
    distill: RichnessConfig | None = None

    @model_validator(mode="after")
    def _sizes_agree(self):
        if self.resize is not None and self.resize[0] > self.resize[1]:
            raise ValueError(f"resize {list(self.resize)} has a shorter edge above the longer one; swap them")
        if self.jitter is not None and self.jitter[0] > self.jitter[1]:
            raise ValueError(f"jitter {list(self.jitter)} is not a range; give the smaller factor first")
        if self.jitter is not None and self.resize is not None:
            raise ValueError(
                "jitter is relative to the square canvas, and resize has none; "
                "set jitter=null, or remove resize"
            )
        return self
