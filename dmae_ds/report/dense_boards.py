"""Sections of a page about trained dense tasks: shown where a run of the page has such an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dmae_ds.errors import UserError
from dmae_ds.report.boards import Board
from dmae_ds.report.detections import find_detectors, show_detections
from dmae_ds.report.segmentations import find_segmenters, show_segmentations
from dmae_ds.report.views import Views

# Section -> (finds the evaluations below a run, draws them, the command that makes one).
DENSE_SECTIONS: dict[str, tuple[Callable[[Path], list[Path]], Callable[[list[Path]], Board], str]] = {
    "segmentations": (find_segmenters, show_segmentations, "dmae-ds eval segment"),
    "detections": (find_detectors, show_detections, "dmae-ds eval detect"),
}


def add_dense_boards(runs: dict[str, Path], views: dict[str, Views]) -> list[str]:
    """Add boards to the views of each run. Returns the sections that at least one run has."""
    shown = []
    for section, (find, show, command) in DENSE_SECTIONS.items():
        folders = {name: find(path) for name, path in runs.items()}
        if not any(folders.values()):
            continue
        shown.append(section)
        for name, of_run in folders.items():
            if not of_run:
                views[name].missing[section] = f"no `{command}` of this run"
                continue
            try:
                views[name].boards[section] = show(of_run)
            except UserError as error:  # shards that were moved, a file that was cut off
                views[name].missing[section] = str(error)
    return shown
