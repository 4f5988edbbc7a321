"""Schema of the objective `features`: which features of the teacher a student imitates, where, and how."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from dmae_ds.config.objective_base import ObjectiveSection, Section
from dmae_ds.config.teachers import split_name

QUEUE_SIZE = 8192
TAPS, PLACES, BLOCK = ("tokens", "cls", "pooled"), ("tokens", "cls", "mean"), r"block/[1-9]\d*"


class FeatureTarget(Section):
    """One term: a tap of the teacher, a place of the student, a head and a distance between them."""

    name: str | None = None  # of the term in metrics; null: the tap's
    # Of the teacher: tokens, cls (after its final norm), pooled (its attention pool), block/18. Of one of
    # several teachers: dino:block/18.
    tap: str = "tokens"
    # Of the student: tokens, cls (after its final norm), mean (of its patch tokens), block/9. `tokens` and
    # blocks are compared with `tokens` and blocks, `cls` and `mean` with `cls` and `pooled`.
    student: str = "tokens"
    # all: CLS, where both have one, and every patch that the student sees; patches: those alone; masked,
    # visible: patches by the student's mask.
    where: Literal["all", "patches", "masked", "visible"] = "all"
    head: Literal["linear", "norm_linear", "mlp2"] = "linear"  # from the student's width to the teacher's
    cls_head: str | None = None  # name of the term by whose head CLS goes, with where all; null: its own
    distance: Literal["l1", "l2", "smooth_l1", "cosine", "kl"] = "l2"  # kl: of softmaxes, teacher || student
    beta: PositiveFloat | None = None  # of smooth_l1: d^2 / (2 beta) below it, |d| - beta / 2 above; null: 1
    # l2: features of both of length 1; standard: each of the teacher's tokens minus its mean over
    # sqrt(unbiased variance + 1e-6).
    normalize: Literal["none", "l2", "standard"] = "none"
    weight: NonNegativeFloat = 1.0  # of the term in the loss
    # What kl's softmax is over: channels; queue: products with past targets of the teacher; patches: products
    # with the other patches of the image. null: channels.
    over: Literal["channels", "queue", "patches"] | None = None
    temperature: PositiveFloat | None = None  # of kl; null: 0.07
    queue_size: PositiveInt | None = None  # past images in the queue, with over queue; null: 8192

    @property
    def label(self) -> str:
        """The term's name in metrics."""
        return self.name or self.tap

    @property
    def is_vector(self) -> bool:
        """Whether an image has one vector instead of tokens."""
        return self.place in ("cls", "pooled")

    @property
    def teacher(self) -> str:
        """Name of the teacher; "" where the recipe has one."""
        return split_name(self.tap)[0]

    @property
    def place(self) -> str:
        """The tap without its teacher's name."""
        return split_name(self.tap)[1]

    @field_validator("tap", "student")
    @classmethod
    def _place_is_known(cls, value: str, info: ValidationInfo) -> str:
        is_tap = info.field_name == "tap"
        words, place = (TAPS, split_name(value)[1]) if is_tap else (PLACES, value)
        if place not in words and not re.fullmatch(BLOCK, place):
            raise ValueError(f"'{value}' is unknown; choose {', '.join(words)}, or a block such as block/9")
        return value

    @model_validator(mode="after")
    def _parts_go_together(self):
        if self.is_vector != (self.student in ("cls", "mean")):
            raise ValueError(
                f"tap {self.tap} does not go with student {self.student}; compare tokens and blocks with "
                "tokens and blocks, and cls and pooled with cls and mean"
            )
        if self.is_vector and self.where != "all":
            raise ValueError(f"where {self.where} requires tokens, and tap {self.tap} is one vector an image")
        if self.cls_head is not None and (self.is_vector or self.where != "all"):
            raise ValueError(
                f"cls_head requires tokens and where=all, found tap {self.tap}, where {self.where}"
            )
        for key, wanted in (("beta", "smooth_l1"), ("over", "kl"), ("temperature", "kl")):
            if getattr(self, key) is not None and self.distance != wanted:
                raise ValueError(f"{key} requires distance={wanted}, found {self.distance}")
        if self.queue_size is not None and self.over != "queue":
            raise ValueError(f"queue_size requires over=queue, found {self.over}")
        if self.over == "queue" and not self.is_vector:
            raise ValueError(f"over=queue requires tap cls or pooled, found {self.tap}")
        if self.over == "patches" and (self.is_vector or self.where == "all"):
            raise ValueError(
                f"over=patches compares patches of an image: it requires a tap of tokens and where=patches, "
                f"masked or visible; found tap {self.tap}, where {self.where}"
            )
        return self


