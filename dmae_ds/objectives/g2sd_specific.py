"""G2SD's specific stage, which is DeiT's hard distillation (G2SD, supplement, Sec. 1.1; DeiT, Eq. 3).

CLS learns from the labels, a second token from the decisions of a fine-tuned teacher. The positional
embedding is trained, as in the published code and in MAE's fine-tuning (layer 0 of the layer decay, no weight
decay). All other objectives keep it fixed; why is in `Objective` (base.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dmae_ds.config.objectives import G2sdSpecificConfig
from dmae_ds.data.batch import Batch
from dmae_ds.errors import UserError
from dmae_ds.models.masking import PatchBatch
from dmae_ds.models.patches import patchify
from dmae_ds.models.vit import MaskedViT
from dmae_ds.objectives.augment import LabelledBatch, MixedImages
from dmae_ds.objectives.base import Objective, all_places, train_positions
from dmae_ds.objectives.classifier import Classifier, distilled_classifier
from dmae_ds.objectives.feature_distillation import TeacherShape

HEAD_STD = 2e-5  # of the new heads: they start at nearly equal logits (MAE's published fine-tuning)


class G2sdSpecific(Objective):
    """Student on whole images, a distillation token after its patches, and a linear head for either token.

    The token is the last of the sequence and has no positional embedding. The prediction is the mean of the
    two heads' logits.
    """

    taps = ("logits",)
    labels = True
    # As in timm's classifiers; the distillation token decays, as published.
    no_weight_decay = ("student.cls_token", "student.pos_embed")

    def __init__(
        self,
        config: G2sdSpecificConfig,
        *,
        student: MaskedViT,
        teacher: TeacherShape,
        generator: torch.Generator,
        num_classes: int,
    ):
        super().__init__(student)
        if not student.is_plain:
            raise UserError(
                "objective.name g2sd_specific adds a distillation token, which requires a plain ViT; choose "
                "for example student.name=vit_base_patch16_224"
            )
        train_positions(student)
        self.num_classes, self.rand_augment = num_classes, config.augment.rand_augment
        seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
        self.mixed = MixedImages(config.augment, num_classes=num_classes, seed=seed)
        self.dist_token = nn.Parameter(torch.empty(1, 1, student.embed_dim))
        self.head, self.head_dist = (nn.Linear(student.embed_dim, num_classes) for _ in range(2))
        nn.init.normal_(self.dist_token, std=0.02, generator=generator)
        for head in (self.head, self.head_dist):
            nn.init.trunc_normal_(head.weight, std=HEAD_STD, generator=generator)
            nn.init.zeros_(head.bias)
        distilled_classifier(self)  # so a student without such a network is refused before training

    def prepare(self, batch: Batch, normalize: nn.Module) -> LabelledBatch:
        """Return whole mixed images as patches, all of them visible; the teacher sees the same."""
        images, targets = self.mixed(batch, normalize)
        patches = patchify(images, self.student.patch_size)
        ids = all_places(len(patches), self.student.grid, patches.device)
        return LabelledBatch(
            visible=patches, masked=patches[:, :0], ids_keep=ids, ids_masked=ids[:, :0], targets=targets
        )

    def describe(self) -> str:
        return (
            f"{self.head.out_features} classes; half CLS against labels ({self.mixed}), "
            "half the distillation token against the teacher's decision"
        )

    def layer_of(self, name: str) -> int:
        """Return the layer of a parameter, as MAE's published fine-tuning counts them.

        0: patch projection, positional embedding and CLS; i: block i; depth + 1: final norm, distillation
        token and heads
        """
        if name.startswith("student.blocks."):
            return 1 + int(name.split(".")[2])
        in_embedding = name.startswith("student.") and not name.startswith("student.norm.")
        return 0 if in_embedding else 1 + self.student.depth

    def logits(self, batch: PatchBatch) -> tuple[Tensor, Tensor]:
        """Return the logits of the CLS head and of the distillation head, both [N, classes] float32."""
        tokens, _ = self.student(batch.visible, batch.ids_keep, appended=self.dist_token)
        return self.head(tokens[:, 0]).float(), self.head_dist(tokens[:, -1]).float()

    def forward(self, batch: LabelledBatch, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return {"loss", "label", "hard", "follows"}, scalars.

        features: {"logits": [N, classes]} of the teacher on the same mixed images
        "follows" is the share of the teacher's decisions that the distillation head agrees with.
        """
        ours, distilled = self.logits(batch)
        decision = features["logits"].argmax(dim=1)
        label = functional.cross_entropy(ours, batch.targets)
        hard = functional.cross_entropy(distilled, decision)
        follows = (distilled.argmax(dim=1) == decision).float().mean()
        return {
            "loss": (label + hard) / 2,
            "label": label.detach(),
            "hard": hard.detach(),
            "follows": follows,
        }

    def classifier(self) -> Classifier:
        """Return timm's distilled ViT, which predicts the mean of the two heads."""
        return distilled_classifier(self)
