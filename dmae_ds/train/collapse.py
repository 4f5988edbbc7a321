"""Watching a student's features for collapse: norms, effective rank and spread, measured while it trains.

Features may collapse, into one point or onto a few directions, under a loss that still falls. The numbers
are computed from the student's ordinary forward passes, by hooks that only read: a run with them is bit for
bit the run without. On a GPU the eigenvalues (cuSOLVER) wait for the device, in logged steps alone, whose
losses are read anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmae_ds.config.family import prefix_of
from dmae_ds.models.vit import MaskedViT
from dmae_ds.objectives.spread import spread

MIN_ROWS = 16  # images of a rank: the rank of fewer is that of a small sample, whatever the features
MAX_ROWS = 1024  # images of a rank: limits the cost of the eigenvalues to a 1024 x 1024 matrix
POINT = (
    1e-6  # spread / size (both squared) below which features are one point: rounding alone has a full rank
)


def effective_rank(features: Tensor) -> Tensor:
    """Number of directions the rows spread over: exp(entropy of the covariance's normalized eigenvalues).

    From Roy and Vetterli 2007, with the covariance's eigenvalues instead of singular values.
    features: [N, D]
    Returns a float32 scalar on the same device, from 1 (one direction, or all rows equal) to min(N - 1, D);
    NaN where a feature is not finite. A single row gives 1.
    """
    features = features.float()
    finite = features.isfinite().all()
    # The eigenvalues of NaNs would raise here; non-finite values are reported with the loss.
    features = torch.where(finite, features, torch.zeros_like(features))
    centred = features - features.mean(dim=0)
    # Of [N, N] and [D, D] the smaller: both have the same non-zero eigenvalues.
    matrix = centred @ centred.T if len(centred) <= centred.shape[1] else centred.T @ centred
    eigenvalues = torch.linalg.eigvalsh(matrix).clamp(min=0)
    total = eigenvalues.sum()
    shares = eigenvalues / total.clamp(min=torch.finfo(total.dtype).tiny)
    rank = torch.special.entr(shares).sum().exp()
    rank = torch.where(total <= POINT * features.square().sum(), torch.ones_like(rank), rank)
    return torch.where(finite, rank, torch.full_like(rank, torch.nan))


class CollapseMonitors:
    """A monitor for each student {name: student}; names of numbers begin with `small/` in a family."""

    def __init__(self, students: dict[str, MaskedViT]):
        self._monitors = {prefix_of(name): CollapseMonitor(student) for name, student in students.items()}

    @property
    def active(self) -> bool:
        """Whether forward passes are observed."""
        return next(iter(self._monitors.values())).active

    @active.setter
    def active(self, value: bool) -> None:
        for monitor in self._monitors.values():
            monitor.active = value

    def measure(self) -> dict[str, Tensor]:
        """Scalars of all students on the device by name."""
        return {
            f"{prefix}{name}": value
            for prefix, monitor in self._monitors.items()
            for name, value in monitor.measure().items()
        }


class CollapseMonitor:
    """Observes a student's forward passes in training mode while `active`.

    `measure` returns, over this rank's images since the last call (all micro-batches of a step, under their
    masks):
        rank/mean, rank/cls   effective rank of the mean of the patch tokens, and of CLS, after the last norm;
                              it grows with the number of images, and is left out for fewer than MIN_ROWS, as
                              those of CLS are for a student without it
        spread/mean, spread/cls   share of these features that differs between images (objectives/spread.py)
        norm/<block>          mean L2 norm of a token right after a tapped block, and after the last one
    """

    def __init__(self, student: MaskedViT):
        self.active = False
        self._pooled: dict[str, list[Tensor]] = {}
        self._norms: dict[str, list[Tensor]] = {}
        self._depth = student.depth
        student.register_forward_hook(self._see_student, with_kwargs=True)
        student.norm.register_forward_hook(self._see_last_block)

    @torch.no_grad()
    def measure(self) -> dict[str, Tensor]:
        """Scalars on the device by name; {} where nothing was observed."""
        pooled = {pool: torch.cat(rows) for pool, rows in self._pooled.items()}
        numbers = {
            f"rank/{pool}": effective_rank(features[:MAX_ROWS])
            for pool, features in pooled.items()
            if len(features) >= MIN_ROWS
        }
        numbers |= {
            f"spread/{pool}": spread(features)
            for pool, features in pooled.items()
            if len(features) >= MIN_ROWS
        }
        numbers |= {name: torch.stack(norms).mean() for name, norms in sorted(self._norms.items())}
        self._pooled, self._norms = {}, {}
        return numbers

    @torch.no_grad()
    def _see_student(
        self, student: MaskedViT, inputs: tuple, kwargs: dict, output: tuple[Tensor, dict[int, Tensor]]
    ) -> None:
        is_small_crop = kwargs.get("grid") not in (None, student.grid)
        if not self.active or not student.training or is_small_crop:
            return
        latent, tapped = output
        self._pooled.setdefault("mean", []).append(latent[:, student.num_cls :].float().mean(dim=1))
        if student.num_cls:
            self._pooled.setdefault("cls", []).append(latent[:, 0].float().clone())
        for number, tokens in tapped.items():
            self._add_norm(number, tokens)

    @torch.no_grad()
    def _see_last_block(self, norm: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if self.active and norm.training:
            self._add_norm(self._depth, inputs[0])

    def _add_norm(self, number: int, tokens: Tensor) -> None:
        self._norms.setdefault(f"norm/{number}", []).append(tokens.detach().float().norm(dim=-1).mean())
