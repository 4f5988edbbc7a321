"""Contrastive representation distillation with a memory of all images (CRD, Tian et al., ICLR 2020).

Both networks' features are mapped to unit vectors g_s, g_t. The student's is scored against the teacher's
embeddings of other images and the reverse; those come from two memories with a row for each training image.
Here the memories are exact on any number of ranks: a step scores against the rows that the step before left,
and then the rows of its whole global batch are updated on every rank. They are part of the state that a
killed training continues from, and so is the constant Z. (The published code has one memory for each process,
updates it inside the forward pass and saves neither.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from dmae_ds.config.evaluation import CrdConfig
from dmae_ds.data.batch import Batch
from dmae_ds.finetune.contrast import Contrast
from dmae_ds.finetune.teacher_task import TeacherTask

EPSILON = 1e-7  # of the published code, in both logarithms


class CrdTask(TeacherTask):
    """The labels' loss and CRD's, and the two memories.

    contrast: the training images that are drawn from; other arguments are TeacherTask's
    `normalize` is called before the first step and `remember` after every step.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, *, config: CrdConfig, contrast: Contrast, **kwargs
    ):
        super().__init__(student, teacher, **kwargs)
        self.config, self.contrast = config, contrast
        self.embed_student = nn.Linear(student.num_features, config.dim)
        self.embed_teacher = nn.Linear(teacher.model.num_features, config.dim)
        bound = math.sqrt(3 / config.dim)
        for name in ("memory_student", "memory_teacher"):
            rows = torch.empty(len(contrast), config.dim).uniform_(-bound, bound)
            self.register_buffer(name, rows)
        # Z of the student's and of the teacher's scores; set by the first batch.
        self.register_buffer("normalizers", torch.ones(2))
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def draw(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return places [N] of a batch's images and places [N, 1 + K] to score, on the memories' device."""
        device = self.memory_student.device
        drawn = (torch.from_numpy(places) for places in self.contrast.draw(batch))
        if device.type == "cuda":
            drawn = (places.pin_memory() for places in drawn)
        places, samples = (places.to(device, non_blocking=True) for places in drawn)
        return places, samples

    def forward(self, images: Tensor, labels: Tensor, places: Tensor, samples: Tensor) -> dict[str, Tensor]:
        """Score a micro-batch and keep its embeddings for `remember`.

        places [N] int64: rows of the images; samples [N, 1 + K] int64: rows to score, the positive first
        Returns {"loss", "output", "task_loss", "crd_student", "crd_teacher"}.
        """
        features, student, teacher = self._embed(images)
        logits = self.student.head(features)
        task_loss = self.criterion(logits, labels)
        parts = [
            contrastive_loss(scores, normalizer, num_images=len(self.contrast))
            for scores, normalizer in zip(
                self._scores(student, teacher, samples), self.normalizers, strict=True
            )
        ]
        if torch.is_grad_enabled():
            self._seen.append((places, student.detach(), teacher.detach()))
        loss = self.task_weight * task_loss + self.weight * sum(parts)
        return {
            "loss": loss,
            "output": logits,
            "task_loss": task_loss,
            "crd_student": parts[0],
            "crd_teacher": parts[1],
        }

    @torch.no_grad()
    def normalize(self, pieces: Iterable[tuple[Tensor, ...]], *, accelerator: Accelerator) -> None:
        """Set Z = images x mean of exp(score / temperature) over the first global batch. Collective.

        pieces: this rank's micro-batches of the first step, all of one size; positives count
        """
        means = []
        for images, _, _, samples in pieces:
            with accelerator.autocast():
                _, student, teacher = self._embed(images)
            scores = self._scores(student, teacher, samples)
            means.append(torch.stack([one.exp().mean() for one in scores]))
        mean = accelerator.reduce(torch.stack(means).mean(0), reduction="mean")
        self.normalizers.copy_(len(self.contrast) * mean)

    @torch.no_grad()
    def remember(self, *, accelerator: Accelerator) -> None:
        """Update the rows of a step's images on all ranks, by embeddings from before the step. Collective.

        An image that comes twice in the step has the later one's embedding, in the order of the batch.
        """
        seen = [torch.cat(tensors) for tensors in zip(*self._seen, strict=True)]
        self._seen.clear()
        places, student, teacher = (accelerator.gather(tensor) for tensor in seen)
        order = torch.arange(len(places), device=places.device)
        last = torch.zeros(len(self.contrast), dtype=torch.int64, device=places.device)
        last.scatter_reduce_(0, places, order, "amax")
        # Equal rows are written where an image comes twice, so the order of writing does not matter.
        update_rows(self.memory_student, places, student[last[places]], momentum=self.config.momentum)
        update_rows(self.memory_teacher, places, teacher[last[places]], momentum=self.config.momentum)

    def _embed(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The student's pooled features [N, D], and both unit embeddings [N, dim] in fp32."""
        features, targets = self.pooled_features(images), self.teacher_features(images)
        with torch.autocast(images.device.type, enabled=False):
            student = self.embed_student(features.float())
            teacher = self.embed_teacher(targets.float())
        return features, *(one / one.norm(dim=1, keepdim=True) for one in (student, teacher))

    def _scores(self, student: Tensor, teacher: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [N, 1 + K] of the student on the teacher's memory and of the teacher on the student's."""
        pairs = ((student, self.memory_teacher), (teacher, self.memory_student))
        with torch.autocast(samples.device.type, enabled=False):
            return tuple(
                torch.einsum("nd,nkd->nk", anchor, rows[samples]) / self.config.temperature
                for anchor, rows in pairs
            )


def contrastive_loss(scores: Tensor, normalizer: Tensor, *, num_images: int) -> Tensor:
    """Noise-contrastive loss, a sum over an image's positive and negatives, mean over images (CRD, Eq. 18).

    scores: [N, 1 + K], divided by the temperature, the positive first; normalizer: Z, a scalar
    """
    probability = scores.exp() / normalizer
    noise = (scores.shape[1] - 1) / num_images  # K times the uniform distribution's probability
    positive = (probability[:, 0] / (probability[:, 0] + noise + EPSILON)).log()
    negatives = (noise / (probability[:, 1:] + noise + EPSILON)).log()
    return -(positive + negatives.sum(1)).mean()


def update_rows(memory: Tensor, places: Tensor, embeddings: Tensor, *, momentum: float) -> None:
    """Replace rows [N] of a memory by unit vectors between the old ones and embeddings [N, dim], in place."""
    rows = momentum * memory[places] + (1 - momentum) * embeddings
    memory[places] = F.normalize(rows, dim=1)
