"""DINO: small crops of an image are assigned to prototypes as an EMA teacher assigns large ones (ICCV 2021).

Two global crops go through student and EMA teacher, local crops through the student alone; the head turns CLS
into a distribution over prototypes. The EMA teacher's is centred, which prevents one prototype for all
images, and sharpened, which prevents the uniform distribution.

Chosen here: initial weights and positional embeddings are those of every other objective (MAE's), so that
methods start alike; the centre moves once an optimiser step by the mean of the whole global batch, so that it
does not depend on ranks and micro-batches. With `distill`, feature distillation on the global crops is added
(feature_distillation.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dmae_ds.config.objectives import DinoConfig
from dmae_ds.data.batch import Batch
from dmae_ds.distributed import collectives
from dmae_ds.errors import UserError
from dmae_ds.models.masking import PatchBatch
from dmae_ds.models.patches import patchify
from dmae_ds.models.vit import MaskedViT
from dmae_ds.objectives.align import at_least_float32
from dmae_ds.objectives.base import Objective, all_places, require_cls
from dmae_ds.objectives.feature_distillation import FeatureDistillation, TeacherShape
from dmae_ds.objectives.needs import EmaSpec, Progress, View
from dmae_ds.objectives.schedule import half_cosine
from dmae_ds.objectives.spread import spread

NUM_GLOBAL = 2


@dataclass
class Crops(PatchBatch):
    """Whole crops; nothing is masked.

    visible: [2N, L, P, P, C], the global crops, the N images of the first view, then those of the second
    local: [V * N, L_local, P, P, C] of V local crops, likewise; None without local crops
    """

    local: Tensor | None = None


class Dino(Objective):
    """Student and head; the EMA teacher is a copy of both, updated after every step.

    Raises UserError for local crops that are not whole patches.
    """

    def __init__(
        self,
        config: DinoConfig,
        *,
        student: MaskedViT,
        generator: torch.Generator,
        teacher: TeacherShape | None = None,
    ):
        super().__init__(student)
        require_cls(student, config.name)
        if config.local_crops and not student.is_plain:
            raise UserError(
                f"objective.local_crops {config.local_crops} are images of another size, for which only a "
                "plain ViT has positions here; set objective.local_crops=0, or choose a student.name such as "
                "vit_base_patch16_224"
            )
        if config.local_crops and config.local_size % student.patch_size:
            raise UserError(
                f"objective.local_size {config.local_size} is not a multiple of "
                f"the student's patch_size {student.patch_size}"
            )
        self.config = config
        self.local_grid = (config.local_size // student.patch_size,) * 2
        names = ("dino1", "dino2", "dino_local") if config.photometric else ("none",) * 3
        local = View(size=config.local_size, scale=config.local_scale, photometric=names[2])
        self.views = (View(photometric=names[0]), View(photometric=names[1]), *[local] * config.local_crops)
        self.head = DinoHead(
            student.embed_dim,
            hidden_dim=config.hidden_dim,
            bottleneck_dim=config.bottleneck_dim,
            num_prototypes=config.num_prototypes,
            generator=generator,
        )
        self.heads = FeatureDistillation(
            config.distill, student=student, teacher=teacher, generator=generator
        )
        self.taps, self.pairs = self.heads.taps, self.heads.pairs
        self.ema = EmaSpec(parts=("student", "head"), momentum=self.momentum_at)
        # Adam's averages fill while the last layer is held, so that it does not jump when it is released.
        self.lr_scales = {"head.prototypes": 1.0}
        self.teacher_temperature = config.teacher_temperature[0]
        self._step_begins = False

    def describe(self) -> str:
        first, last = self.config.teacher_temperature
        crops = (
            f"2 global and {self.config.local_crops} local crops, {self.config.num_prototypes} prototypes, "
            f"teacher temperature {first:g} to {last:g}, momentum {self.config.momentum:g} to 1"
        )
        return "; ".join([crops, *self.heads.describe()])

    def momentum_at(self, progress: Progress) -> float:
        """Return the momentum of the EMA teacher's update after this step."""
        return half_cosine(self.config.momentum, 1.0, progress.step / progress.num_steps)

    def start_step(self, progress: Progress) -> None:
        """Set the EMA teacher's temperature, and hold or release the last layer.

        The temperature is linear in the fractional epoch (published: constant within an epoch).
        """
        (first, last), warmup = self.config.teacher_temperature, self.config.teacher_temperature_warmup_epochs
        if progress.epoch >= warmup:
            self.teacher_temperature = last
        else:
            self.teacher_temperature = first + (last - first) * progress.epoch / warmup
        self.lr_scales["head.prototypes"] = float(progress.epoch >= self.config.freeze_last_layer_epochs)
        self._step_begins = True

    def prepare(self, batch: Batch, normalize: nn.Module) -> Crops:
        patches = [patchify(view, self.student.patch_size) for view in batch.views]
        visible = normalize(torch.cat(patches[:NUM_GLOBAL]))
        local = normalize(torch.cat(patches[NUM_GLOBAL:])) if self.config.local_crops else None
        ids = all_places(len(visible), self.student.grid, visible.device)
        return Crops(visible=visible, masked=visible[:, :0], ids_keep=ids, ids_masked=ids[:, :0], local=local)

    def ema_state(self) -> dict[str, Tensor]:
        """Return the centre [K], and two sums over the micro-batches of the current step.

        logits [K]: of the mean logits; micro_batches: their number
        """
        return {
            "centre": torch.zeros(self.config.num_prototypes),
            "logits": torch.zeros(self.config.num_prototypes),
            "micro_batches": torch.zeros(()),
        }

    def ema_features(self, ema: nn.Module, batch: Crops) -> dict[str, Tensor]:
        """Return {"ema/targets": [2, N, K]}, the EMA teacher's distributions for global crops. Collective."""
        state = ema.state
        if self._step_begins:
            self._step_begins = False
            move_centre(state, self.config.center_momentum)
        logits = at_least_float32(ema.head(ema.student(batch.visible, batch.ids_keep)[0][:, 0]))
        state["logits"] += collectives.mean_over_ranks(logits.mean(dim=0))
        state["micro_batches"] += 1
        targets = ((logits - state["centre"]) / self.teacher_temperature).softmax(dim=-1)
        return {"ema/targets": targets.unflatten(0, (NUM_GLOBAL, -1))}

    def forward(self, batch: Crops, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return {"loss", "cross_entropy", "align/9-18" with distill, "target/spread"}, scalars."""
        latent, tapped = self.student(batch.visible, batch.ids_keep, taps=self.heads.blocks)
        cls = latent[:, 0]
        if batch.local is not None:
            ids = all_places(len(batch.local), self.local_grid, cls.device)
            cls = torch.cat([cls, self.student(batch.local, ids, grid=self.local_grid)[0][:, 0]])
        targets = features["ema/targets"]
        logits = self.head(cls).unflatten(0, (-1, targets.shape[1]))
        cross_entropy = view_cross_entropy(logits, targets, temperature=self.config.student_temperature)
        loss, parts = self.heads.add_to(cross_entropy, tapped, features)
        return {
            "loss": loss,
            "cross_entropy": cross_entropy.detach(),
            **parts,
            "target/spread": spread(targets.flatten(0, 1)),
        }


def move_centre(state: dict[str, Tensor], momentum: float) -> None:
    """Move the centre in place: centre = m * centre + (1 - m) * mean logits of the previous step (Eq. 4).

    Before the first step nothing changes.
    """
    steps = state["micro_batches"]
    mean = state["logits"] / steps.clamp(min=1)
    # torch.where instead of if: the number stays on the device
    state["centre"].copy_(
        torch.where(steps > 0, momentum * state["centre"] + (1 - momentum) * mean, state["centre"])
    )
    state["logits"].zero_()
    steps.zero_()


def view_cross_entropy(logits: Tensor, targets: Tensor, *, temperature: float) -> Tensor:
    """Return the mean of -sum_k p_k log q_k over images and pairs of views (Eq. 3), a scalar.

    A pair is a view of the EMA teacher and another view of the student.
    logits: [V, N, K] of the student, the EMA teacher's views first
    targets: [T, N, K], the EMA teacher's distributions
    """
    log_q = (at_least_float32(logits) / temperature).log_softmax(dim=-1)
    # [T, N, K]: for each target, the sum over all views but its own
    others = log_q.sum(dim=0) - log_q[: len(targets)]
    return -(targets * others).sum(dim=(0, 2)).mean() / (len(targets) * (len(logits) - 1))


class Prototypes(nn.Linear):
    """Products of unit vectors with unit prototypes: [..., bottleneck] -> [..., K].

    The published layer is weight-normed with its lengths held at 1 (`norm_last_layer`). torch's weight_norm
    would add them as a parameter that is never trained, for every ZeRO stage and checkpoint to treat; here
    there is none.
    """

    def forward(self, rows: Tensor) -> Tensor:
        return functional.linear(rows, functional.normalize(self.weight, dim=-1))


class DinoHead(nn.Module):
    """Three linear layers with GELU, l2 normalisation, prototypes: [..., D] -> [..., K] in -1 to 1."""

    def __init__(
        self,
        embed_dim: int,
        *,
        hidden_dim: int,
        bottleneck_dim: int,
        num_prototypes: int,
        generator: torch.Generator,
    ):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(embed_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.prototypes = Prototypes(bottleneck_dim, num_prototypes, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=0.02, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.prototypes(functional.normalize(self.layers(tokens), dim=-1))
