"""`dmae-shards make | info`: the command line of the shard tool. Exit code 2 for a mistake, 130 for Ctrl-C."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from data_prep.make import make_shards
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import ShardError

PROG = "dmae-shards"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # one line, without the usage
        self.exit(2, f"{PROG}: error: {message}; see {self.prog} --help\n")


def main(argv: list[str] | None = None) -> int:
    args = _build_parser().parse_args(argv)
    try:
        if args.command == "make":
            make_shards(
                args.src,
                args.dst,
                samples_per_shard=args.samples_per_shard,
                num_workers=args.workers,
                seed=args.seed,
                max_skip=args.max_skip,
                overwrite=args.overwrite,
            )
        else:
            print_info(args.dst)
    except (ShardError, OSError) as error:  # OSError: no space, no permission
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted; an unfinished DST has no manifest, --overwrite replaces it", file=sys.stderr)
        return 130
    return 0


def print_info(dst: Path) -> None:
    shard_set = ShardSet.open(dst, label="DST")
    rows = {
        "samples": f"{shard_set.num_samples:,}",
        "classes": f"{len(shard_set.classes):,}",
        "shards": f"{len(shard_set.shards):,}",
        "GiB": f"{sum(shard.bytes for shard in shard_set.shards) / 2**30:.3f}",
        "seed": shard_set.seed,
        "fingerprint": shard_set.fingerprint,
    }
    for name, value in rows.items():
        print(f"{name:<12} {value}")


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROG, description="Make shard folders (WebDataset tars with an index) from image folders.")
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="SRC/<class>/<image> -> shards in DST")
    make.add_argument("src", metavar="SRC", type=Path)
    make.add_argument("dst", metavar="DST", type=Path)
    make.add_argument("--samples-per-shard", type=_at_least(1), default=1000, metavar="N", help="default 1000")
    make.add_argument("--workers", type=_at_least(1), default=os.cpu_count(), metavar="N", help="default: all cores")
    make.add_argument("--seed", type=int, default=0, metavar="N", help="of the shuffle into shards; default 0")
    make.add_argument("--max-skip", type=_at_least(0), default=0, metavar="N", help="unreadable images to allow")
    make.add_argument("--overwrite", action="store_true", help="replace the shard set in DST")
    info = commands.add_parser("info", help="what a shard folder holds")
    info.add_argument("dst", metavar="DST", type=Path)
    return parser


def _at_least(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        return int(text)

    parse.__name__ = "integer"  # argparse's message for other text: invalid integer value
    return parse


if __name__ == "__main__":
    raise SystemExit(main())
