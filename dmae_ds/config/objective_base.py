"""What the sections of objectives share: their base class, the mask, the decoder, feature distillation.

`config/objectives.py` has one class an objective, built from these.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, numbers are finite, values are final once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ObjectiveSection(Section):
    """The objective's section of a recipe; every subclass adds `name: Literal["its name"]`.

    The class variables declare what a recipe must bring, as it is known before a network is built; the module
    declares the rest (objectives/needs.py). A subclass may turn each into a property of its settings.

    needs_teacher: a frozen teacher
    takes_several_teachers: whether a recipe may have `teachers`; the module's constructor is then given
        `teachers`, {name: TeacherShape}, also of one teacher, whose name is ""
    needs_labels: labelled shards; the module's constructor is given `num_classes`
    needs_student_weights: weights that the student begins with, student.weights
    needs_whole_batch: all of optim.global_batch at once, without gradient accumulation
    mix_group_size: consecutive images of the global batch that are mixed together and stay in one micro-batch
    judged_by: where a collapse of the features shows: in the mean of the patch tokens, or in CLS, where the
        loss reads nothing else of the last block
    trains_positions: the student's positional embedding
    newer_keys: keys that checkpoints from before December 2026 lack; their defaults are what was done then
    distillation_key: the section that holds the settings of feature distillation
    distillation_weight: the keys that raise distillation's share of the gradient; None: alpha of that section
    """

    needs_teacher: ClassVar[bool] = False
    takes_several_teachers: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    needs_student_weights: ClassVar[bool] = False
    needs_whole_batch: ClassVar[bool] = False
    mix_group_size: ClassVar[int] = 1
    judged_by: ClassVar[Literal["mean", "cls"]] = "mean"
    trains_positions: ClassVar[bool] = False
    newer_keys: ClassVar[tuple[str, ...]] = ()
    distillation_key: ClassVar[str] = "objective.distill"
    distillation_weight: ClassVar[str | None] = None

    @property
    def distillation(self) -> FeatureDistillationConfig | None:
        """The settings of feature distillation; None for an objective without that term."""
        return getattr(self, "distill", None)

    @property
    def tapped(self) -> tuple[str, ...]:
        """Taps of teachers, where the section names them; () where the module alone knows them."""
        return ()

    @property
    def mask_key(self) -> str | None:
        """The recipe's key of the share of masked patches; None for an objective without a mask."""
        return "objective.mask_ratio" if hasattr(self, "mask_ratio") else None

    @property
    def dropped_share(self) -> float:
        """Share of the patches that the student does not see."""
        return getattr(self, "mask_ratio", 0.0)

    def check_epochs(self, epochs: float) -> None:
        """Raise ValueError where a schedule of the objective does not fit into a run of so many epochs."""

    def check_batch(self, global_batch: int) -> None:
        """Raise ValueError where the objective cannot be trained with so many images in a step."""

    def summary(self) -> str:
        """Return the name and the few settings that tell runs apart, for cards."""
        if self.distillation is None or self.distillation is self:
            return self.name
        return f"{self.name}, with feature distillation"

    def facts(self) -> dict[str, object]:
        """Return the settings as flat plain values, under the names by which published results fix them.

        A section inside gives its name as a prefix (`decoder_depth`); feature distillation is at the top
        level.
        """
        facts: dict[str, object] = {}
        for key, value in self.model_dump().items():
            inner = value if isinstance(value, dict) else {}
            facts |= {f"{key}_{name}": setting for name, setting in inner.items()} or {key: value}
        if self.distillation is not None:
            facts |= {key: getattr(self.distillation, key) for key in FeatureDistillationConfig.model_fields}
        return facts


class DecoderConfig(Section):
    """MAE's pixel decoder (MAE, Sec. 3; DMAE, Table 3b: depth 8)."""

    depth: PositiveInt = 8  # number of blocks
    embed_dim: PositiveInt = 512  # width of a token
    num_heads: PositiveInt = 16  # attention heads of a block


class MaskedPatches(ObjectiveSection):
    """Settings of every objective that masks patches and has a decoder predict something of them."""

    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75  # share of the patches that are masked
    # How many patches stay visible: `round` gives the paper's ten at .95 and four at .98, `int` the published
    # code's nine and three.
    patch_count: Literal["round", "int"] = "round"
    decoder: DecoderConfig = DecoderConfig()

    def summary(self) -> str:
        return f"{super().summary()}, mask ratio {self.mask_ratio:g}"


class MaskedPixels(MaskedPatches):
    """Settings of the pixel loss."""

    norm_pix: bool = False  # reconstruct each patch with its own mean and variance (MAE, Table 1d)


class FeatureDistillationConfig(Section):
    """Settings of feature distillation from a frozen teacher's blocks (DMAE, Eq. 2).

    They are `dmae`'s own, and the section `distill` of other objectives.
    """

    # [student block, teacher block], counted from 1; null: both at three quarters of their depth (Sec. 4.1).
    pairs: Annotated[list[tuple[PositiveInt, PositiveInt]], Field(min_length=1)] | None = None
    head: Literal["linear", "mlp2", "mlp3"] = (
        "mlp2"  # from the student's width to the teacher's; 1 to 3 layers
    )
    distance: Literal["l1", "l2", "smooth_l1", "cosine"] = "l1"  # between both features
    normalize: Literal["none", "l2"] = "none"  # l2: features of length 1, as the published code
    alpha: Annotated[float, Field(ge=0)] = 1.0  # weight of the term


# How `null` of a setting reads in the name of a run, where null has a meaning of its own.
NULL_WORDS = {"objective.pairs": "3/4", "objective.distill.pairs": "3/4"}
