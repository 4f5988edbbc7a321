"""What a killed run continues from: one file, written whole after every epoch, read without running a pickle's code.

OUT/resume.pt    network, optimiser, averaged weights, the epochs' figures; no random state: all draws are keyed
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from dmae_ds.errors import UserError
from dmae_ds.output.durable import replacing

RESUME_FILE = "resume.pt"
VERSION = 1


def save_resume(
    path: Path,
    *,
    task: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: ModelEmaV3 | None,
    identity: dict,
    **state: object,
) -> None:
    """Write everything; `state` holds plain values. By one process."""
    content = {
        "version": VERSION,
        "identity": identity,
        "task": _own_tensors(task),
        "optimizer": optimizer.state_dict(),
        "ema": None if ema is None else ema.module.state_dict(),
        **state,
    }
    with replacing(path) as file:
        torch.save(content, file)


def read_resume(path: Path, identity: dict) -> dict | None:
    """What `save_resume` wrote, on the CPU, or None where there is nothing. Raises UserError unless it is of this very run."""
    if not path.is_file():
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        version, saved = found["version"], found["identity"]
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, EOFError, ValueError) as error:
        raise UserError(
            f"'{path}' can't be read ({type(error).__name__}); delete it to start again"
        ) from None
    if version != VERSION:
        raise UserError(
            f"'{path}' has format version {version}, this program reads {VERSION}; use the program that wrote it"
        )
    for key in sorted(saved.keys() | identity.keys()):
        if saved.get(key) != identity.get(key):
            raise UserError(
                f"'{path}' was written with {key} {saved.get(key)}, now it is {identity.get(key)}; set it back, or choose another run.dir"
            )
    return found


def restore(
    found: dict, *, task: nn.Module, optimizer: torch.optim.Optimizer, ema: ModelEmaV3 | None
) -> None:
    """Put a saved state back. `task` must be on its device, and not yet wrapped."""
    missing, unexpected = task.load_state_dict(found["task"], strict=False)
    assert not unexpected and all(name.startswith("teacher.") for name in missing)
    optimizer.load_state_dict(found["optimizer"])
    if ema is not None:
        ema.module.load_state_dict(found["ema"])


def _own_tensors(task: nn.Module) -> dict[str, Tensor]:
    """Without the teacher, which has a file of its own."""
    return {name: tensor for name, tensor in task.state_dict().items() if not name.startswith("teacher.")}
