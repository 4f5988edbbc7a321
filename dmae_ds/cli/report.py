"""`dmae-ds report`: arguments, and the choice between a page of runs and RESULTS.md."""

from __future__ import annotations

import argparse
from pathlib import Path

from dmae_ds.errors import UserError


def add_report(subcommands) -> None:
    """Add `report` to the root parser."""
    report = subcommands.add_parser("report", help="one self-contained HTML page about one or several runs")
    report.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="run folders; the page is written into the first one; with --results also folders of runs",
    )
    report.add_argument(
        "--out",
        metavar="FILE",
        help="the file to write (default RUN/report.html; of several runs comparison.html; RESULTS.md)",
    )
    report.add_argument(
        "--results",
        action="store_true",
        help="write RESULTS.md instead: the papers' tables, these runs, and each setting over its seeds",
    )
    report.set_defaults(command=_report)


def _report(args: argparse.Namespace) -> None:
    runs = [Path(run) for run in args.runs]
    out = Path(args.out) if args.out else None
    suffix = ".md" if args.results else ".html"
    if out is not None and out.suffix != suffix:
        raise UserError(f"--out '{out}' does not end in {suffix}, which is what is written; rename it")
    if args.results:
        from dmae_ds.report.results_page import write_results_page

        print(write_results_page(runs, out or Path("RESULTS.md")))
        return
    if not runs:
        raise UserError("no run was given; write dmae-ds report RUN [RUN ...], or dmae-ds report --results")
    from dmae_ds.config.load import read_saved_config

    for run in runs:
        read_saved_config(run)
    from dmae_ds.report import write_report

    print(write_report(runs, out))
