"""One term of the objective `features`: a head on the student's features, and a distance to the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dmae_ds.config.features import QUEUE_SIZE, FeatureTarget
from dmae_ds.models.vit import initialize_as_mae
from dmae_ds.objectives.align import DISTANCES, at_least_float32, build_head
from dmae_ds.objectives.feature_queue import FeatureQueue

TEMPERATURE = 0.07
EPSILON = 1e-6


class FeatureTerm(nn.Module):
    """The head of a target, its queue where it has one, and its distance."""

    def __init__(
        self, target: FeatureTarget, *, student_dim: int, teacher_dim: int, generator: torch.Generator
    ):
        super().__init__()
        self.target = target
        self.head = build_head(target.head, student_dim, teacher_dim)
        initialize_as_mae(self.head, generator)
        self.queue = None
        if target.over == "queue":
            self.queue = FeatureQueue(target.queue_size or QUEUE_SIZE, teacher_dim, generator)

    def forward(self, features: Tensor) -> Tensor:
        """Project a student's features [..., D] to the teacher's width [..., D_t]."""
        return self.head(features)

    def loss(self, predicted: Tensor, wanted: Tensor, *, per_image: bool = False) -> Tensor:
        """Return the distance of projected features from the teacher's, a scalar in float32 or float64.

        predicted, wanted: [N, T, D_t], or [N, D_t] of one vector an image
        per_image: return [N] instead, whose mean is the scalar
        """
        target = self.target
        # Similarities and normalised features in bf16 would keep two digits.
        with torch.autocast(predicted.device.type, enabled=False):
            predicted, wanted = at_least_float32(predicted), at_least_float32(wanted)
            if target.normalize == "l2":
                predicted, wanted = (functional.normalize(rows, dim=-1) for rows in (predicted, wanted))
            elif target.normalize == "standard":
                variance, mean = torch.var_mean(wanted, dim=-1, keepdim=True)
                wanted = (wanted - mean) / (variance + EPSILON).sqrt()
            if target.distance == "kl":
                divergence = self._divergence(predicted, wanted)  # [N, T] or [N]
                return divergence.reshape(len(divergence), -1).mean(dim=1) if per_image else divergence.mean()
            if per_image:
                return self._image_distances(predicted, wanted)
            if target.distance == "smooth_l1":
                return functional.smooth_l1_loss(predicted, wanted, beta=target.beta or 1.0)
            return DISTANCES[target.distance](predicted, wanted)

    def _image_distances(self, predicted: Tensor, wanted: Tensor) -> Tensor:
        """The mean of each image's distances, [N]."""
        kind = self.target.distance
        if kind == "cosine":
            distances = 1 - functional.cosine_similarity(predicted, wanted, dim=-1)
        elif kind == "smooth_l1":
            beta = self.target.beta or 1.0
            distances = functional.smooth_l1_loss(predicted, wanted, beta=beta, reduction="none")
        else:
            distances = DISTANCES[kind](predicted, wanted, reduction="none")
        return distances.reshape(len(distances), -1).mean(dim=1)

    def _divergence(self, predicted: Tensor, wanted: Tensor) -> Tensor:
        """KL(softmax of the teacher || softmax of the student) of each vector, summed over entries."""
        over = self.target.over or "channels"
        if over == "queue":
            past = at_least_float32(self.queue.past())
            scores = predicted @ past.T, wanted @ past.T  # [N, size of the queue]
            self.queue.push(wanted)
        elif over == "patches":
            scores = predicted @ predicted.mT, wanted @ wanted.mT  # [N, T, T]
        else:
            scores = predicted, wanted
        temperature = self.target.temperature or TEMPERATURE
        student, teacher = (functional.log_softmax(score / temperature, dim=-1) for score in scores)
        return functional.kl_div(student, teacher, log_target=True, reduction="none").sum(dim=-1)
