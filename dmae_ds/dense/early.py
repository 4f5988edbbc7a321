"""Mistakes in `dmae-ds eval segment` and `eval detect` that are found before torch is imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from dmae_ds.config.batch import split_batch
from dmae_ds.config.dense import DenseConfig
from dmae_ds.config.detection import DetectConfig
from dmae_ds.config.segmentation import SegmentConfig
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.storage import Access
from dmae_ds.dense.schedule import total_steps
from dmae_ds.errors import UserError
from dmae_ds.evaluate.subsets import first_difference, warn_of_same_images
from dmae_ds.finetune.early import check_is_new
from dmae_ds.finetune.source import Source
from dmae_ds.weights.early import check_file
from dmae_ds.weights.label import WEIGHTS


def check_segment(source: Source, *, world_size: int, resume: str) -> None:
    """Raise UserError for what can be known without torch: classes, weights, an existing result, the batch.

    The manifests of the shards are read, and no image.
    """
    config: SegmentConfig = source.config
    train, val = open_sets(config)
    for name, shard_set in (("data.train", train), ("data.val", val)):
        if shard_set.dense is None or shard_set.dense.map_classes is None:
            raise UserError(
                f"{name} '{shard_set.folder}' has no label maps; make it with `dmae-shards make SRC DST "
                f"--masks DIR`, or give {name}= other shards"
            )
    classes = train.dense.map_classes
    check_same_classes(val.dense.map_classes, classes, None)
    if len(classes) < 2:
        raise UserError(f"data.train '{train.folder}' has 1 class, a segmentation requires at least 2")
    micro_batch = check_start(source, num_images=train.num_samples, world_size=world_size, resume=resume)
    if micro_batch * world_size < 2:
        raise UserError(
            "the heads' batch norm requires at least 2 images at once on all ranks together, found 1; raise "
            "optim.micro_batch or optim.global_batch"
        )
    if config.distill is not None:
        teacher = Path(config.distill.teacher).expanduser()
        if not teacher.is_file():
            raise UserError(
                f"distill.teacher '{teacher}' not found; give best.safetensors of `dmae-ds eval segment`"
            )
    warn_of_same_images(train, val)


def check_detect(source: Source, *, world_size: int, resume: str) -> None:
    """Raise UserError for what can be known without torch: pycocotools, classes, masks, weights, the batch.

    The manifests of the shards are read, and no image.
    """
    config: DetectConfig = source.config
    check_pycocotools()
    train, val = open_sets(config)
    for name, shard_set in (("data.train", train), ("data.val", val)):
        dense = shard_set.dense
        if dense is None or not dense.has_masks:
            found = "no boxes" if dense is None or dense.box_classes is None else "boxes without masks"
            raise UserError(
                f"{name} '{shard_set.folder}' has {found}; make it with `dmae-shards make SRC DST --coco "
                f"FILE` of a file whose annotations have a segmentation, or give {name}= other shards"
            )
    check_same_classes(val.dense.box_classes, train.dense.box_classes, None)
    check_start(source, num_images=train.num_samples, world_size=world_size, resume=resume)
    if config.distill is not None:
        teacher = Path(config.distill.teacher).expanduser()
        if not teacher.is_file():
            raise UserError(
                f"distill.teacher '{teacher}' not found; give best.safetensors of `dmae-ds eval detect`"
            )
    warn_of_same_images(train, val)


def check_pycocotools() -> None:
    """Raise UserError where pycocotools is not installed."""
    if importlib.util.find_spec("pycocotools") is None:
        raise UserError(
            "average precision requires pycocotools, which is not installed; "
            'run: pip install "dmae-ds[dense]"'
        )


def check_start(source: Source, *, num_images: int, world_size: int, resume: str) -> int:
    """Check what all dense tasks share: weights, an existing result, the batch and the schedule.

    Returns the images of a rank at once. Raises UserError.
    """
    config: DenseConfig = source.config
    if resume == "never":
        check_is_new(Path(config.run.dir).expanduser())
    if config.init == "weights":
        check_file(source.file, config.network, WEIGHTS)
    total_steps(config.optim, num_images)
    optim = config.optim
    return split_batch(optim.global_batch, optim.micro_batch, world_size, exact=True).micro_batch


def open_sets(config: DenseConfig) -> tuple[ShardSet, ShardSet]:
    """data.train and data.val. Raises UserError for folders that can't be used."""
    access = Access.of(config.data)
    train, val = config.data.train, config.data.val
    return (
        ShardSet.open(train, label="data.train", access=access),
        ShardSet.open(val, label="data.val", access=access),
    )


def check_same_classes(found: list[str], train: list[str], teacher: Path | None) -> None:
    """Raise UserError where data.val, or a teacher's file, has other classes than data.train."""
    if found == train:
        return
    if teacher is None:
        raise UserError(
            f"data.train and data.val have different classes: {first_difference(train, found)}; make both "
            "with the same class list"
        )
    raise UserError(
        f"distill.teacher '{teacher}' has {len(found)} classes, other ones than the {len(train)} of "
        "data.train; give a segmenter of the same classes"
    )
