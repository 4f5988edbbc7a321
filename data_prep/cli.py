"""`dmae-shards make | verify | info | index | bench`: the shard tool. Exit code 2 for a mistake, 130 for Ctrl-C."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from dmae_ds.data.shards import ShardError

PROG = "dmae-shards"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # one line, without the usage
        self.exit(2, f"{PROG}: error: {message}; see {self.prog} --help\n")


def main(argv: list[str] | None = None) -> int:
    args = vars(_build_parser().parse_args(argv))
    command = args.pop("run")
    try:
        command(**args)
    except (ShardError, OSError) as error:  # OSError: no space, no permission
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


def _make(*, src: Path, dst: Path, workers: int, max_skip: int, overwrite: bool, **options: object) -> None:
    from data_prep.make import MakeOptions, make_shards

    make_shards(src, dst, MakeOptions(**options), num_workers=workers, max_skip=max_skip, overwrite=overwrite)


def _verify(*, dst: Path, **options: object) -> None:
    from data_prep.verify import verify_shards

    verify_shards(dst, **options)


def _info(*, dst: Path, **options: object) -> None:
    from data_prep.info import print_info

    print_info(dst, **options)


def _index(*, tars: str, **options: object) -> None:
    from data_prep.index import index_tars

    index_tars(tars, **options)


def _bench(*, src: Path, **options: object) -> None:
    from data_prep.bench import run_bench

    run_bench(src, **options)


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROG, description="Make shard folders (WebDataset tars with an index) from image folders."
    )
    commands = parser.add_subparsers(required=True, metavar="make | verify | info | index | bench")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

    def command(name: str, run: Callable, text: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=text, description=text)
        found.set_defaults(run=run)
        return found

    def add_workers(found: argparse.ArgumentParser) -> None:
        found.add_argument(
            "--workers", type=_at_least(1), default=cores, metavar="N", help="processes; default: all cores"
        )

    make = command("make", _make, "an image folder -> shards; run again after an interruption, it continues")
    make.add_argument("src", metavar="SRC", type=Path, help="SRC/<class>/<image>, or a flat folder")
    make.add_argument("dst", metavar="DST", type=Path)
    make.add_argument(
        "--samples-per-shard", type=_at_least(1), default=1000, metavar="N", help="default 1000"
    )
    add_workers(make)
    make.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the shuffle into shards; default 0"
    )
    make.add_argument(
        "--classes", type=Path, metavar="FILE", help="class folders in the order of their labels, one a line"
    )
    flat = make.add_mutually_exclusive_group()
    flat.add_argument(
        "--labels", type=Path, metavar="FILE", help="flat SRC: lines `<image> <class or its number>`"
    )
    flat.add_argument("--unlabelled", action="store_true", help="flat SRC: every label is -1")
    make.add_argument(
        "--resize",
        type=_at_least(1),
        metavar="N",
        help="store upright JPEGs of short side N (default: bytes untouched)",
    )
    make.add_argument(
        "--quality",
        type=_in_range(1, 100),
        metavar="N",
        help="JPEG quality of what --resize stores; default 95",
    )
    make.add_argument(
        "--verify", choices=("header", "full"), default="header", help="full: decode every image"
    )
    make.add_argument(
        "--json", action="store_true", help="add <key>.json: source, class, label, width, height"
    )
    make.add_argument(
        "--max-skip", type=_at_least(0), default=0, metavar="N", help="unusable images to allow; default 0"
    )
    make.add_argument("--overwrite", action="store_true", help="replace the shard set in DST")

    verify = command(
        "verify", _verify, "read a shard folder again, and name what is not as manifest and index say"
    )
    verify.add_argument("dst", metavar="DST", type=Path)
    verify.add_argument(
        "--sample", type=_share, default=1.0, metavar="P%%", help="so many of each shard's samples only"
    )
    add_workers(verify)

    info = command("info", _info, "what a shard folder holds")
    info.add_argument("dst", metavar="DST", type=Path)
    info.add_argument("--sheet", type=Path, metavar="FILE.png", help="write a contact sheet")

    index = command("index", _index, "index and manifest for WebDataset tars that somebody else wrote")
    index.add_argument(
        "tars",
        metavar="TARS",
        help="a folder, or a URL (http, s3, gs, hf) with {000..146} or of a bucket's folder",
    )
    index.add_argument(
        "dst",
        metavar="DST",
        type=Path,
        nargs="?",
        help="where index and manifest go; default: the folder itself",
    )
    index.add_argument(
        "--image", metavar="EXT", help="the member that is the image; default: the first jpg, jpeg or png"
    )
    index.add_argument(
        "--label",
        metavar="EXT",
        help="the member with the label, cls or json:KEY; default: cls, where there is one",
    )
    index.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes, one a line")
    index.add_argument(
        "--max-skip", type=_at_least(0), default=0, metavar="N", help="unusable samples to allow; default 0"
    )
    index.add_argument("--overwrite", action="store_true", help="replace index and manifest in DST")
    add_workers(index)

    bench = command(
        "bench",
        _bench,
        "speed on this machine: conversion, reading and decoding against tar, webdataset and the official recipe",
    )
    bench.add_argument("src", metavar="SRC", type=Path, help="an image folder")
    bench.add_argument("--only", choices=("conversion", "reading", "decoding"), help="one of the tables")
    bench.add_argument(
        "--limit", type=_at_least(1), default=20_000, metavar="N", help="images of it to use; default 20000"
    )
    bench.add_argument("--rounds", type=_at_least(1), default=5, metavar="N", help="default 5")
    bench.add_argument(
        "--scratch", type=Path, metavar="FOLDER", help="where to write; default: the temporary folder"
    )
    return parser


def _at_least(minimum: int) -> Callable[[str], int]:
    return _in_range(minimum, None)


def _in_range(minimum: int, maximum: int | None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        if maximum is not None and int(text) > maximum:
            raise argparse.ArgumentTypeError(f"{text} is more than {maximum}")
        return int(text)

    parse.__name__ = "integer"  # argparse's message for other text: invalid integer value
    return parse


def _share(text: str) -> float:
    """'1%' -> .01"""
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = 0
    if not text.endswith("%") or not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a percentage such as 1%")
    return share


if __name__ == "__main__":
    raise SystemExit(main())
