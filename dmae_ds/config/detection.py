"""Schema of the recipes that train a detector: `dmae-ds eval detect`.

Defaults are ViTDet's for ViT-B and COCO, with Mask R-CNN in place of the cascade (ViTDet, A.2).
"""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from dmae_ds.config.objective_base import Section


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
