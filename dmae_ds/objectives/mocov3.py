"""MoCo-v3: contrastive learning of two views of an image in the whole batch (ICCV 2021, Algorithm 1).

The query is the student's CLS token through a projector and a predictor, the key the momentum encoder's CLS
token through its projector. The published settings for ViT-B: tau .2, momentum .99 rising to 1 by half a
cosine, heads of width 4096 and output width 256, batch norm after each of their layers, the patch projection
frozen at its random initialisation.

Chosen here: the student's initial weights and positional embeddings are those of every other objective
(MAE's), so that methods start alike; batch norm keeps no running statistics.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

from dmae_ds.config.objectives import MoCoV3Config
from dmae_ds.data.batch import Batch
from dmae_ds.distributed import collectives
from dmae_ds.models.initial import freeze, initialize_as_mae
from dmae_ds.models.masking import PatchBatch
from dmae_ds.models.patches import patchify
from dmae_ds.models.vit import MaskedViT
from dmae_ds.objectives.align import at_least_float32
from dmae_ds.objectives.base import Objective, all_places, require_cls
from dmae_ds.objectives.feature_distillation import FeatureDistillation, TeacherShape
from dmae_ds.objectives.needs import EmaSpec, Progress, View
from dmae_ds.objectives.schedule import half_cosine
from dmae_ds.objectives.spread import spread


class MoCoV3(Objective):
    """Student, projector and predictor; the momentum encoder is the EMA teacher, of student and projector."""

    def __init__(
        self,
        config: MoCoV3Config,
        *,
        student: MaskedViT,
        generator: torch.Generator,
        teacher: TeacherShape | None = None,
    ):
        super().__init__(student)
        require_cls(student, config.name)
        self.temperature, self.momentum = config.temperature, config.momentum
        self.photometric = config.photometric
        names = ("moco1", "moco2") if config.photometric else ("none", "none")
        self.views = tuple(View(photometric=name) for name in names)
        self.ema = EmaSpec(parts=("student", "projector"), momentum=self.momentum_at)
        self.projector = build_mlp(
            [student.embed_dim, config.hidden_dim, config.hidden_dim, config.output_dim]
        )
        self.predictor = build_mlp([config.output_dim, config.hidden_dim, config.output_dim])
        for head in (self.projector, self.predictor):
            initialize_as_mae(head, generator)
        self.heads = FeatureDistillation(
            config.distill, student=student, teacher=teacher, generator=generator
        )
        self.taps, self.pairs = self.heads.taps, self.heads.pairs
        if config.freeze_patch_projection:
            freeze(self.student.patch_embed.proj)

    def momentum_at(self, progress: Progress) -> float:
        """Return the momentum of the EMA teacher's update after this step; it rises to 1 by half a cosine."""
        return half_cosine(self.momentum, 1.0, progress.step / progress.num_steps)

    def prepare(self, batch: Batch, normalize: nn.Module) -> PatchBatch:
        """Return both views whole, one after the other: 2N rows, of which n and N + n are of one image."""
        patches = normalize(torch.cat([patchify(view, self.student.patch_size) for view in batch.views]))
        ids = all_places(len(patches), self.student.grid, patches.device)
        return PatchBatch(visible=patches, masked=patches[:, :0], ids_keep=ids, ids_masked=ids[:, :0])

    def describe(self) -> str:
        colours = " in changed colours" if self.photometric else ""
        views = f"2 views{colours}, temperature {self.temperature:g}, momentum {self.momentum:g} to 1"
        return "; ".join([views, *self.heads.describe()])

    def ema_features(self, ema: nn.Module, batch: PatchBatch) -> dict[str, Tensor]:
        """Return the momentum encoder's CLS tokens and keys of both views, for this rank's images.

        {"ema/cls": [2, N, D], "ema/keys": [2, N, output_dim]}; keys are unit vectors
        """
        latent, _ = ema.student(batch.visible, batch.ids_keep)
        cls = by_view(latent[:, 0])
        return {"ema/cls": cls, "ema/keys": unit(ema.projector(cls))}

    def forward(self, batch: PatchBatch, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return {"loss", "contrast", "align/9-18" with distill, "target/spread"}, scalars. Collective."""
        latent, tapped = self.student(batch.visible, batch.ids_keep, taps=self.heads.blocks)
        queries = unit(self.predictor(self.projector(by_view(latent[:, 0]))))
        keys = features["ema/keys"]
        first, second = collectives.gather_rows(keys[0]), collectives.gather_rows(keys[1])
        kwargs = {"offset": collectives.rank() * keys.shape[1], "temperature": self.temperature}
        contrast = info_nce(queries[0], second, **kwargs) + info_nce(queries[1], first, **kwargs)
        loss, parts = self.heads.add_to(contrast, tapped, features)
        return {
            "loss": loss,
            "contrast": contrast.detach(),
            **parts,
            # The spread of tokens, not of keys: batch norm pulls any keys apart.
            "target/spread": spread(features["ema/cls"][0]),
        }


def info_nce(queries: Tensor, keys: Tensor, *, offset: int, temperature: float) -> Tensor:
    """Return 2 tau * cross-entropy of finding key offset + n for query n, a scalar (Eq. 1 and Algorithm 1).

    queries: [N, C] of this rank; keys: [M, C] of all ranks; unit vectors
    offset: row of the first query's key
    """
    places = offset + torch.arange(len(queries), device=queries.device)
    with torch.autocast(queries.device.type, enabled=False):  # bf16 would leave two digits of a similarity
        return 2 * temperature * functional.cross_entropy(queries @ keys.T / temperature, places)


def build_mlp(dims: list[int]) -> nn.Sequential:
    """Return linear layers without bias, each with batch norm, with ReLU in between.

    The last batch norm has no affine part.
    """
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(itertools.pairwise(dims), start=1):
        last = number == len(dims) - 1
        layers += [nn.Linear(before, after, bias=False), GlobalBatchNorm(after, affine=not last)]
        layers += [] if last else [nn.ReLU()]
    return nn.Sequential(*layers)


def by_view(rows: Tensor) -> Tensor:
    """Return rows [2N, D] as [2, N, D]: each view has batch statistics of its own, as published."""
    return rows.unflatten(0, (2, -1))


def unit(rows: Tensor) -> Tensor:
    """Return unit vectors in float32 or float64; zero stays zero.

    Batch norm turns a batch of one image into zero.
    """
    return functional.normalize(at_least_float32(rows), dim=-1)


EPSILON = 1e-5  # torch's default


class GlobalBatchNorm(nn.Module):
    """Batch norm over the rows of all ranks: every channel of [..., N, D] gets mean 0 and variance 1.

    Every rank has the same N. Leading axes are separate batches (views); one exchange serves them all.
    affine: learned scale and shift after it
    Statistics are taken in float32 or float64. Collective, also in backward.
    """

    def __init__(self, dim: int, *, affine: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, rows: Tensor) -> Tensor:
        exact = at_least_float32(rows)
        # [..., 1, D]; two exchanges, because E[x^2] - E[x]^2 loses the digits that matter
        centred = exact - collectives.mean_over_ranks_with_gradient(exact.mean(dim=-2, keepdim=True))
        variance = collectives.mean_over_ranks_with_gradient(centred.square().mean(dim=-2, keepdim=True))
        normalized = centred * (variance + EPSILON).rsqrt()
        if self.weight is not None:
            normalized = normalized * self.weight.to(exact.dtype) + self.bias.to(exact.dtype)
        return normalized.to(rows.dtype)