class FeatureMask(Section):
    """The student's mask: patches are replaced by a mask token, or dropped."""

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5  # int(patches * ratio) of an image are masked
    shape: Literal["random", "block"] = "random"  # block: rectangles, as BEiT draws them
    # tokens: a trained mask token in their place, before positions are added; drop: the student does not see
    # them, as in masked autoencoding.
    by: Literal["tokens", "drop"] = "tokens"
    # A second pass of the student, on whole images: terms with where all and patches are of it, those with
    # where masked and visible of the masked one (Proteus).
    whole_pass: bool = False
    every: PositiveInt = 1  # one image of so many is masked, with whole_pass

    @model_validator(mode="after")
    def _parts_go_together(self):
        if self.by == "drop" and self.whole_pass:
            raise ValueError("whole_pass requires by=tokens, found drop; set objective.mask.by=tokens")
        if self.every > 1 and not self.whole_pass:
            raise ValueError(
                f"every {self.every} requires whole_pass=true, or images without a mask would have no term"
            )
        return self


class FeaturesConfig(ObjectiveSection):
    """Imitation of a frozen network's features, of whole or masked images (Proteus, MaskDistill)."""

    needs_teacher: ClassVar[bool] = True
    takes_several_teachers: ClassVar[bool] = True
    newer_keys: ClassVar[tuple[str, ...]] = ("teacher_drop",)
    name: Literal["features"]
    # The terms of the loss.
    targets: tuple[FeatureTarget, ...] = (FeatureTarget(),)
    mask: FeatureMask | None = None  # of the student; null: it sees whole images, as the teacher
    # Of several teachers, each image keeps the one with the largest loss and drops each other one with this
    # probability (UNIC: 0.5); 0: all are kept.
    teacher_drop: Annotated[float, Field(ge=0, lt=1)] = 0.0
    photometric: Literal["jitter"] | None = None  # colours of the student's copy of the crop alone

    @property
    def tapped(self) -> tuple[str, ...]:
        """Taps of the targets, each once."""
        return tuple(dict.fromkeys(target.tap for target in self.targets))

    @property
    def mix_group_size(self) -> int:
        """Number of consecutive images of which one is masked."""
        return 1 if self.mask is None else self.mask.every

    @property
    def mask_key(self) -> str | None:
        return None if self.mask is None else "objective.mask.ratio"

    @property
    def dropped_share(self) -> float:
        """Share of the patches that the student does not see; 0 where mask tokens stand for them."""
        return self.mask.ratio if self.mask is not None and self.mask.by == "drop" else 0.0

    @property
    def judged_by(self) -> Literal["mean", "cls"]:
        """Where a collapse shows: in CLS, where no term reads a patch."""
        return "cls" if all(target.student == "cls" for target in self.targets) else "mean"

    def summary(self) -> str:
        """Return the name, the terms, and the mask."""
        terms = ", ".join(target.label for target in self.targets)
        mask = "whole images" if self.mask is None else f"mask ratio {self.mask.ratio:g} ({self.mask.by})"
        return f"{self.name} ({terms}), {mask}"

    def check_batch(self, global_batch: int) -> None:
        for target in self.targets:
            size = target.queue_size or QUEUE_SIZE
            if target.over == "queue" and size < global_batch:
                raise ValueError(
                    f"queue_size {size} of objective.targets '{target.label}' is below "
                    f"optim.global_batch {global_batch}; make the queue as long as the batch or longer"
                )

    @field_validator("targets")
    @classmethod
    def _names_are_unique(cls, targets: tuple[FeatureTarget, ...]) -> tuple[FeatureTarget, ...]:
        if not targets:
            raise ValueError("targets is empty; give one, such as {tap: tokens, student: tokens}")
        labels = [target.label for target in targets]
        twice = {label for label in labels if labels.count(label) > 1}
        if twice:
            raise ValueError(f"several targets are called {', '.join(sorted(twice))}; give each a name")
        for target in targets:
            vectors = {
                other.label for other in targets if other.student == "cls" and other.teacher == target.teacher
            }
            if target.cls_head is not None and target.cls_head not in vectors:
                raise ValueError(
                    f"cls_head {target.cls_head} of target {target.label} is no target with student=cls; "
                    f"choose {', '.join(sorted(vectors)) or 'null, and give CLS its own head'}"
                )
        return targets

    @model_validator(mode="after")
    def _places_exist(self):
        for target in self.targets:
            if target.where == "masked" and (self.mask is None or self.mask.by == "drop"):
                raise ValueError(
                    f"where=masked of target {target.label} requires objective.mask.by=tokens; a student has "
                    "features of masked patches only where mask tokens stand for them"
                )
            if target.where == "visible" and self.mask is None:
                raise ValueError(f"where=visible of target {target.label} requires objective.mask")
        if self.teacher_drop and len({target.teacher for target in self.targets}) < 2:
            raise ValueError("teacher_drop requires targets of several teachers; remove it, or set it to 0")
        if self.teacher_drop and self.mask is not None and self.mask.every > 1:
            raise ValueError(
                f"teacher_drop compares all losses of an image, and with mask.every {self.mask.every} not "
                "every image has all of them; set objective.mask.every=1"
            )
        places = {target.where in ("masked", "visible") for target in self.targets}
        if self.mask is not None and self.mask.whole_pass and len(places) < 2:
            raise ValueError(
                "mask.whole_pass requires targets of both passes: some with where all or patches, some with "
                "where masked or visible"
            )
        return self
