"""Mistakes in an evaluation that are found before torch is imported, in a fraction of a second."""

from __future__ import annotations

import re
from pathlib import Path

from dmae_ds.config.load import read_saved_config
from dmae_ds.errors import UserError
from dmae_ds.evaluate.subsets import check_labels, open_labelled

_OVERRIDE = re.compile(r"(data|network|run|format)(\.\w+)*=")  # a path may have a `=`, too
STUDENT_FILE = "student.safetensors"


def check_run(run: Path, *, labels: str, subset_seed: int | None) -> None:
    """Raise UserError for a folder without a student, data without two equal lists of classes, wrong labels.

    The index of the shards is read, and no image.
    """
    check_labels(labels, subset_seed)
    data = read_saved_config(run, student_only=True).data
    find_student(run)
    open_labelled(data)


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """(run folders and weights files, overrides) of the words behind `dmae-ds eval knn`."""
    overrides = [word for word in words if _OVERRIDE.match(word)]
    return [word for word in words if word not in overrides], overrides


def find_student(run: Path) -> Path:
    """The exported student of a run. Raises UserError where there is none yet."""
    path = run / STUDENT_FILE
    if not path.is_file():
        raise UserError(
            f"'{path}' not found; a run writes it with its first checkpoint: "
            "wait for one, or lower checkpoint.every_steps"
        )
    return path
