"""The file that a killed run continues from, written after every epoch.

OUT/resume.pt holds network, optimiser, averaged weights and the epochs' numbers. It needs no random state:
every draw is keyed (augment.py). It is read without running a pickle's code.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from dmae_ds.errors import UserError
from dmae_ds.output.durable import replacing
from dmae_ds.weights.content import UNIT

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
    """Write everything that a run continues from; `state` holds plain values. Call it on one process."""
    content = {
        "version": VERSION,
        "identity": identity,
        "task": _trained_tensors(task),
        "optimizer": optimizer.state_dict(),
        "ema": None if ema is None else ema.module.state_dict(),
        **state,
    }
    with replacing(path) as file:
        torch.save(content, file)


def read_resume(path: Path, identity: dict) -> dict | None:
    """Read the content of `save_resume` on the CPU; None without a file.

    Raises UserError for a file of another run, naming the first key that differs.
    """
    if not path.is_file():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        version, saved = content["version"], content["identity"]
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, EOFError, ValueError) as error:
        raise UserError(
            f"'{path}' cannot be read ({type(error).__name__}); delete it to start again"
        ) from None
    if version != VERSION:
        raise UserError(
            f"'{path}' has format version {version}, this program reads version {VERSION}; "
            "use the program that wrote it"
        )
    for key in sorted(saved.keys() | identity.keys()):
        was_not_saved = key.endswith(UNIT) and not any(
            each.endswith(UNIT) for each in saved
        )  # earlier versions
        if saved.get(key) != identity.get(key) and not was_not_saved:
            raise UserError(
                f"'{path}' was written with {key} {saved.get(key)}, now it is {identity.get(key)}; "
                "set it back, or choose another run.dir"
            )
    return content


def restore(
    content: dict, *, task: nn.Module, optimizer: torch.optim.Optimizer, ema: ModelEmaV3 | None
) -> None:
    """Load a saved state. `task` must be on its device and not yet wrapped."""
    missing, unexpected = task.load_state_dict(content["task"], strict=False)
    assert not unexpected and all(name.startswith("teacher.") for name in missing)
    optimizer.load_state_dict(content["optimizer"])
    if ema is not None:
        ema.module.load_state_dict(content["ema"])


def _trained_tensors(task: nn.Module) -> dict[str, Tensor]:
    """The task's tensors without the teacher's, which has its own file."""
    return {name: tensor for name, tensor in task.state_dict().items() if not name.startswith("teacher.")}
