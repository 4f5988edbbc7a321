"""Schemas of the objectives that imitate a frozen teacher's relations, or one that sees more patches."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from dmae_ds.config.objective_base import DecoderConfig, MaskedPatches, ObjectiveSection, Section

Pairs = Annotated[list[tuple[PositiveInt, PositiveInt]], Field(min_length=1)]


class TinyMimConfig(ObjectiveSection):
    """Imitation of a frozen MAE's attention relations, on whole images (TinyMIM, Sec. 3)."""

    needs_teacher: ClassVar[bool] = True
    name: Literal["tinymim"]
    # Block of the teacher whose relations are imitated, counted from 1; null: at three quarters of its depth,
    # as 18 of MAE-L's 24. The paper takes 12 of MAE-B's 12.
    teacher_block: PositiveInt | None = None
    photometric: bool = True  # brightness, contrast and saturation of the student's copy, not the teacher's


class GeneratorConfig(Section):
    """Blocks of the teacher's width that turn a student's tokens into those of further patches (AMD)."""

    depth: PositiveInt = 2  # number of blocks
    num_heads: PositiveInt | None = None  # attention heads of a block; null: one for each 64 channels


class AmdConfig(MaskedPatches):
    """Pixels, and features of a teacher that sees more patches than the student (AMD, CVPR 2024).

    It requires teacher.sees=superset with a lower teacher.mask_ratio.
    """

    needs_teacher: ClassVar[bool] = True
    distillation_weight: ClassVar[str] = "objective.direct_weight or objective.generative_weight"
    name: Literal["amd"]
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = (
        0.9  # share of the patches that the student does not see
    )
    decoder: DecoderConfig = DecoderConfig(depth=4)
    # [student block, teacher block], counted from 1; null: the middle and the last block of both networks.
    direct: Pairs | None = None  # compared at the student's patches
    generative: Pairs | None = None  # compared at the patches that only the teacher sees
    generator: GeneratorConfig = GeneratorConfig()
    distance: Literal["l2", "l1", "smooth_l1"] = "l2"  # of both alignments
    pixel_weight: PositiveFloat = 1.0  # weight of the reconstruction
    direct_weight: PositiveFloat = 1.0  # weight of the mean over direct pairs
    generative_weight: PositiveFloat = 1.0  # weight of the mean over generative pairs
    # separate: each alignment has its own maps to the teacher's width; shared: the published code, whose i-th
    # map serves the i-th pair of both.
    projection: Literal["separate", "shared"] = "separate"
    # false: the published code, where the generators' mask tokens stay as they were drawn.
    train_mask_tokens: bool = True
    positions: Literal["2d", "1d"] = (
        "2d"  # sin-cos code of the student; 1d: over the patch's number, published
    )
    # Target of the reconstruction. patch: MAE's, by each patch's mean and variance; channel: the published
    # code, by those of each colour of a patch; raw: pixels from 0 to 1.
    pixels: Literal["patch", "channel", "raw"] = "patch"

    @model_validator(mode="after")
    def _maps_can_be_shared(self):
        counts = [2 if pairs is None else len(pairs) for pairs in (self.direct, self.generative)]
        if self.projection == "shared" and counts[0] != counts[1]:
            raise ValueError(
                f"projection=shared has one map for a direct and a generative pair, found {counts[0]} and "
                f"{counts[1]} pairs; give as many of both, or set objective.projection=separate"
            )
        return self
