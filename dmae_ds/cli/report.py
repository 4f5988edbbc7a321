"""`dmae-ds report`: arguments, and the choice between a page of runs and RESULTS.md."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from dmae_ds.errors import UserError


def add_report(subcommands) -> None:
    """Add `report` to the root parser."""
    report = subcommands.add_parser("report", help="one self-contained HTML page about one or several runs")
    report.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="run folders, of a family for all its students; the page is written into the first one; "
        "with --results also folders of runs, and NAME=FOLDER for a section of its own",
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
    report.add_argument(
        "--keep",
        action="store_true",
        help="with --results: sections of the page that get no NAME=FOLDER stay as they are, for their runs "
        "may be on another machine; numbers in the papers' tables stay, too",
    )
    report.set_defaults(command=_report)


def _report(args: argparse.Namespace) -> None:
    out = Path(args.out) if args.out else None
    suffix = ".md" if args.results else ".html"
    if out is not None and out.suffix != suffix:
        raise UserError(f"--out '{out}' does not end in {suffix}, which is what is written; rename it")
    if args.keep and not args.results:
        raise UserError("--keep is about the sections of RESULTS.md; give --results, too, or leave it out")
    if args.results:
        from dmae_ds.report.results_page import write_results_page

        sections = _read_sections(args.runs)
        print(write_results_page(sections, out or Path("RESULTS.md"), keep=args.keep))
        return
    runs = [Path(run) for run in args.runs]
    if not runs:
        raise UserError("no run was given; write dmae-ds report RUN [RUN ...], or dmae-ds report --results")
    from dmae_ds.config.load import read_saved_config, student_folders

    students = [folder for run in runs for folder in student_folders(run)]
    if out is None and len(runs) == 1 and students != runs:
        out = runs[0] / "comparison.html"  # of a family, next to its students
    runs = students
    for run in runs:
        read_saved_config(run)
    from dmae_ds.report import write_report

    print(write_report(runs, out))


def _read_sections(texts: list[str]) -> dict[str, list[Path]]:
    """Read `FOLDER` and `NAME=FOLDER`: the folders by name, which is "" without one."""
    sections: dict[str, list[Path]] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not equals or Path(text).exists():
            name, folder = "", text
        elif not re.fullmatch("[A-Za-z0-9_-]+", name):
            raise UserError(
                f"section '{name}' of '{text}': expected letters, digits, - and _; "
                "write, say, scenes=runs/scenes"
            )
        sections.setdefault(name, []).append(Path(folder))
    return sections
