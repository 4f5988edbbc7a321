"""`dmae-ds teacher stats RECIPE`: mean and covariance of the teacher's features, for teacher.standardize.

One pass of the frozen teacher over the data. The statistics are of what the loss compares: the recipe's
crops, masks, taps and tokens, CLS included.
"""

from __future__ import annotations

import json
from math import ceil
from pathlib import Path
from typing import Iterator

import torch
from torch import Tensor

from dmae_ds.config.networks import TeacherConfig
from dmae_ds.config.run import RunConfig
from dmae_ds.config.teachers import taps_of
from dmae_ds.data.batch import Batch
from dmae_ds.data.batch_spec import BatchSpec
from dmae_ds.data.loader import train_batches
from dmae_ds.data.order import num_in_share, share_ids
from dmae_ds.data.pixels import PixelFormat
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.storage import Access
from dmae_ds.errors import UserError
from dmae_ds.models.patches import Normalize
from dmae_ds.objectives.base import Objective
from dmae_ds.output.durable import replace_tensors
from dmae_ds.output.progress import LINE_EVERY_S, Progress
from dmae_ds.teacher import identity, targets
from dmae_ds.teacher.build import build_frozen_teacher, locate_teacher, naming
from dmae_ds.teacher.frozen import FrozenTeacher
from dmae_ds.tools.early import check_stats, stats_file
from dmae_ds.train.networks import build_objective


class Moments:
    """Mean and covariance of vectors [*, D], summed in float64 about the first batch's mean."""

    def __init__(self) -> None:
        self.count = 0
        self.shift: Tensor | None = None

    def add(self, vectors: Tensor) -> None:
        vectors = vectors.reshape(-1, vectors.shape[-1]).double()
        if self.shift is None:
            self.shift = vectors.mean(0)
            self.sum = torch.zeros_like(self.shift)
            self.products = torch.zeros(len(self.shift), len(self.shift)).to(vectors)
        vectors = vectors - self.shift
        self.count += len(vectors)
        self.sum += vectors.sum(0)
        self.products += vectors.T @ vectors

    def mean(self) -> Tensor:
        return self.shift + self.sum / self.count

    def covariance(self) -> Tensor:
        """Covariance [D, D], divided by the count."""
        centre = self.sum / self.count
        return self.products / self.count - torch.outer(centre, centre)


def write_stats(
    config: RunConfig, *, num_images: int, out: Path | None, device: torch.device | None = None
) -> str:
    """Write the statistics of a recipe's teachers, all in one pass; returns a line about each file.

    out: the file, or of several teachers a folder; None: next to the weights
    Raises UserError.
    """
    check_stats(config, num_images=num_images, out=out)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shards = ShardSet.open(config.data.train, label="data.train", access=Access.of(config.data))
    num_images = min(num_images, num_in_share(shards.num_samples, config.data.share))
    objective, shapes = build_objective(config)
    sections, teachers = config.named_teachers(), {}
    for name, section in sections.items():
        with naming(section):
            teachers[name] = build_frozen_teacher(
                section,
                taps=taps_of(name, objective.taps),
                whole_blocks=shapes[name].depth,
                mean=config.data.mean,
                std=config.data.std,
                device=device,
                standardize=False,
            )
    normalize = Normalize(config.data.mean, config.data.std).to(device)
    moments = {name: {tap: Moments() for tap in teacher.taps} for name, teacher in teachers.items()}
    for batch in _batches(config, shards, objective, num_images=num_images, device=device):
        masked = objective.prepare(batch, normalize)
        for name, teacher in teachers.items():
            for tap, features in teacher.features(masked).items():
                moments[name][tap].add(features)
    lines = []
    for name, teacher in teachers.items():
        about = {"images": num_images, "data": config.data.train}
        file = _file_of(sections[name], name, out)
        _write(file, *_statistics(sections[name], teacher, moments[name], about), section=sections[name])
        use = f"use {sections[name].key('standardize')}=zscore or phi_s"
        if name and out is not None:
            use += f" and {sections[name].key('stats')}={file}"
        lines.append(
            f"{file}: mean and covariance of {', '.join(teacher.taps)} over {num_images:,} images; {use}"
        )
    return "\n".join(lines)


def _file_of(section: TeacherConfig, name: str, out: Path | None) -> Path:
    """The file of a teacher's statistics."""
    if out is None:
        return targets.stats_path(locate_teacher(section))
    return stats_file(out, name)


def _statistics(
    section: TeacherConfig, teacher: FrozenTeacher, moments: dict[str, Moments], about: dict
) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a teacher's file, and what it says about itself."""
    description = {
        "version": targets.STATS_VERSION,
        "taps": list(teacher.taps),
        "tokens": {tap: moment.count for tap, moment in moments.items()},
        "teacher": section.name,
        "sees": section.sees,
        "fingerprint": identity.fingerprint(identity.probe(teacher.vit).features),
        **about,
    }
    tensors = {}
    for tap, moment in moments.items():
        tensors[f"{tap}.mean"] = moment.mean().float().cpu()
        tensors[f"{tap}.covariance"] = moment.covariance().float().cpu()
    return tensors, description


def _batches(
    config: RunConfig, shards: ShardSet, objective: Objective, *, num_images: int, device: torch.device
) -> Iterator[Batch]:
    """Batches of the first `num_images` training images, on the device."""
    batch_size = min(config.optim.micro_batch or 64, num_images)
    num_batches = ceil(num_images / batch_size)
    student = objective.student
    spec = BatchSpec(
        img_size=student.grid[0] * student.patch_size,
        num_patches=student.num_patches,
        crop_scale=config.data.crop_scale,
        flip=config.data.flip,
        seed=config.run.seed,
        global_batch=batch_size,
        micro_batch=batch_size,
        views=objective.views,
        subset=None if config.data.share == 1 else share_ids(shards.num_samples, config.data.share),
        pixels=PixelFormat.of(config.data),
    )
    batches = train_batches(
        shards,
        spec,
        start_step=0,
        stop_step=num_batches,
        num_workers=config.data.num_workers,
        pin_memory=device.type == "cuda",
        max_corrupt=config.data.max_corrupt,
    )
    num_seen = 0
    with Progress(total=num_batches, unit="batch", every_s=LINE_EVERY_S) as progress:
        for batch in batches:
            yield batch.to(device).first(num_images - num_seen)
            num_seen += batch_size
            progress.advance()


def _write(path: Path, tensors: dict[str, Tensor], description: dict, *, section: TeacherConfig) -> None:
    try:
        if section.section != "teacher":  # a folder for several
            path.parent.mkdir(parents=True, exist_ok=True)
        replace_tensors(path, tensors, {"about": json.dumps(description)})
    except OSError as error:
        raise UserError(
            f"'{path}' cannot be written ({error.strerror or error}); choose another place with --out, "
            f"and set {section.key('stats')} to its file"
        ) from None
