"""What feeds a run: cores that decode, storage that is read, and the time until the teacher is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from dmae_ds.config.batch import split_recipe
from dmae_ds.config.data import TrainingDataConfig
from dmae_ds.config.run import RunConfig
from dmae_ds.data.order import num_in_share
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.errors import UserError
from dmae_ds.plan.choose import Candidate
from dmae_ds.plan.cost import Machine
from dmae_ds.plan.geometry import TeacherGeometry
from dmae_ds.teacher.frozen import DTYPES

IMAGENET = 1_281_167  # training images of ImageNet-1k
IMAGENET_BYTES = 107_600  # of an image: the published tar of the training images has 137.9 GB
FILE_BYTES = 4  # of a parameter in a weights file; most are published in fp32
NEAR = 5  # numbers of ranks that are shown
MOST_RANKS = 4096


@dataclass(frozen=True)
class Images:
    """Images of an epoch, their bytes, and where these numbers come from."""

    number: int
    image_bytes: float
    source: str


def count_images(data: TrainingDataConfig, images: int | None) -> Images:
    """Count an epoch's images, data.share of data.train's where it is here, otherwise of ImageNet-1k's.

    images: `--images`, which replaces the number of all
    """
    every = _count_all(data.train, images)
    if data.share == 1:
        return every
    number = num_in_share(every.number, data.share)
    return Images(number, every.image_bytes, f"data.share {data.share:g} of {every.source}")


def _count_all(train: str, images: int | None) -> Images:
    if images is not None and images < 1:
        raise UserError(f"--images is {images}; give a number above 0")
    if "://" not in train and Path(train).expanduser().exists():
        shards = ShardSet.open(train, label="data.train")
        image_bytes = sum(shard.bytes for shard in shards.shards) / shards.num_samples
        if images is None:
            return Images(shards.num_samples, image_bytes, f"the manifest of {train}")
        return Images(images, image_bytes, "--images")
    if images is not None:
        return Images(images, IMAGENET_BYTES, "--images")
    return Images(
        IMAGENET,
        IMAGENET_BYTES,
        f"ImageNet-1k's: data.train '{train}' not found, and no --images given",
    )


def describe_feeding(config: RunConfig, machine: Machine, best: Candidate, images: Images) -> list[str]:
    """Lines: cores and GB/s that the fastest needs at the highest share of the peak, and what there is."""
    needed = config.optim.global_batch / best.band[-1]  # images/s
    nodes = machine.gpus // machine.gpus_per_node
    num_workers, rate = config.data.num_workers, machine.worker_images_s
    workers = machine.gpus * max(1, num_workers)  # without workers each rank loads by itself
    per_gpu = needed / rate / machine.gpus
    decode = (
        f"loader: {needed:,.0f} images/s, at {machine.band[-1]:.0%} of the peak, need {per_gpu:.2g} cores a "
        f"GPU at {rate:g} images/s each; {workers} workers (data.num_workers {num_workers} a rank) give "
        f"{workers * rate:,.0f}: "
    )
    keeps_up = workers * rate >= needed
    decode += "enough" if keeps_up else f"the limit; set data.num_workers={math.ceil(per_gpu)}"
    read = needed * images.image_bytes / 1e9
    storage = (
        f"storage: {read / nodes:.3g} GB/s a node, {read:.3g} in all, at {images.image_bytes / 1e3:,.3g} kB "
        f"an image; {machine.storage_gb_s:g} GB/s a node (--storage-gb-s) is "
    )
    return [decode, storage + ("enough" if machine.storage_gb_s * nodes >= read else "the limit")]


def describe_loading(config: RunConfig, machine: Machine, teachers: dict[str, TeacherGeometry]) -> list[str]:
    """A line for each teacher with the time to read its needed part, once on every node."""
    lines = []
    for name, teacher in teachers.items():
        if not teacher.depth:
            continue
        section = config.named_teachers()[name]
        parameters = teacher.weight_bytes / DTYPES[section.dtype].itemsize
        gigabytes = parameters * FILE_BYTES / 1e9
        lines.append(
            f"{section.section}: {gigabytes:.3g} GB of a file in fp32 are read on every node, "
            f"{gigabytes / machine.storage_gb_s:.3g} s at {machine.storage_gb_s:g} GB/s"
        )
    return lines


def describe_ranks(config: RunConfig, machine: Machine) -> str:
    """A line with the numbers of GPUs, near to this one, that cut the batch evenly into whole nodes."""
    node = machine.gpus_per_node
    fitting = []
    for ranks in range(1, min(config.optim.global_batch, MOST_RANKS) + 1):
        if config.optim.global_batch % ranks or (ranks > node and ranks % node):
            continue
        try:
            split_recipe(config, ranks)
        except UserError:
            continue
        fitting.append(ranks)
    near = sorted(
        sorted(fitting, key=lambda ranks: abs(ranks.bit_length() - machine.gpus.bit_length()))[:NEAR]
    )
    counts = ", ".join(map(str, near))
    return f"optim.global_batch {config.optim.global_batch} is cut evenly by {counts} GPUs, of those nearest"
