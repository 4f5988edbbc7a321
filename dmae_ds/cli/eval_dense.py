"""`dmae-ds eval segment | detect`: arguments of what trains a dense task; torch is imported late."""

from __future__ import annotations

import argparse

from dmae_ds.cli.arguments import add_quiet
from dmae_ds.cli.ranks import same_on_every_rank, share_cpus


def add_segment(kinds) -> None:
    """Add `segment`."""
    segment = add_dense_training(
        kinds,
        "segment",
        help="train a segmenter on label maps (UperNet or a linear head on the ViT), then measure its mIoU",
        recipe="upernet_ade20k",
    )
    segment.set_defaults(command=_segment)


def add_detect(kinds) -> None:
    """Add `detect`."""
    detect = add_dense_training(
        kinds,
        "detect",
        help="train a detector on boxes and masks (Mask R-CNN on the ViT), then measure its box and mask AP",
        recipe="vitdet_coco",
    )
    detect.set_defaults(command=_detect)


def add_dense_training(kinds, name: str, *, help: str, recipe: str) -> argparse.ArgumentParser:
    """Add an evaluation that trains a dense task by a recipe."""
    parser = kinds.add_parser(name, help=help)
    parser.add_argument(
        "weights",
        metavar="RUN|FILE",
        help="a run folder; or a weights file, followed by run.dir= and network.name=",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="change keys of the recipe: data.train=SHARDS data.val=SHARDS",
    )
    parser.add_argument(
        "--recipe", default=recipe, help=f"a YAML file, or the name of a shipped recipe (default {recipe})"
    )
    parser.add_argument(
        "--resume",
        choices=("never", "auto"),
        default="never",
        help="auto: continue an interrupted training if there is one (default never)",
    )
    add_quiet(parser)
    return parser


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
