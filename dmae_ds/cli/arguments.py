"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

from dmae_ds.output.parser import in_list


def add_recipe(
    parser: argparse.ArgumentParser,
    *,
    note: str = "",
    optional: bool = False,
    example: str = "objective.mask_ratio=0.9",
) -> None:
    """Add RECIPE and its key=value overrides; `note` ends the recipe's help text."""
    parser.add_argument(
        "recipe",
        nargs="?" if optional else None,
        help=f"a YAML file, or the name of a shipped recipe{note}",
    )
    _add_overrides(parser, example=example)


def _add_overrides(parser: argparse.ArgumentParser, *, example: str) -> None:
    text = f"change keys of the recipe, for example {example}"
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=text)


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Add `--quiet`."""
    parser.add_argument(
        "-q",
        "--quiet",
        action="store_true",
        help="leave out the summary, progress and lines about saves; results, warnings and errors stay",
    )


def add_training(
    kinds, name: str, *, help: str, recipe: str, of_file: str, example: str
) -> argparse.ArgumentParser:
    """Add an evaluation that trains by a recipe to the kinds of `eval`, and return its parser.

    of_file: the keys that a weights file needs; example: of overrides
    """
    parser = kinds.add_parser(name, help=help)
    parser.add_argument(
        "weights", metavar="RUN|FILE", help=f"a run folder; or a weights file, followed by {of_file}"
    )
    _add_overrides(parser, example=example)
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


def add_labels(parser: argparse.ArgumentParser, *, nargs: str | None = None) -> None:
    """Add `--labels` and `--subset-seed`, which `evaluate.subsets.open_subset` takes."""
    parser.add_argument(
        "--labels",
        default="all" if nargs is None else ["all"],
        nargs=nargs,
        type=str if nargs is None else in_list(_no_path),
        metavar="SHARE",
        help="labelled training images: all, 1%%, 10%%, 5-shot, ... (default all)",
    )
    parser.add_argument(
        "--subset-seed",
        type=int,
        metavar="S",
        help="seed that draws the labelled images (default 0; RUN/subsets keeps their keys)",
    )


def at_least_one(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def _no_path(text: str) -> str:
    """A share of the labels as it was typed. Raises ValueError for a path: a run behind the option."""
    if Path(text).exists():
        raise ValueError(text)
    return text
