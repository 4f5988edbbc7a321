"""Schemas of the objectives, one class each; `dmae_ds.objectives.OBJECTIVES` holds the modules under the same names.

An objective gets its own section of the recipe and nothing else. Defaults are the paper's (DMAE, Sec. 4.1); where the
published code does otherwise, the switch stands here and `launch/recipes/dmae_published_code.yaml` sets it.
"""

from __future__ import annotations

import importlib
import re
from typing import Annotated, Any, Callable, ClassVar, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    ValidationError,
    WrapValidator,
    field_validator,
    model_validator,
)

from dmae_ds.config.objective_base import (
    DecoderConfig,
    FeatureDistillationConfig,
    MaskedPatches,
    MaskedPixels,
    ObjectiveSection,
    Section,
)

__all__ = ["DecoderConfig", "FeatureDistillationConfig", "MaskedPatches", "ObjectiveSection", "Section"]

Momentum = Annotated[float, Field(ge=0, le=1)]
RAND_AUGMENT = r"rand(-(m\d+|n\d+|p0?\.\d+|mstd\d*\.?\d+|mmax\d+|inc[01]))*"


class MaeConfig(MaskedPixels):
    """Plain masked autoencoding: no teacher (MAE; DMAE Eq. 1)."""

    name: Literal["mae"]


class DmaeConfig(FeatureDistillationConfig, MaskedPixels):
    """Pixels plus the imitation of a frozen teacher's features (DMAE, Eq. 1-3)."""

    needs_teacher: ClassVar[bool] = True
    distillation_key: ClassVar[str] = "objective"
    name: Literal["dmae"]

    @property
    def distillation(self) -> FeatureDistillationConfig:
        """The objective's own settings."""
        return self


class MoCoV3Config(ObjectiveSection):
    """Contrastive learning over the global batch, with a momentum encoder (MoCo-v3; its published numbers for ViT-B); alone, or with DMAE's term (DMAE, Table 9)."""

    # Keys of all ranks are the negatives, and batch norm's statistics are theirs: accumulated micro-batches would be batches of their own.
    needs_whole_batch: ClassVar[bool] = True
    judged_by: ClassVar[Literal["mean", "cls"]] = "cls"
    name: Literal["mocov3"]
    temperature: PositiveFloat = 0.2
    momentum: Annotated[float, Field(ge=0, le=1)] = 0.99  # of the first step; rises to 1 by half a cosine
    hidden_dim: PositiveInt = 4096  # of projector and predictor
    output_dim: PositiveInt = 256
    freeze_patch_projection: bool = True
    photometric: bool = True  # colours, blur and solarisation as in BYOL; false: crops and flips alone
    distill: FeatureDistillationConfig | None = None

    @property
    def needs_teacher(self) -> bool:
        return self.distill is not None


class SdaeConfig(MaskedPatches):
    """Features of masked patches, by an EMA teacher that sees only those (SdAE; Sec. 2 and the published script)."""

    name: Literal["sdae"]
    # What the EMA teacher sees of a picture: the masked patches cut into `folds`, each by itself; all masked patches at once; the
    # whole picture; or one crop of the masked patches, `crop_ratio` of them (Table 1, Figure 4b).
    teacher_sees: Literal["folds", "masked", "all", "crop"] = "folds"
    folds: Annotated[int, Field(ge=2)] | None = None  # null: 3 (Sec. 4.3), with teacher_sees folds
    crop_ratio: Annotated[float, Field(gt=0, lt=1)] | None = (
        None  # null: 1/3, as large as one of three folds, with teacher_sees crop
    )
    # channels: the paper's Eq. 4, token by token; tokens: what the published code computes, for each channel over a fold's tokens.
    cosine_over: Literal["channels", "tokens"] = "channels"
    momentum: tuple[Momentum, Momentum] = (
        0.96,
        0.99,
    )  # Eq. 7: of the first and of the last update, by half a cosine
    momentum_every: Literal["epoch", "step"] = (
        "epoch"  # the paper's Sec. 4.2: once a step is very sensitive to its value
    )

    @model_validator(mode="after")
    def _nothing_is_ignored(self):
        for name, sees in (("folds", "folds"), ("crop_ratio", "crop")):
            if getattr(self, name) is not None and self.teacher_sees != sees:
                raise ValueError(
                    f"{name} is of no use to teacher_sees {self.teacher_sees}; set objective.teacher_sees={sees}, or remove it"
                )
        return self


