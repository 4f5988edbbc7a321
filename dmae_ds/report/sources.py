"""The runs that weights of other runs come from."""

from __future__ import annotations

import os
from pathlib import Path

from dmae_ds.config.networks import StudentConfig, TeacherConfig, looks_like_hub_id
from dmae_ds.config.run import RunConfig
from dmae_ds.report.runs import Run

_MAX_DEPTH = 3  # of weights in the folder of a study: RUN/EVALUATION/FILE


def locate_weights(
    network: StudentConfig | TeacherConfig | None, config: RunConfig, run: Path
) -> Path | None:
    """Where a network's weights are; None if it has none. They may not exist.

    Runs may have been moved together since: what lay next to the run is looked for next to its folder.

    config: of the run; run: its folder
    """
    if network is None or network.weights is None:
        return None
    path = Path(network.weights).expanduser()
    if path.exists():
        return path
    beside = os.path.relpath(path, Path(config.run.dir).expanduser().parent)
    moved = run.parent / beside
    return path if beside.startswith(os.pardir) or not moved.exists() else moved


def find_source_run(weights: Path) -> Path | None:
    """The folder of the run that wrote these weights; None if they are from elsewhere.

    They may be its student's, or those of an evaluation inside it.
    """
    for folder in (weights, *list(weights.parents)[: _MAX_DEPTH - 1]):
        if (folder / "config.yaml").is_file() and (folder / "student.safetensors").is_file():
            return folder
    return None


def is_student_of(run: Path, weights: Path) -> bool:
    """Whether weights are the student of a run, and not those of an evaluation inside it."""
    return weights in (run, run / "student.safetensors")


def list_teaching_runs(runs: list[Run]) -> set[Path]:
    """The folders of the runs that taught others, resolved."""
    weights = [
        locate_weights(teacher, run.config, run.path)
        for run in runs
        for teacher in run.config.named_teachers().values()
    ]
    folders = [find_source_run(path) for path in weights if path is not None]
    return {folder.resolve() for folder in folders if folder is not None}


def list_missing_weights(runs: list[Run]) -> list[str]:
    """Local files and folders of weights that these runs name and that are not found, each once."""
    missing = []
    for run in runs:
        for network in (run.config.student, *run.config.named_teachers().values()):
            path = locate_weights(network, run.config, run.path)
            if path is not None and not path.exists() and not looks_like_hub_id(network.weights):
                missing.append(network.weights)
    return list(dict.fromkeys(missing))
