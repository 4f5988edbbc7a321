"""The file of the EMA teacher and of an objective's memory in a checkpoint: STEP/ema.safetensors.

Written by rank 0 and read by every rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from dmae_ds.errors import UserError
from dmae_ds.output.durable import write_tensors
from dmae_ds.train.checkpoint.folder import Written, crc32_of

if TYPE_CHECKING:  # its import of DeepSpeed would come before that of deepspeed_import.py, and be loud
    from dmae_ds.train.checkpoint.deepspeed_files import SafeCheckpointEngine

FILE = "ema.safetensors"
OLD_FILE = "twin.safetensors"  # its name in checkpoints from before December 2026; still read


def save_ema(tensors: dict[str, Tensor], checkpoint: Path, files: SafeCheckpointEngine) -> None:
    """Write the tensors of an EMA teacher into a checkpoint folder; none, no file. Call it on rank 0 alone.

    Nothing is raised when the disk refuses: `files.problem` then describes it.
    """
    if not tensors:
        return
    path = checkpoint / FILE

    def write() -> None:
        write_tensors(path, {name: tensor.detach().cpu() for name, tensor in tensors.items()})
        files.written[path] = Written(path.stat().st_size, crc32_of(path))

    files.attempt(write, path)


@torch.no_grad()
def load_ema(tensors: dict[str, Tensor], checkpoint: Path) -> None:
    """Copy the saved values into the tensors of an EMA teacher. No collective.

    Raises UserError where the file is missing, or holds other names or shapes.
    """
    if not tensors:
        return
    path = checkpoint / FILE
    if not path.is_file():
        path = checkpoint / OLD_FILE
    if not path.is_file():
        raise UserError(
            f"checkpoint '{checkpoint}' has no {FILE}, the objective's EMA teacher or memory; "
            "it belongs to another run: choose another run.dir"
        )
    saved = load_file(path)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    saved_shapes = {name: tensor.shape for name, tensor in saved.items()}
    differing = sorted(
        name for name in saved.keys() | tensors.keys() if shapes.get(name) != saved_shapes.get(name)
    )
    if differing:
        raise UserError(
            f"{path} holds another EMA teacher: {len(differing)} tensors differ "
            f"({', '.join(differing[:4])}); it belongs to another run: choose another run.dir"
        )
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])