class DinoConfig(ObjectiveSection):
    """Views of one picture agree on prototypes, by an EMA teacher that sees the large ones (DINO; the published script for ViT-B/16); alone, or with DMAE's term (DMAE, Table 9)."""

    judged_by: ClassVar[Literal["mean", "cls"]] = "cls"
    name: Literal["dino"]
    num_prototypes: Annotated[int, Field(ge=2)] = 65536
    hidden_dim: PositiveInt = 2048  # of the head's three layers
    bottleneck_dim: PositiveInt = 256
    # Two global crops have the student's img_size and data.crop_scale, which is [.25, 1] in the published script.
    local_crops: NonNegativeInt = 10
    local_size: PositiveInt = 96  # px
    local_scale: tuple[PositiveFloat, PositiveFloat] = (0.05, 0.25)  # share of the picture's area
    photometric: bool = True  # colours, blur and solarisation as in BYOL; false: crops and flips alone
    student_temperature: PositiveFloat = 0.1
    teacher_temperature: tuple[PositiveFloat, PositiveFloat] = (
        0.04,
        0.07,
    )  # of the first step, and after the warm-up
    teacher_temperature_warmup_epochs: NonNegativeFloat = 50.0
    momentum: Momentum = 0.996  # of the first step; rises to 1 by half a cosine
    center_momentum: Momentum = 0.9
    freeze_last_layer_epochs: NonNegativeFloat = 1.0
    distill: FeatureDistillationConfig | None = None

    @property
    def needs_teacher(self) -> bool:
        return self.distill is not None

    def check_epochs(self, epochs: float) -> None:
        warmup = self.teacher_temperature_warmup_epochs
        if warmup > epochs:
            raise ValueError(
                f"objective.teacher_temperature_warmup_epochs {warmup:g} is above optim.epochs {epochs:g}; shorten the warm-up or train longer"
            )

    @model_validator(mode="after")
    def _crops_can_be(self):
        low, high = self.local_scale
        if not low <= high <= 1:
            raise ValueError(
                f"local_scale [{low:g}, {high:g}] is not a range of area shares; give 0 < low <= high <= 1"
            )
        for name in ("local_size", "local_scale"):
            if self.local_crops == 0 and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is of no use without local_crops; set that above 0, or remove it")
        return self

    @model_validator(mode="after")
    def _warmup_is_one(self):
        first, last = self.teacher_temperature
        if (first == last) != (self.teacher_temperature_warmup_epochs == 0):
            raise ValueError(
                f"teacher_temperature [{first:g}, {last:g}] with teacher_temperature_warmup_epochs {self.teacher_temperature_warmup_epochs:g}; "
                "give two temperatures and a warm-up, or one twice and no warm-up"
            )
        return self


