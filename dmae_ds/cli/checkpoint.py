"""`dmae-ds checkpoint inspect | verify | convert`: arguments; torch is imported when a command needs it."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_checkpoint(subcommands) -> None:
    """Add `checkpoint` and its subcommands to the root parser."""
    checkpoint = subcommands.add_parser("checkpoint", help="inspect, verify or convert a run's checkpoints")
    kinds = checkpoint.add_subparsers(required=True, metavar="inspect | verify | convert")
    inspect = kinds.add_parser(
        "inspect", help="list a run's checkpoints: step, epoch, ranks, ZeRO stage, bytes, whether complete"
    )
    inspect.add_argument("path", metavar="RUN|FOLDER", help="a run folder, or the folder of one checkpoint")
    inspect.set_defaults(command=_inspect)

    verify = kinds.add_parser(
        "verify", help="read every byte and compare the checksums; exit code 2 if something is wrong"
    )
    verify.add_argument("path", metavar="RUN|FOLDER", help="a run folder, or the folder of one checkpoint")
    verify.set_defaults(command=_verify)

    convert = kinds.add_parser(
        "convert",
        help="write DeepSpeed's universal format, for other programs (--resume auto does not need it)",
    )
    convert.add_argument(
        "path",
        metavar="RUN|FOLDER",
        help="a run folder (its newest checkpoint), or the folder of one checkpoint",
    )
    convert.add_argument("out", metavar="OUT", help="the folder to write")
    convert.set_defaults(command=_convert)


def _inspect(args: argparse.Namespace) -> None:
    from dmae_ds.tools.checkpoint_inspect import inspect

    print(inspect(Path(args.path)))


def _verify(args: argparse.Namespace) -> None:
    from dmae_ds.tools.checkpoint_inspect import verify

    print(verify(Path(args.path)))


def _convert(args: argparse.Namespace) -> None:
    from dmae_ds.tools.checkpoint_find import find_to_convert

    find_to_convert(Path(args.path), Path(args.out))
    from dmae_ds.tools.checkpoint_convert import convert

    print(convert(Path(args.path), Path(args.out)))
