"""The exported student: RUN/student.safetensors, which loads into timm strictly, and RUN/decoder.safetensors.

Both are written under temporary names during a save and get their names after the checkpoint is whole, so
they are always files of one finished step.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Callable

from safetensors import safe_open

from dmae_ds.config.family import prefix_of
from dmae_ds.output.durable import sync_folder, temporary_name, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

STUDENT, DECODER = "student.safetensors", "decoder.safetensors"
NAMES = (STUDENT, DECODER)
PREFIX = "student."  # of the student's tensors in the objective


def python_that_loads(name: str, arguments: dict, path: Path | str) -> str:
    """Python that builds a network by timm and loads its exported weights, without this project."""
    keywords = "".join(f", {key}={value!r}" for key, value in arguments.items())
    return (
        f"import safetensors.torch, timm\n"
        f'model = timm.create_model("{name}"{keywords}).eval()\n'
        f'model.load_state_dict(safetensors.torch.load_file("{path}"))  # strict'
    )


class StudentFiles:
    """The two plain files of each student of a run; call its methods on rank 0 alone.

    metadata: {name of the student: strings that are stored in both, with the step}; those of the one student
        of a run, "", are in the run folder, those of one of several in a folder of its name
    """

    def __init__(self, run_dir: Path, metadata: dict[str, dict[str, str]]):
        self.metadata = metadata
        self.folders = {name: run_dir / name for name in metadata}

    @property
    def paths(self) -> list[Path]:
        """All files."""
        return [folder / name for folder in self.folders.values() for name in NAMES]

    def write(
        self,
        weights: dict[str, Tensor],
        step: int,
        *,
        attempt: Callable[[Callable[[], None], Path], None] = lambda write, path: write(),
    ) -> None:
        """Write all files under their temporary names.

        weights: the objective's full state dict, of a family with names that begin with its member's
        attempt: runs each write, given its path; by default errors (OSError) are raised
        """
        for name, folder in self.folders.items():
            attempt(partial(folder.mkdir, exist_ok=True), folder)
            mine = _below(prefix_of(name), weights)
            student = _below(PREFIX, mine)
            rest = {key: tensor for key, tensor in mine.items() if not key.startswith(PREFIX)}
            metadata = {**self.metadata[name], "step": str(step)}
            for path, tensors in zip((folder / STUDENT, folder / DECODER), (student, rest), strict=True):
                attempt(partial(write_tensors, temporary_name(path), tensors, metadata), path)

    def publish(self) -> None:
        """Give the written files their names. Raises OSError."""
        for path in self.paths:
            os.replace(temporary_name(path), path)
        for folder in self.folders.values():
            sync_folder(folder)

    def discard(self) -> None:
        """Delete what was written and not published."""
        for path in self.paths:
            temporary_name(path).unlink(missing_ok=True)

    def are_of(self, step: int) -> bool:
        """Whether all files are there, readable and of this step."""
        return all(step_of(path) == step for path in self.paths)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def step_of(path: Path) -> int | None:
    """The step that a plain file was written at; None when the file is missing or broken."""
    try:
        with safe_open(path, "np") as file:
            return int(file.metadata()["step"])
    except (
        Exception
    ):  # safetensors raises one class for everything, and whatever it is, the file is rewritten
        return None
