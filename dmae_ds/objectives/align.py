"""Projection heads and distances between a student's and a teacher's features (DMAE, Tables 3a and 3c)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

# Hidden layers of each head; every layer but the first is as wide as the teacher (Sec. 4.1), GELU between
# layers.
HEADS = {"linear": 0, "mlp2": 1, "mlp3": 2}


def build_head(kind: str, student_dim: int, teacher_dim: int) -> nn.Sequential:
    """Return a projection from student width to teacher width: [..., D] -> [..., D_t].

    kind: of HEADS, or `norm_linear`, a LayerNorm (epsilon 1e-5) and a linear layer (Proteus)
    """
    if kind == "norm_linear":
        return nn.Sequential(nn.LayerNorm(student_dim, eps=1e-5), nn.Linear(student_dim, teacher_dim))
    layers: list[nn.Module] = [nn.Linear(student_dim, teacher_dim)]
    for _ in range(HEADS[kind]):
        layers += [nn.GELU(), nn.Linear(teacher_dim, teacher_dim)]
    return nn.Sequential(*layers)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, in which losses are computed; float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _cosine(student: Tensor, teacher: Tensor) -> Tensor:
    return (1 - functional.cosine_similarity(student, teacher, dim=-1)).mean()


# Each takes two tensors [N, T, D_t] and returns a scalar: the mean over all entries (Eq. 2), for cosine over
# tokens.
DISTANCES = {
    "l1": functional.l1_loss,
    "l2": functional.mse_loss,
    "smooth_l1": functional.smooth_l1_loss,
    "cosine": _cosine,
}


def distance(kind: str, student: Tensor, teacher: Tensor, *, normalize: str) -> Tensor:
    """Return the distance of projected student features from the teacher's, a float32 scalar.

    student, teacher: [N, T, D_t]
    normalize: `none` compares raw features (the paper), `l2` unit vectors (the published code). Two unit
        vectors of
    width 1024 are at most .044 apart in mean L1, so `l2` makes the term about 2% of the encoder's gradient.
    """
    student, teacher = student.float(), teacher.float()
    if normalize == "l2":
        student, teacher = functional.normalize(student, dim=-1), functional.normalize(teacher, dim=-1)
    return DISTANCES[kind](student, teacher)
