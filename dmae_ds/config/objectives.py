"""Schemas of the recipe's `objective` section, one class for each objective of dmae_ds/objectives/.

Defaults are those of each paper (for `dmae`: DMAE, Sec. 4.1). Where DMAE's published code differs, there is
an option for it here, and `launch/recipes/dmae_published_code.yaml` sets it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Callable, ClassVar, Literal

from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    field_validator,
    model_validator,
)

from dmae_ds.config.adapt import AdaptConfig
from dmae_ds.config.features import FeaturesConfig
from dmae_ds.config.imitation import AmdConfig, TinyMimConfig
from dmae_ds.config.objective_base import (
    DecoderConfig,
    FeatureDistillationConfig,
    MaskedPatches,
    MaskedPixels,
    ObjectiveSection,
    Section,
)
from dmae_ds.config.own_code import import_own

__all__ = ["DecoderConfig", "FeatureDistillationConfig", "MaskedPatches", "ObjectiveSection", "Section"]

Momentum = Annotated[float, Field(ge=0, le=1)]
RAND_AUGMENT = r"rand(-(m\d+|n\d+|p0?\.\d+|mstd\d*\.?\d+|mmax\d+|inc[01]))*"


class MaeConfig(MaskedPixels):
    """Plain masked autoencoding, without a teacher (MAE; DMAE, Eq. 1)."""

    name: Literal["mae"]


class DmaeConfig(FeatureDistillationConfig, MaskedPixels):
    """Masked autoencoding plus feature distillation from a frozen teacher (DMAE, Eq. 1-3)."""

    needs_teacher: ClassVar[bool] = True
    distillation_key: ClassVar[str] = "objective"
    name: Literal["dmae"]

    @property
    def distillation(self) -> FeatureDistillationConfig:
        """The objective's own settings."""
        return self


class MoCoV3Config(ObjectiveSection):
    """Contrastive learning over the global batch (MoCo-v3), alone or with distillation (DMAE, Table 9).

    Defaults are the published ones for ViT-B.
    """

    # Keys of all ranks are the negatives and the statistics of batch norm: each micro-batch would be a batch
    # by itself.
    needs_whole_batch: ClassVar[bool] = True
    judged_by: ClassVar[Literal["mean", "cls"]] = "cls"
    name: Literal["mocov3"]
    temperature: PositiveFloat = 0.2  # of the contrastive loss
    momentum: Momentum = 0.99  # at the first step; rises to 1 by half a cosine
    hidden_dim: PositiveInt = 4096  # width of projector and predictor
    output_dim: PositiveInt = 256  # width of what is compared
    freeze_patch_projection: bool = True  # keep the random patch embedding, against instability
    photometric: bool = True  # colours, blur and solarisation as in BYOL; false: crops and flips only
    distill: FeatureDistillationConfig | None = None

    @property
    def needs_teacher(self) -> bool:
        return self.distill is not None


class SdaeConfig(MaskedPatches):
    """Prediction of masked patches' features, given by an EMA teacher that sees only those (SdAE, Sec. 2)."""

    name: Literal["sdae"]
    # What the EMA teacher sees of an image. folds: the masked patches in `folds` groups, each group alone;
    # masked: all masked patches; all: the whole image; crop: one crop of the masked patches, `crop_ratio` of
    # them (Table 1, Figure 4b).
    teacher_sees: Literal["folds", "masked", "all", "crop"] = "folds"
    folds: Annotated[int, Field(ge=2)] | None = None  # with teacher_sees folds; null: 3 (Sec. 4.3)
    # With teacher_sees crop; null: 1/3, as large as one of three folds.
    crop_ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    # channels: Eq. 4, for each token over its channels; tokens: the published code, for each channel over a
    # fold's tokens.
    cosine_over: Literal["channels", "tokens"] = "channels"
    # Eq. 7: at the first and at the last update, with half a cosine between them.
    momentum: tuple[Momentum, Momentum] = (0.96, 0.99)
    # How often the EMA teacher is updated. The paper (Sec. 4.2) found updates at every step very sensitive to
    # the momentum.
    momentum_every: Literal["epoch", "step"] = "epoch"

    @model_validator(mode="after")
    def _nothing_is_ignored(self):
        for name, sees in (("folds", "folds"), ("crop_ratio", "crop")):
            if getattr(self, name) is not None and self.teacher_sees != sees:
                raise ValueError(
                    f"{name} requires teacher_sees={sees}, found {self.teacher_sees}; "
                    f"set objective.teacher_sees={sees}, or remove {name}"
                )
        return self