class AugmentConfig(Section):
    """What happens to a training picture after crop and flip, and to its label."""

    rand_augment: str | None = "rand-m9-mstd0.5-inc1"  # timm's notation
    erase: Annotated[float, Field(ge=0, le=1)] = 0.25  # probability that a rectangle is replaced by noise
    mixup: NonNegativeFloat = 0.8  # alpha of the Beta distribution; 0: never
    cutmix: NonNegativeFloat = 1.0  # likewise; with both, a coin decides
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1

    @property
    def mixes(self) -> bool:
        """Whether pictures are mixed, two by two."""
        return bool(self.mixup or self.cutmix)

    @field_validator("rand_augment")
    @classmethod
    def _timm_understands_it(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(RAND_AUGMENT, value):
            raise ValueError(f"'{value}' is not timm's notation; write rand-m9-mstd0.5-inc1, say, or null")
        return value


class G2sdGenericConfig(MaskedPatches):
    """A student's decoder imitates the decoder of a whole frozen MAE, under one mask (G2SD, stage 1; its supplement, Tables 4 and 5)."""

    needs_teacher: ClassVar[bool] = True
    name: Literal["g2sd_generic"]
    target: Literal["features", "reconstruction", "reconstruction_and_pixels"] = "features"  # Table 4
    decoder_block: PositiveInt | None = (
        None  # of the teacher's decoder, from 1, with target features; null: half of it, which is 4 of 8
    )
    # all: every patch and CLS, as the published script; masked: the paper's text. null: all; masked for a reconstruction, which has no other.
    tokens: Literal["all", "masked"] | None = None
    norm_pix: bool = False  # with reconstruction_and_pixels: whether the teacher reconstructs normalised patches, as mae_pretrain_*_full.pth does

    @model_validator(mode="after")
    def _nothing_is_ignored(self):
        if self.target != "features" and self.decoder_block is not None:
            raise ValueError(
                f"decoder_block is of no use to target {self.target}; set objective.target=features, or remove it"
            )
        if self.target != "features" and self.tokens == "all":
            raise ValueError(
                f"tokens all with target {self.target}: it has targets at masked patches alone; set objective.tokens=masked"
            )
        if self.target != "reconstruction_and_pixels" and self.norm_pix:
            raise ValueError(
                f"norm_pix is of no use to target {self.target}; set objective.target=reconstruction_and_pixels, or remove it"
            )
        return self


class G2sdSpecificConfig(ObjectiveSection):
    """Labels, and a fine-tuned teacher's decisions through a distillation token (G2SD, stage 2; DeiT's hard distillation)."""

    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True
    judged_by: ClassVar[Literal["mean", "cls"]] = "cls"
    name: Literal["g2sd_specific"]
    augment: AugmentConfig = AugmentConfig()

    @property
    def mix_group_size(self) -> int:
        """Two pictures are mixed with each other."""
        return 2 if self.augment.mixes else 1


def plain_mae(objective: ObjectiveSection) -> MaeConfig:
    """Plain MAE with the mask and the decoder of an objective that has them, otherwise MAE's."""
    names = [name for name in MaskedPixels.model_fields if hasattr(objective, name)]
    return MaeConfig(name="mae", **{name: getattr(objective, name) for name in names})


def find_own(name: str) -> type | None:
    """The class that `module:Class` names, an objective of your own with its schema as `Config`; None for a shipped one's name. Raises ValueError."""
    module, colon, attribute = name.partition(":")
    if not colon:
        return None
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"name '{name}' can't be imported ({error}); give module:Class, or the name of a shipped objective"
        ) from None
    if not issubclass(getattr(found, "Config", Section), ObjectiveSection):
        raise ValueError(
            f"name '{name}' has no schema: give the class a `Config`, a subclass of dmae_ds.config.objectives.ObjectiveSection"
        )
    return found


def _read_own(value: Any, shipped: Callable[[Any], Any]) -> Any:
    name = value.get("name") if isinstance(value, dict) else None
    own = find_own(name) if isinstance(name, str) else None
    if own is None:
        return shipped(value)
    try:
        return own.Config.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


ShippedObjective = Annotated[
    MaeConfig | DmaeConfig | MoCoV3Config | SdaeConfig | DinoConfig | G2sdGenericConfig | G2sdSpecificConfig,
    Field(discriminator="name"),
]
ObjectiveConfig = Annotated[ShippedObjective, WrapValidator(_read_own), SerializeAsAny()]
