"""AMD: a teacher that sees more patches than its student (Asymmetric Masked Distillation, CVPR 2024).

The student reconstructs masked pixels, and some of its blocks imitate the teacher's in two ways. Directly: a
linear map of its visible tokens is compared with the teacher's at the same patches. By generation: the mapped
tokens, with mask tokens where only the teacher sees, go through a few blocks of the teacher's width, and what
they give there is compared with the teacher's.

The paper is about video, and its image models' code was not published. The defaults are its text with this
project's (and MAE's) positions and pixels. Where the published code of the video models differs there is a
setting: `projection`, `train_mask_tokens`, `positions`, `pixels`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dmae_ds.config.objectives import AmdConfig
from dmae_ds.data.batch import Batch
from dmae_ds.errors import UserError
from dmae_ds.models.decoder import TokenDecoder
from dmae_ds.models.initial import initialize_as_mae
from dmae_ds.models.masking import PatchBatch
from dmae_ds.models.positions import sincos_positions_1d
from dmae_ds.models.vit import MaskedViT
from dmae_ds.objectives.align import distance
from dmae_ds.objectives.feature_distillation import TeacherShape, resolve_pairs
from dmae_ds.objectives.mae import patch_statistics
from dmae_ds.objectives.masked import MaskedObjective, build_decoder, random_patches

HEAD_DIM = 64  # channels of a generator's head, where objective.generator.num_heads is null
EPSILON = 1e-6  # of the published code, added to a colour's standard deviation


@dataclass
class AmdBatch(PatchBatch):
    """A batch that remembers the normalised values [C] of black and white pixels."""

    black: Tensor
    white: Tensor


class Amd(MaskedObjective):
    """Student, pixel decoder, linear maps to the teacher's width, and a generator for each generated pair."""

    compares_superset = True
    reconstructs_pixels = True

    def __init__(
        self, config: AmdConfig, *, student: MaskedViT, teacher: TeacherShape, generator: torch.Generator
    ):
        super().__init__(config, student=student)
        if not teacher.num_superset:
            raise UserError(
                "objective amd compares patches that only the teacher sees; set teacher.sees=superset and "
                f"teacher.mask_ratio below objective.mask_ratio {config.mask_ratio:g}"
            )
        self.config, self.pixels, self.norm_pix = config, config.pixels, config.pixels != "raw"
        depths = {"student_depth": student.depth, "teacher_depth": teacher.depth}
        middle_and_last = [tuple(max(1, depth // 2) for depth in depths.values()), tuple(depths.values())]
        self.direct, self.generative = (
            resolve_pairs(pairs or middle_and_last, key=f"objective.{name}", **depths)
            for name, pairs in (("direct", config.direct), ("generative", config.generative))
        )
        self.pairs = tuple(dict.fromkeys([*self.direct, *self.generative]))
        self.taps = tuple(f"block/{block}" for block in sorted({block for _, block in self.pairs}))
        self.has_cls = teacher.has_cls
        self.decoder = build_decoder(config.decoder, student=student, generator=generator)
        maps = {"direct_maps": self.direct}
        if config.projection == "separate":
            maps["generative_maps"] = self.generative
        for name, pairs in maps.items():
            # Without a bias, as published.
            layers = [nn.Linear(student.embed_dim, teacher.embed_dim, bias=False) for _ in pairs]
            setattr(self, name, nn.ModuleList(layers))
            initialize_as_mae(getattr(self, name), generator)
        self.generators = nn.ModuleList(
            build_generator(config, student=student, teacher=teacher, generator=generator)
            for _ in self.generative
        )
        if config.positions == "1d":
            _use_positions_1d(student, self.decoder, *self.generators)
        self.no_weight_decay = ("decoder.mask_token",)
        if config.train_mask_tokens:
            self.no_weight_decay += tuple(f"generators.{i}.mask_token" for i in range(len(self.generators)))

    @property
    def shown(self) -> tuple[object, ...] | None:
        return random_patches(self.num_visible) if type(self).prepare is Amd.prepare else None

    def prepare(self, batch: Batch, normalize: nn.Module, *, num_visible: int | None = None) -> AmdBatch:
        masked = super().prepare(batch, normalize, num_visible=num_visible)
        like = {"dtype": torch.uint8, "device": batch.images.device}
        black, white = (normalize(torch.full((batch.images.shape[1],), level, **like)) for level in (0, 255))
        return AmdBatch(**vars(masked), black=black, white=white)

    def describe(self) -> str:
        texts = [
            f"{name} {', '.join(f'{student} <- {teacher}' for student, teacher in pairs)}"
            for name, pairs in (("direct", self.direct), ("generative", self.generative))
        ]
        config = self.config
        more = f"{config.projection} maps, {config.distance} distance, {config.pixels} pixels"
        return f"{super().describe()}; {'; '.join(texts)}; {more}"

    def forward(self, batch: AmdBatch, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return {"loss", "pixel", "align/6-12", "align/6-12-generated", ...}, scalars.

        features: {"block/12": [N, 1 + S, D_t], ...} of a superset of S patches, the student's K first;
            [N, S, D_t] of a teacher without CLS
        """
        blocks = [block for block, _ in self.pairs]
        latent, tapped = self.student(batch.visible, batch.ids_keep, taps=blocks)
        pixel = self.pixel_loss(latent, batch)
        direct = {
            f"align/{mine}-{theirs}": self._direct(layer, tapped[mine], features[f"block/{theirs}"], batch)
            for layer, (mine, theirs) in zip(self.direct_maps, self.direct, strict=True)
        }
        shared = self.config.projection == "shared"
        maps = self.direct_maps if shared else self.generative_maps
        generated = {
            f"align/{mine}-{theirs}-generated": self._generative(
                generator, layer(tapped[mine]), features[f"block/{theirs}"], batch
            )
            for generator, layer, (mine, theirs) in zip(self.generators, maps, self.generative, strict=True)
        }
        config = self.config
        loss = config.pixel_weight * pixel
        loss = loss + config.direct_weight * torch.stack(list(direct.values())).mean()
        loss = loss + config.generative_weight * torch.stack(list(generated.values())).mean()
        parts = {name: part.detach() for name, part in {"pixel": pixel, **direct, **generated}.items()}
        return {"loss": loss, **parts}

    def _direct(self, layer: nn.Module, tokens: Tensor, target: Tensor, batch: PatchBatch) -> Tensor:
        """The distance at the student's patches, and at CLS where both networks have it."""
        num_visible = batch.ids_keep.shape[1]
        target = target[:, : self.has_cls + num_visible]
        num_tokens = min(tokens.shape[1], target.shape[1])
        return self._distance(layer(tokens)[:, -num_tokens:], target[:, -num_tokens:])

    def _generative(
        self, generator: nn.Module, projected: Tensor, target: Tensor, batch: PatchBatch
    ) -> Tensor:
        """The distance at the patches that only the teacher sees."""
        num_further = target.shape[1] - self.has_cls - batch.ids_keep.shape[1]
        generated = generator(projected, batch.ids_keep, batch.ids_masked[:, :num_further])
        return self._distance(generated[:, -num_further:], target[:, -num_further:])

    def _distance(self, student: Tensor, target: Tensor) -> Tensor:
        return distance(self.config.distance, student, target, normalize="none")

    def pixel_loss(self, latent: Tensor, batch: AmdBatch) -> Tensor:
        """Return the mean squared error over the pixels of masked patches."""
        predicted = self.decoder(latent, batch.ids_keep, batch.ids_masked)
        mean, scale = self._pixel_statistics(batch)
        return functional.mse_loss(predicted.float(), (batch.masked - mean) / scale)

    def reconstruct(self, latent: Tensor, batch: AmdBatch) -> Tensor:
        mean, scale = self._pixel_statistics(batch)
        return self.decoder(latent, batch.ids_keep, batch.ids_masked).float() * scale + mean

    def _pixel_statistics(self, batch: AmdBatch) -> tuple[Tensor, Tensor]:
        """What is subtracted from a masked patch, and by what it is divided, in normalised pixels."""
        if self.pixels == "patch":
            return patch_statistics(batch.masked)
        unit = batch.white - batch.black  # [C]: 1 of a pixel from 0 to 1
        if self.pixels == "raw":
            return batch.black, unit
        deviation, mean = torch.std_mean(batch.masked, dim=(-3, -2), keepdim=True)  # [N, L - K, 1, 1, C]
        return mean, deviation + EPSILON * unit


def build_generator(
    config: AmdConfig, *, student: MaskedViT, teacher: TeacherShape, generator: torch.Generator
) -> TokenDecoder:
    """Return blocks of the teacher's width on mapped tokens and mask tokens, both with positions."""
    num_heads = config.generator.num_heads or max(1, teacher.embed_dim // HEAD_DIM)
    if teacher.embed_dim % num_heads:
        raise UserError(
            f"objective.generator.num_heads {num_heads} does not divide the teacher's width "
            f"{teacher.embed_dim}; set it to {teacher.num_heads}, the teacher's heads"
        )
    built = TokenDecoder(
        encoder_dim=teacher.embed_dim,
        grid=student.grid,
        depth=config.generator.depth,
        embed_dim=teacher.embed_dim,
        num_heads=num_heads,
        generator=generator,
    )
    built.embed = nn.Identity()  # a map is applied before
    if not config.train_mask_tokens:
        token = built.mask_token.detach()
        del built.mask_token
        built.register_buffer("mask_token", token)
    return built


def _use_positions_1d(student: MaskedViT, *decoders: TokenDecoder) -> None:
    """Give all networks the published one-dimensional code. Raises UserError for a student of other kind."""
    if not student.is_plain:
        raise UserError(
            "objective.positions=1d requires a student with one fixed positional embedding, as a plain ViT "
            "has; set objective.positions=2d"
        )
    for network in (student, *decoders):
        network.pos_embed = sincos_positions_1d(network.pos_embed.shape[2], student.num_patches)
