"""Schema of the objective `adapt`: a released backbone continues under a larger one, held by an anchor."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import PositiveFloat, model_validator

from dmae_ds.config.features import FeaturesConfig


class AdaptConfig(FeaturesConfig):
    """`features` from student.weights on, with a Gram anchor to that initial student (DINOv3)."""

    needs_student_weights: ClassVar[bool] = True
    name: Literal["adapt"]
    # Weight of the anchor: mean squared difference of the cosines between an image's patches, now and at the
    # start. Not tuned; 2 is DINOv3's weight of its own Gram term.
    anchor: PositiveFloat = 2.0

    def summary(self) -> str:
        """Return the name, the terms, the mask, and the anchor's weight."""
        return f"{super().summary()}, anchor {self.anchor:g}"

    @model_validator(mode="after")
    def _anchor_sees_whole_images(self):
        if self.mask is not None and self.mask.by == "tokens" and not self.mask.whole_pass:
            raise ValueError(
                "adapt compares the student's patches with those of its initial weights, which know no mask "
                "token; set objective.mask.whole_pass=true or objective.mask.by=drop"
            )
        return self
