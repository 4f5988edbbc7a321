"""`dmae-ds export`: arguments."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_export(subcommands) -> None:
    """Add `export` to the root parser."""
    export = subcommands.add_parser(
        "export",
        help="write the student in another library's format, load it there, compare, and add a model card",
    )
    export.add_argument(
        "run", metavar="RUN", help="a run folder, or the folder that eval finetune, linear or segment wrote"
    )
    export.add_argument(
        "--to",
        choices=("timm", "hf", "onnx", "safetensors", "original"),
        required=True,
        help="the format; hf is transformers, original the names of the file that the student began from",
    )
    export.add_argument(
        "--what",
        choices=("encoder", "mae", "classifier", "segmenter"),
        default="encoder",
        help="what to write; mae is the encoder with its pixel decoder, for hf; segmenter is for onnx "
        "(default encoder)",
    )
    export.add_argument("--out", metavar="DIR", help="the folder to write (default RUN/export/FORMAT)")
    export.add_argument(
        "--license",
        metavar="ID",
        default="unknown",
        help="licence of these weights, for the card (default unknown)",
    )
    export.set_defaults(command=_export)


def _export(args: argparse.Namespace) -> None:
    from dmae_ds.export.early import choose_out

    out = Path(args.out) if args.out else None
    choose_out(Path(args.run), to=args.to, what=args.what, out=out)
    from dmae_ds.export.export import describe, export

    exported = export(Path(args.run), to=args.to, what=args.what, out=out, license=args.license)
    print(describe(*exported))
