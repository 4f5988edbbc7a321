"""The task of segmentation: losses of label maps and of a larger segmenter's logits, and mIoU by windows."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmae_ds.data.dense import DenseSample
from dmae_ds.dense.loop import DenseTask
from dmae_ds.dense.predict import Predictor
from dmae_ds.dense.segmenter import Segmenter
from dmae_ds.evaluate.features import Processes
from dmae_ds.evaluate.segmentation_scores import ConfusionMatrix
from dmae_ds.models.patches import Normalize
from dmae_ds.objectives.augment import normalized


def map_loss(logits: Tensor, label_maps: Tensor, *, no_class: int) -> Tensor:
    """Cross-entropy summed over the pixels that have a class, divided by the number of all pixels.

    logits: [N, classes, H, W]; label_maps: int64 [N, H, W]
    So ranks and micro-batches count alike, and images without any class have loss 0, not NaN
    (mmsegmentation's default).
    """
    total = F.cross_entropy(logits.float(), label_maps, ignore_index=no_class, reduction="sum")
    return total / label_maps.numel()


def logit_map_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Mean over pixels of KL(teacher || student) of the classes' softmax at a temperature, times its square.

    student: [N, classes, h, w]; teacher: likewise, of any grid: it is resized to the student's, bilinear
    (G2SD, supplement 1.3)
    """
    teacher = F.interpolate(teacher.float(), size=student.shape[2:], mode="bilinear", align_corners=False)
    log_student = F.log_softmax(student.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)  # [N, h, w]
    return divergence.mean() * temperature**2


class LogitTeacher(nn.Module):
    """A frozen segmenter that gets the student's images, normalised with its own pixel statistics.

    weight: of its loss
    """

    def __init__(self, segmenter: Segmenter, normalize: Normalize, *, weight: float, temperature: float):
        super().__init__()
        self.segmenter = segmenter.requires_grad_(False).eval()
        self.normalize, self.weight, self.temperature = normalize, weight, temperature

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes, h, w] of uint8 images [N, C, H, W]."""
        return self.segmenter.logit_maps(normalized(images, self.normalize))[0]


class SegmentTask(DenseTask):
    """A segmenter in training.

    val_images: gives this rank's whole samples of data.val; no_class: value of pixels without a class
    """

    def __init__(
        self,
        segmenter: Segmenter,
        normalize: Normalize,
        *,
        auxiliary_weight: float,
        teacher: LogitTeacher | None,
        predict: Predictor,
        no_class: int,
        val_images: Callable[[], Iterable[DenseSample]],
        processes: Processes,
    ):
        super().__init__()
        self.segmenter, self.normalize, self.teacher = segmenter, normalize, teacher
        self.auxiliary_weight, self.no_class = auxiliary_weight, no_class
        self.predict, self.val_images, self.processes = predict, val_images, processes

    def loss(self, batch: list[DenseSample]) -> dict[str, Tensor]:
        """{"loss", "map", "auxiliary", "logits"}: of label maps, by the auxiliary head, of a teacher."""
        images = torch.stack([sample.image for sample in batch])
        label_maps = torch.stack([sample.label_map for sample in batch])
        logits, auxiliary = self.segmenter.logit_maps(normalized(images, self.normalize))
        parts = {"map": self._map_loss(logits, images, label_maps)}
        loss = parts["map"]
        if auxiliary is not None:
            parts["auxiliary"] = self._map_loss(auxiliary, images, label_maps)
            loss = loss + self.auxiliary_weight * parts["auxiliary"]
        if self.teacher is not None:
            parts["logits"] = logit_map_loss(
                logits, self.teacher(images), temperature=self.teacher.temperature
            )
            loss = loss + self.teacher.weight * parts["logits"]
        return {"loss": loss, **parts}

    def _map_loss(self, logits: Tensor, images: Tensor, label_maps: Tensor) -> Tensor:
        return map_loss(self.segmenter.to_pixels(logits, images), label_maps, no_class=self.no_class)

    def evaluate(self) -> dict[str, float]:
        """miou, mean_accuracy and pixel_accuracy in percent of data.val, at the images' own size."""
        device = self.processes.device
        matrix = ConfusionMatrix(self.segmenter.num_classes, device=device, no_class=self.no_class)
        self.segmenter.eval()
        for sample in self.val_images():
            with self.processes.autocast():
                predicted = self.predict(self.segmenter, sample.image.to(device), self.normalize)
            matrix.add(predicted, sample.label_map.to(device))
        return matrix.scores(self.processes)
