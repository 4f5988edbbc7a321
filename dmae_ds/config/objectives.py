"""Schemas of the objectives, one class each; `dmae_ds.objectives.OBJECTIVES` holds the modules under the same names.

An objective gets its own section of the recipe and nothing else. Defaults are the paper's (DMAE, Sec. 4.1); where the
published code does otherwise, the switch stands here and `launch/recipes/dmae_published_code.yaml` sets it.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, values are final once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DecoderConfig(Section):
    """MAE's pixel decoder (MAE, Sec. 3; DMAE, Table 3b: depth 8)."""

    depth: PositiveInt = 8
    embed_dim: PositiveInt = 512
    num_heads: PositiveInt = 16


class MaskedPixels(Section):
    """What every objective with masked patches and a pixel loss shares."""

    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    # How many patches stay visible: `round` gives the paper's ten at .95 and four at .98, `int` the code's nine and three.
    patch_count: Literal["round", "int"] = "round"
    norm_pix: bool = False
    decoder: DecoderConfig = DecoderConfig()


class MaeConfig(MaskedPixels):
    """Plain masked autoencoding: no teacher (MAE; DMAE Eq. 1)."""

    needs_teacher: ClassVar[bool] = False
    name: Literal["mae"]


class DmaeConfig(MaskedPixels):
    """Pixels plus the imitation of a frozen teacher's features (DMAE, Eq. 1-3)."""

    needs_teacher: ClassVar[bool] = True
    name: Literal["dmae"]
    # [student block, teacher block], counted from 1; null: both at three quarters of their depth (Sec. 4.1).
    pairs: Annotated[list[tuple[PositiveInt, PositiveInt]], Field(min_length=1)] | None = None
    head: Literal["linear", "mlp2", "mlp3"] = "mlp2"
    distance: Literal["l1", "l2", "smooth_l1", "cosine"] = "l1"
    normalize: Literal["none", "l2"] = "none"
    alpha: Annotated[float, Field(ge=0)] = 1.0


ObjectiveConfig = Annotated[MaeConfig | DmaeConfig, Field(discriminator="name")]