class DinoConfig(ObjectiveSection):
    """Views of an image agree on prototypes (DINO), alone or with distillation (DMAE, Table 9).

    The EMA teacher sees the global crops. Defaults are those of the published script for ViT-B/16.
    """

    judged_by: ClassVar[Literal["mean", "cls"]] = "cls"
    name: Literal["dino"]
    num_prototypes: Annotated[int, Field(ge=2)] = 65536  # outputs of the head
    hidden_dim: PositiveInt = 2048  # width of the head's three layers
    bottleneck_dim: PositiveInt = 256  # width before the prototypes
    # The two global crops have the student's img_size and data.crop_scale ([.25, 1] in the published script).
    local_crops: NonNegativeInt = 10
    local_size: PositiveInt = 96  # px
    local_scale: tuple[PositiveFloat, PositiveFloat] = (0.05, 0.25)  # shares of the image's area
    photometric: bool = True  # colours, blur and solarisation as in BYOL; false: crops and flips only
    student_temperature: PositiveFloat = 0.1  # of the softmax over prototypes
    teacher_temperature: tuple[PositiveFloat, PositiveFloat] = (0.04, 0.07)  # first step; after the warm-up
    teacher_temperature_warmup_epochs: NonNegativeFloat = 50.0  # linear, from the first to the second
    momentum: Momentum = 0.996  # at the first step; rises to 1 by half a cosine
    center_momentum: Momentum = 0.9  # of the mean that is subtracted from the EMA teacher's outputs
    freeze_last_layer_epochs: NonNegativeFloat = 1.0  # at the start, in which the prototypes stay
    distill: FeatureDistillationConfig | None = None

    @property
    def needs_teacher(self) -> bool:
        return self.distill is not None

    def check_epochs(self, epochs: float) -> None:
        warmup = self.teacher_temperature_warmup_epochs
        if warmup > epochs:
            raise ValueError(
                f"objective.teacher_temperature_warmup_epochs {warmup:g} is above optim.epochs {epochs:g}; "
                "shorten the warm-up or train longer"
            )

    @model_validator(mode="after")
    def _crops_are_possible(self):
        low, high = self.local_scale
        if not low <= high <= 1:
            raise ValueError(
                f"local_scale [{low:g}, {high:g}] is not a range of area shares; give 0 < low <= high <= 1"
            )
        for name in ("local_size", "local_scale"):
            if self.local_crops == 0 and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} requires local_crops above 0; set that, or remove {name}")
        return self

    @model_validator(mode="after")
    def _warmup_changes_the_temperature(self):
        first, last = self.teacher_temperature
        warmup = self.teacher_temperature_warmup_epochs
        if (first == last) != (warmup == 0):
            raise ValueError(
                f"teacher_temperature [{first:g}, {last:g}] does not go with "
                f"teacher_temperature_warmup_epochs {warmup:g}; "
                "give two temperatures and a warm-up, or one twice and no warm-up"
            )
        return self


