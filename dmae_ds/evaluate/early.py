"""Mistakes in an evaluation that are found before torch is imported, in a fraction of a second."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from dmae_ds.errors import UserError
from dmae_ds.evaluate.subsets import check_labels, open_labelled
from dmae_ds.weights.early import check_file

if TYPE_CHECKING:
    from dmae_ds.evaluate.source import FrozenSource

_OVERRIDE = re.compile(r"(data|network|run|format)(\.\w+)*=")  # a path may have a `=`, too
STUDENT_FILE = "student.safetensors"


def check_source(source: FrozenSource, *, labels: str, subset_seed: int | None) -> None:
    """Raise UserError for weights that are not there or of another width, and for data without labels.

    The index of the shards is read, and no image.
    """
    check_labels(labels, subset_seed)
    check_weights(source)
    open_labelled(source.data)


def check_weights(source: FrozenSource) -> None:
    """Raise UserError for a run without a student, and for a file of another network."""
    if source.run is not None:
        find_student(source.run)
    else:
        check_file(source.file, source.network, source.label)


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
