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
    """The two plain files of one run; call its methods on rank 0 alone.

    metadata: strings that are stored in both, with the step
    """

    def __init__(self, run_dir: Path, metadata: dict[str, str]):
        self.run_dir, self.metadata = run_dir, metadata
        self.paths = [run_dir / name for name in NAMES]

    def write(
        self,
        weights: dict[str, Tensor],
        step: int,
        *,
        attempt: Callable[[Callable[[], None], Path], None] = lambda write, path: write(),
    ) -> None:
        """Write both files under their temporary names.

        weights: the objective's full state dict
        attempt: runs each write, given its path; by default errors (OSError) are raised
        """
        student = {name.removeprefix(PREFIX): weights[name] for name in weights if name.startswith(PREFIX)}
        rest = {name: tensor for name, tensor in weights.items() if not name.startswith(PREFIX)}
        metadata = {**self.metadata, "step": str(step)}
        for path, tensors in zip(self.paths, (student, rest), strict=True):
            attempt(partial(write_tensors, temporary_name(path), tensors, metadata), path)

    def publish(self) -> None:
        """Give the written files their names. Raises OSError."""
        for path in self.paths:
            os.replace(temporary_name(path), path)
        sync_folder(self.run_dir)

    def discard(self) -> None:
        """Delete what was written and not published."""
        for path in self.paths:
            temporary_name(path).unlink(missing_ok=True)

    def are_of(self, step: int) -> bool:
        """Whether both files are there, readable and of this step."""
        return all(step_of(path) == step for path in self.paths)


def step_of(path: Path) -> int | None:
    """The step that a plain file was written at; None when the file is missing or broken."""
    try:
        with safe_open(path, "np") as file:
            return int(file.metadata()["step"])
    except (
        Exception
    ):  # safetensors raises one class for everything, and whatever it is, the file is rewritten
        return None
