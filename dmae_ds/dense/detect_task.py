"""The task of detection: Mask R-CNN's losses, a larger detector's pyramid and proposals, box and mask AP."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dmae_ds.config.detection import RichnessConfig
from dmae_ds.data.dense import DenseSample
from dmae_ds.dense.average_precision import AveragePrecision
from dmae_ds.dense.detector import NUM_LEVELS, Detector
from dmae_ds.dense.loop import DenseTask
from dmae_ds.dense.richness import Adapters, objectness_loss, pyramid_loss, richness_masks, warmup_weight


def pixels_of(sample: DenseSample) -> Tensor:
    """The image as a detector takes it: float32 [3, H, W] from 0 to 1."""
    return sample.image.float() / 255


def target_of(sample: DenseSample) -> dict[str, Tensor]:
    """What torchvision trains on: boxes [M, 4], labels [M] from 1, masks uint8 [M, H, W].

    Crowds are left out, and boxes that a crop has left without an area.
    """
    has_area = (sample.boxes[:, 2:] > sample.boxes[:, :2]).all(dim=1)
    kept = has_area & ~sample.crowd
    return {
        "boxes": sample.boxes[kept],
        "labels": sample.labels[kept] + 1,
        "masks": sample.masks[kept].to(torch.uint8),
    }


class DetectTask(DenseTask):
    """A detector in training, alone or with a larger one (`teacher`).

    val_images: gives this rank's whole samples of data.val: rank, rank + world size, ... by number
    accumulation: micro-batches of a step; seed: draws the initial weights of the adapters to the teacher
    """

    def __init__(
        self,
        detector: Detector,
        *,
        num_classes: int,
        distill: RichnessConfig | None,
        teacher: Detector | None,
        accumulation: int,
        seed: int,
        val_images: Callable[[], Iterable[DenseSample]],
        processes: Accelerator,
    ):
        super().__init__()
        self.detector, self.num_classes = detector, num_classes
        self.distill, self.teacher, self.accumulation = distill, teacher, accumulation
        self.val_images, self.processes = val_images, processes
        self.adapters: nn.Module | None = None
        if teacher is not None:
            widths = detector.backbone.out_channels, teacher.backbone.out_channels
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.adapters = Adapters(NUM_LEVELS, *widths)
            # Finished micro-batches: the warm-up goes on where a run was resumed.
            self.register_buffer("num_batches", torch.zeros((), dtype=torch.int64))

    def loss(self, batch: list[DenseSample]) -> dict[str, Tensor]:
        """{"loss", Mask R-CNN's five parts, and with a teacher "pyramid" and "proposals", not weighted}."""
        images, targets = [pixels_of(sample) for sample in batch], [target_of(sample) for sample in batch]
        losses, levels, padded = self.detector.losses(images, targets)
        parts = {name.removeprefix("loss_"): value for name, value in losses.items()}
        loss = torch.stack(list(losses.values())).sum()
        if self.teacher is not None:
            parts |= self._compare(levels, padded)
            weighted = self.distill.alpha * parts["pyramid"] + self.distill.beta * parts["proposals"]
            loss = loss + self._next_weight() * weighted
        return {"loss": loss, **parts}

    def _compare(self, levels: list[Tensor], padded: Tensor) -> dict[str, Tensor]:
        """Both terms of feature-richness distillation on the same padded images."""
        with torch.no_grad():
            its_levels = self.teacher.pyramid(padded)
            its_logits = self.teacher.objectness(its_levels)
        masks = richness_masks(its_logits)
        return {
            "pyramid": pyramid_loss(self.adapters(levels), its_levels, masks),
            "proposals": objectness_loss(self.detector.objectness(levels), its_logits, masks),
        }

    def _next_weight(self) -> Tensor:
        """The weight of both terms in this micro-batch's step, on the device."""
        step = self.num_batches // self.accumulation
        self.num_batches += 1
        return warmup_weight(step, self.distill.warmup_steps)

    @torch.inference_mode()
    def evaluate(self) -> dict[str, float]:
        """Box and mask AP, AP50 and AP75 of data.val in percent, at the images' own size."""
        scores = AveragePrecision(self.num_classes)
        rank, world_size, device = (
            self.processes.process_index,
            self.processes.num_processes,
            self.processes.device,
        )
        self.detector.eval()
        for number, sample in enumerate(self.val_images()):
            with self.processes.autocast():
                (found,) = self.detector([pixels_of(sample).to(device)])
            scores.add(rank + number * world_size, sample, found)
        return scores.scores()
