"""`dmae-ds eval segment | detect`: arguments of what trains a dense task; torch is imported late."""

from __future__ import annotations

import argparse

from dmae_ds.cli.arguments import add_training
from dmae_ds.cli.ranks import same_on_every_rank, share_cpus

WORDS = {"of_file": "run.dir= and network.name=", "example": "data.train=SHARDS data.val=SHARDS"}


def add_segment(kinds) -> None:
    """Add `segment`."""
    segment = add_training(
        kinds,
        "segment",
        help="train a segmenter on label maps (UperNet or a linear head on the ViT), then measure its mIoU",
        recipe="upernet_ade20k",
        **WORDS,
    )
    segment.set_defaults(command=_segment)


def add_detect(kinds) -> None:
    """Add `detect`."""
    detect = add_training(
        kinds,
        "detect",
        help="train a detector on boxes and masks (Mask R-CNN on the ViT), then measure its box and mask AP",
        recipe="vitdet_coco",
        **WORDS,
    )
    detect.set_defaults(command=_detect)


def _segment(args: argparse.Namespace) -> None:
    from dmae_ds.config.segmentation import SegmentConfig
    from dmae_ds.dense.early import check_segment
    from dmae_ds.finetune.source import find_source

    given = {"recipe": args.recipe, "overrides": args.overrides}
    with same_on_every_rank() as world:
        source = find_source(args.weights, schema=SegmentConfig, **given)
        check_segment(source, world_size=world.size, resume=args.resume)
    from dmae_ds.dense.segment import evaluate

    with same_on_every_rank() as world:
        share_cpus(world)
        evaluate(args.weights, resume=args.resume, **given)


def _detect(args: argparse.Namespace) -> None:
    from dmae_ds.config.detection import DetectConfig
    from dmae_ds.dense.early import check_detect
    from dmae_ds.finetune.source import find_source

    given = {"recipe": args.recipe, "overrides": args.overrides}
    with same_on_every_rank() as world:
        source = find_source(args.weights, schema=DetectConfig, **given)
        check_detect(source, world_size=world.size, resume=args.resume)
    from dmae_ds.dense.detect import evaluate

    with same_on_every_rank() as world:
        share_cpus(world)
        evaluate(args.weights, resume=args.resume, **given)
