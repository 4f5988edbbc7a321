"""`dmae-ds checkpoint inspect | verify | convert`. Parsers and handlers; torch is imported when one of them needs it."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_checkpoint(commands) -> None:
    """Put `checkpoint` and what is below it into the root parser's subparsers."""
    checkpoint = commands.add_parser(
        "checkpoint", help="look at, check or convert what a run saved"
    ).add_subparsers(required=True, metavar="inspect | verify | convert")
    about = "a run folder, or one checkpoint's folder"
    inspect = checkpoint.add_parser(
        "inspect", help="every checkpoint of a run: step, epoch, what wrote it, bytes, whether it is whole"
    )
    inspect.set_defaults(command=_inspect)
    verify = checkpoint.add_parser(
        "verify", help="read every byte and compare the checksums; exit code 2 where something is wrong"
    )
    verify.set_defaults(command=_verify)
    convert = checkpoint.add_parser(
        "convert",
        help="DeepSpeed's universal layout, for other programs (--resume auto moves checkpoints by itself)",
    )
    convert.set_defaults(command=_convert)
    for command in (inspect, verify, convert):
        command.add_argument(
            "path",
            metavar="RUN|FOLDER",
            help=about + (" (of a run: the newest)" if command is convert else ""),
        )
    convert.add_argument("out", metavar="OUT", help="the folder to write")


def _inspect(args: argparse.Namespace) -> None:
    from dmae_ds.tools.checkpoint_inspect import inspect

    print(inspect(Path(args.path)))


def _verify(args: argparse.Namespace) -> None:
    from dmae_ds.tools.checkpoint_inspect import verify

    print(verify(Path(args.path)))


def _convert(args: argparse.Namespace) -> None:
    from dmae_ds.tools.checkpoint_convert import convert

    print(convert(Path(args.path), Path(args.out)))
