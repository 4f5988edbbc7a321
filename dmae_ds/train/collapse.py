"""Whether a student's features still differ: their norm and effective rank, looked at in passing while it trains.

Features may collapse, into one point or onto a few directions, under a loss that still falls. Both numbers are taken
from what the student computes anyway, by hooks that only read: a run with them is the run without them, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmae_ds.models.vit import MaskedViT

LEAST_ROWS = (
    16  # of a rank's pictures: the rank of fewer is the rank of a small sample, whatever the features
)
MAX_ROWS = 1024  # of a rank's pictures: bounds the eigenvalues' cost to a 1024 x 1024 matrix
POINT = (
    1e-6  # spread over size (both squared) below which features are one point: rounding alone has a full rank
)


def effective_rank(features: Tensor) -> Tensor:
    """How many directions the rows spread over: exp(entropy of the covariance's eigenvalues, normalised to sum 1)
    (Roy and Vetterli 2007, with the covariance's eigenvalues instead of singular values).

    features [N, D]
    Returns a scalar, float32, on the same device: 1 (one direction, or all rows alike) to min(N - 1, D); NaN where a
    feature is not finite. Needs N >= 2 to say anything: a single row gives 1.
    """
    features = features.float()
    finite = features.isfinite().all()
    features = torch.where(
        finite, features, torch.zeros_like(features)
    )  # eigenvalues of NaNs are an error, which belongs to the loss
    centred = features - features.mean(dim=0)
    # The smaller of [N, N] and [D, D]: both have the same eigenvalues but for zeros.
    matrix = centred @ centred.T if len(centred) <= centred.shape[1] else centred.T @ centred
    eigenvalues = torch.linalg.eigvalsh(matrix).clamp(min=0)
    total = eigenvalues.sum()
    shares = eigenvalues / total.clamp(min=torch.finfo(total.dtype).tiny)
    rank = torch.special.entr(shares).sum().exp()
    rank = torch.where(total <= POINT * features.square().sum(), torch.ones_like(rank), rank)
    return torch.where(finite, rank, torch.full_like(rank, torch.nan))


class CollapseMonitor:
    """Looks at a student's forward passes in training mode while `active`, and sums them up at the end of a step.

    `measure` returns, of this rank's pictures since the last call (all micro-batches of a step, under their masks):
        rank/mean, rank/cls   effective rank of the mean of the patch tokens, and of CLS, after the final norm; it grows with the number of
                              pictures, and is left out for fewer than 16 a rank and step
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
        """Scalars on the device by name; {} where nothing was seen."""
        pooled = {pool: torch.cat(rows) for pool, rows in self._pooled.items()}
        found = {
            f"rank/{pool}": effective_rank(features[:MAX_ROWS])
            for pool, features in pooled.items()
            if len(features) >= LEAST_ROWS
        }
        found |= {name: torch.stack(norms).mean() for name, norms in sorted(self._norms.items())}
        self._pooled, self._norms = {}, {}
        return found

    @torch.no_grad()
    def _see_student(
        self, student: MaskedViT, inputs: tuple, options: dict, output: tuple[Tensor, dict[int, Tensor]]
    ) -> None:
        if not (self.active and student.training) or options.get("grid") not in (
            None,
            student.grid,
        ):  # small crops are other pictures
            return
        latent, tapped = output
        for pool, features in (
            ("mean", latent[:, 1:].float().mean(dim=1)),
            ("cls", latent[:, 0].float().clone()),
        ):
            self._pooled.setdefault(pool, []).append(features)
        for number, tokens in tapped.items():
            self._add_norm(number, tokens)

    @torch.no_grad()
    def _see_last_block(self, norm: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if self.active and norm.training:
            self._add_norm(self._depth, inputs[0])

    def _add_norm(self, number: int, tokens: Tensor) -> None:
        self._norms.setdefault(f"norm/{number}", []).append(tokens.detach().float().norm(dim=-1).mean())