class AugmentConfig(Section):
    """Augmentation of a training image and its label after crop and flip."""

    rand_augment: str | None = "rand-m9-mstd0.5-inc1"  # timm's notation; null: none
    erase: Annotated[float, Field(ge=0, le=1)] = 0.25  # probability that a rectangle is replaced by noise
    mixup: NonNegativeFloat = 0.8  # alpha of the Beta distribution; 0: never
    cutmix: NonNegativeFloat = 1.0  # likewise; where both are set, one is drawn at random
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1  # share of the label spread over all classes

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs."""
        return bool(self.mixup or self.cutmix)

    @field_validator("rand_augment")
    @classmethod
    def _timm_understands_it(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(RAND_AUGMENT, value):
            raise ValueError(
                f"'{value}' is not timm's notation; write for example rand-m9-mstd0.5-inc1, or null"
            )
        return value


class G2sdGenericConfig(MaskedPatches):
    """Imitation of a frozen MAE's decoder under the same mask (G2SD, stage 1; supplement, Tables 4 and 5)."""

    needs_teacher: ClassVar[bool] = True
    name: Literal["g2sd_generic"]
    target: Literal["features", "reconstruction", "reconstruction_and_pixels"] = "features"  # Table 4
    # Block of the teacher's decoder, counted from 1, with target features; null: the middle one (4 of 8).
    decoder_block: PositiveInt | None = None
    # all: every patch and CLS (published script); masked: masked patches (paper's text). null: all for target
    # features, else masked.
    tokens: Literal["all", "masked"] | None = None
    # With target reconstruction_and_pixels: whether the teacher reconstructs normalised patches, as
    # mae_pretrain_*_full.pth do.
    norm_pix: bool = False

    @model_validator(mode="after")
    def _nothing_is_ignored(self):
        target = self.target
        if target != "features" and self.decoder_block is not None:
            raise ValueError(
                f"decoder_block requires target=features, found {target}; "
                "set objective.target=features, or remove decoder_block"
            )
        if target != "features" and self.tokens == "all":
            raise ValueError(
                f"tokens=all requires target=features, found {target}, whose targets are masked patches; "
                "set objective.tokens=masked"
            )
        if target != "reconstruction_and_pixels" and self.norm_pix:
            raise ValueError(
                f"norm_pix requires target=reconstruction_and_pixels, found {target}; "
                "set objective.target=reconstruction_and_pixels, or remove norm_pix"
            )
        return self


class G2sdSpecificConfig(ObjectiveSection):
    """Labels and a fine-tuned teacher's decisions, by a distillation token (G2SD, stage 2; DeiT)."""

    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True
    judged_by: ClassVar[Literal["mean", "cls"]] = "cls"
    trains_positions: ClassVar[bool] = True
    name: Literal["g2sd_specific"]
    augment: AugmentConfig = AugmentConfig()

    @property
    def mix_group_size(self) -> int:
        """Number of images that are mixed with each other."""
        return 2 if self.augment.mixes else 1


def plain_mae(objective: ObjectiveSection) -> MaeConfig:
    """Plain MAE with the mask and the decoder of an objective that has them, otherwise MAE's."""
    names = [name for name in MaskedPixels.model_fields if hasattr(objective, name)]
    return MaeConfig(name="mae", **{name: getattr(objective, name) for name in names})


def find_own(name: str) -> type | None:
    """Import an objective of your own, named `module:Class`; None for the name of a shipped one.

    The class has its schema as `Config`. Raises ValueError where it can't be imported or has none.
    """
    if ":" not in name:
        return None
    try:
        objective = import_own(name)
    except ImportError as error:
        raise ValueError(
            f"name '{name}' can't be imported ({error}); "
            "give module:Class, or the name of a shipped objective"
        ) from None
    if not issubclass(getattr(objective, "Config", Section), ObjectiveSection):
        raise ValueError(
            f"name '{name}' has no schema; give the class a `Config`, "
            "a subclass of dmae_ds.config.objectives.ObjectiveSection"
        )
    return objective


class UnknownObjective(ObjectiveSection):
    """Section of an objective of your own whose code is not here, where only the student is needed."""

    model_config = ConfigDict(extra="allow")
    name: str


def _read_own(value: Any, read_shipped: Callable[[Any], Any], info: ValidationInfo) -> Any:
    """Validate an objective section: by the class's own `Config`, or by the shipped schemas."""
    name = value.get("name") if isinstance(value, dict) else None
    if isinstance(name, str) and ":" in name and (info.context or {}).get("student_only"):
        return UnknownObjective.model_validate(value)
    objective = find_own(name) if isinstance(name, str) else None
    if objective is None:
        return read_shipped(value)
    try:
        return objective.Config.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


ShippedObjective = Annotated[
    MaeConfig
    | DmaeConfig
    | MoCoV3Config
    | SdaeConfig
    | DinoConfig
    | G2sdGenericConfig
    | G2sdSpecificConfig
    | TinyMimConfig
    | AmdConfig
    | FeaturesConfig
    | AdaptConfig,
    Field(discriminator="name"),
]
ObjectiveConfig = Annotated[ShippedObjective, WrapValidator(_read_own), SerializeAsAny()]
