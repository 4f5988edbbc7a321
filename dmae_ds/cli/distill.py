"""`dmae-ds distill`: arguments."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from dmae_ds.cli.arguments import add_quiet, at_least_one


def add_distill(subcommands) -> None:
    """Add `distill` to the root parser."""
    distill = subcommands.add_parser(
        "distill",
        help="a folder of images and a teacher become a student: shards, recipe and training in one command",
    )
    add = distill.add_argument
    add("folder", metavar="FOLDER", help="images, class folders of images, folders train and val, or shards")
    add("--teacher", required=True, metavar="T", help="a weights file or folder, a hub id, or timm's name")
    add("--student", required=True, metavar="NAME", help="timm's name, such as vit_small_patch16_224")
    add("--epochs", type=_positive, metavar="N", help="length of the run (by default chosen, and said)")
    add("--shards", metavar="DIR", help="where shards are made (by default FOLDER-shards, next to FOLDER)")
    add(
        "--ranks",
        type=at_least_one,
        metavar="N",
        help="processes (by default one a GPU, else one for every 8 cores)",
    )
    add("--max-skip", type=_count, default=0, metavar="N", help="unusable images to leave out (default 0)")
    add(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="other keys of the recipe, for example run.dir=runs/mine",
    )
    add_quiet(distill)
    distill.set_defaults(command=_distill)


def _distill(args: argparse.Namespace) -> None:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch is imported, as in train.py
    from dmae_ds.distill.request import Request
    from dmae_ds.distill.resolve import resolve
    from dmae_ds.distill.start import start

    request = Request(
        images=Path(args.folder),
        teacher=args.teacher,
        student=args.student,
        epochs=args.epochs,
        shards=None if args.shards is None else Path(args.shards),
        ranks=args.ranks,
        max_skip=args.max_skip,
        overrides=tuple(args.overrides),
    )
    start(*resolve(request), in_place=True)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number")
    return int(text)
