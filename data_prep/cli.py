"""Command line of the shard tool: `dmae-shards make | verify | info | index | bench`.

Exit code 2 for a mistake of the user, 130 for Ctrl-C.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dmae_ds.data.shards import ShardError
from dmae_ds.output.closed_pipe import EXIT_CODE, stdout_is_closed
from dmae_ds.output.library_warnings import hide_library_warnings
from dmae_ds.output.local_path import looks_like_url, refuse_urls
from dmae_ds.output.parser import OneLineParser

PROG = "dmae-shards"


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    hide_library_warnings()
    args = vars(build_parser().parse_args(argv))
    command, may_be_url = args.pop("run"), args.pop("may_be_url", ())
    try:
        problem = refuse_urls(args, command=PROG, may_be_url=may_be_url)
        if problem is not None:
            raise ShardError(problem)
        command(**args)
        sys.stdout.flush()
    except (ShardError, OSError) as error:  # OSError: no space, no permission
        if isinstance(error, BrokenPipeError) and stdout_is_closed():
            return EXIT_CODE
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


def _make(
    *,
    src: Path,
    dst: Path | str,
    staging: Path | None,
    workers: int,
    max_skip: int,
    overwrite: bool,
    **options: object,
) -> None:
    from data_prep.dense import DenseOptions
    from data_prep.make import MakeOptions, make_shards

    dense = DenseOptions(**{name: options.pop(name) for name in DenseOptions.__dataclass_fields__})
    make_shards(
        src,
        dst,
        MakeOptions(**options, dense=dense),
        staging=staging,
        num_workers=workers,
        max_skip=max_skip,
        overwrite=overwrite,
    )


def _verify(*, dst: Path | str, **options: object) -> None:
    from data_prep.verify import verify_shards

    verify_shards(dst, **options)


def _info(*, dst: Path | str, **options: object) -> None:
    from data_prep.info import print_info

    print_info(dst, **options)


def _index(*, tars: str, **options: object) -> None:
    from data_prep.index import index_tars

    index_tars(tars, **options)


def _bench(*, src: Path, **options: object) -> None:
    from data_prep.bench import run_bench

    run_bench(src, **options)


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=PROG, description="Make shard folders (WebDataset tars with an index) from image folders."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_make, _add_verify, _add_info, _add_index, _add_bench):
        add(commands)
    return parser


def _add_make(commands: Any) -> None:
    command = _add_command(
        commands, "make", _make, "convert an image folder to shards, or continue after an interruption"
    )
    add = command.add_argument
    add("src", metavar="SRC", type=Path, help="SRC/<class>/<image>, or a flat folder")
    add("dst", metavar="DST", type=_place, help="the shard folder, or an s3:// or gs:// URL of one")
    add("--staging", type=Path, metavar="FOLDER", help="for a URL: where shards are made; continues from it")
    command.set_defaults(may_be_url=["dst"])
    add("--samples-per-shard", type=_at_least(1), default=1000, metavar="N", help="default 1000")
    _add_workers(command)
    add("--seed", type=int, default=0, metavar="N", help="seed of the shuffle into shards; default 0")
    add("--classes", type=Path, metavar="FILE", help="class folders in the order of their labels, one a line")
    flat = command.add_mutually_exclusive_group()
    flat.add_argument(
        "--labels", type=Path, metavar="FILE", help="flat SRC: lines `<image> <class or its number>`"
    )
    flat.add_argument("--unlabelled", action="store_true", help="flat SRC: every label is -1")
    text = (
        "make a part alone: val is a tenth of the images, at most 1,000, drawn by --seed; train is the rest"
    )
    _add_dense(command)
    add("--part", choices=("train", "val"), help=text)
    add(
        "--resize",
        type=_at_least(1),
        metavar="N",
        help="store upright JPEGs of short side N (default: unchanged bytes)",
    )
    add(
        "--quality",
        type=_in_range(1, 100),
        metavar="N",
        help="JPEG quality of images that --resize stores; default 95",
    )
    text = "SRC holds .npy arrays [H, W, C] of uint8 or uint16: any number of channels"
    add("--arrays", action="store_true", help=text)
    add("--verify", choices=("header", "full"), default="header", help="full: decode every image")
    add("--json", action="store_true", help="add <key>.json: source, class, label, width, height")
    add("--max-skip", type=_at_least(0), default=0, metavar="N", help="unusable images to allow; default 0")
    add("--overwrite", action="store_true", help="replace the shard set in DST")


def _add_dense(command: Any) -> None:
    """Add the options for label maps and boxes (data_prep/DENSE.md)."""
    add = command.add_argument
    add("--only", type=Path, metavar="FILE", help="take the images of this list alone, a name a line")
    text = "flat SRC: a label map for each image, of its name with .png (ADE20K, VOC); requires its classes"
    add("--masks", type=Path, metavar="DIR", help=text)
    add("--num-classes", type=_at_least(1), metavar="N", help="of the maps; or --classes FILE, a name a line")
    text = "0 in a map is no class, and classes begin at 1 (ADE20K)"
    add("--zero-is-unlabelled", action="store_true", help=text)
    text = "the number that is no class in a map; default: 255, in 16 bits 65535"
    add("--ignore-label", type=_at_least(0), metavar="N", help=text)
    text = "flat SRC: boxes and masks of COCO's instances, polygons or run lengths"
    add("--coco", type=Path, metavar="FILE", help=text)
    text = "images that EXIF rotates: maps and boxes were drawn on stored or on upright pixels"
    add("--exif", choices=("stored", "upright"), help=text)


def _add_verify(commands: Any) -> None:
    text = "read a shard folder again, and list what differs from manifest and index"
    command = _add_command(commands, "verify", _verify, text)
    command.add_argument("dst", metavar="DST", type=_place, help="the shard folder, or its URL")
    command.set_defaults(may_be_url=["dst"])
    command.add_argument(
        "--sample",
        type=_share,
        default=1.0,
        metavar="P%%",
        help="check this share of each shard's samples only",
    )
    _add_workers(command)


def _add_info(commands: Any) -> None:
    command = _add_command(commands, "info", _info, "show what a shard folder holds")
    command.add_argument("dst", metavar="DST", type=_place, help="the shard folder, or its URL")
    command.set_defaults(may_be_url=["dst"])
    command.add_argument("--sheet", type=Path, metavar="FILE.png", help="write a contact sheet")
    text = "read images, and print the overrides data.mean= and data.std= for a recipe"
    command.add_argument("--mean-std", action="store_true", help=text)
    text = "most images to read for --mean-std; default 2000"
    command.add_argument("--images", type=_at_least(1), default=2000, metavar="N", help=text)


def _add_index(commands: Any) -> None:
    command = _add_command(commands, "index", _index, "write index and manifest for existing WebDataset tars")
    add = command.add_argument
    source = "a folder, or a URL (http, s3, gs, hf) with {000..146} or of a bucket's folder"
    add("tars", metavar="TARS", help=source)
    command.set_defaults(may_be_url=["tars"])
    target = "where index and manifest go; default: the folder itself"
    add("dst", metavar="DST", type=Path, nargs="?", help=target)
    add("--image", metavar="EXT", help="the member that is the image; default: the first jpg, jpeg or png")
    label = "the member with the label, cls or json:KEY; default: cls, where there is one"
    add("--label", metavar="EXT", help=label)
    add("--classes", type=Path, metavar="FILE", help="names of the classes, one a line")
    text = "read label maps from KEY.seg.png; names of their classes, one a line"
    add("--map-classes", type=Path, metavar="FILE", help=text)
    text = "read boxes and masks from KEY.ann.json; names of their classes, one a line"
    add("--box-classes", type=Path, metavar="FILE", help=text)
    add("--max-skip", type=_at_least(0), default=0, metavar="N", help="unusable samples to allow; default 0")
    add("--overwrite", action="store_true", help="replace index and manifest in DST")
    _add_workers(command)


def _add_bench(commands: Any) -> None:
    text = "measure conversion, reading and decoding on this machine, compared with tar, webdataset and PIL"
    command = _add_command(commands, "bench", _bench, text)
    add = command.add_argument
    add("src", metavar="SRC", type=Path, help="an image folder")
    add("--only", choices=("conversion", "reading", "decoding"), help="print only this table")
    add(
        "--limit",
        type=_at_least(1),
        default=20_000,
        metavar="N",
        help="number of images to use; default 20000",
    )
    add("--rounds", type=_at_least(1), default=5, metavar="N", help="default 5")
    add("--scratch", type=Path, metavar="FOLDER", help="where to write; default: the temporary folder")


def _add_command(commands: Any, name: str, run: Callable, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    return command


def _add_workers(command: argparse.ArgumentParser) -> None:
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    command.add_argument(
        "--workers", type=_at_least(1), default=num_cores, metavar="N", help="processes; default: all cores"
    )


def _place(text: str) -> Path | str:
    """A path, or a URL as it is: pathlib would join its slashes."""
    return text if looks_like_url(text) else Path(text)


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
    """Parse a percentage: '1%' -> .01."""
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = 0
    if not text.endswith("%") or not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a percentage such as 1%")
    return share


if __name__ == "__main__":
    raise SystemExit(main())
