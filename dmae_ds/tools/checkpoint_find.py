"""RUN | RUN/checkpoints | one checkpoint's folder, as it stands on a command line (no torch)."""

from __future__ import annotations

from pathlib import Path

from dmae_ds.errors import UserError
from dmae_ds.train.checkpoint.folder import CheckpointFolder


def find(path: Path) -> tuple[CheckpointFolder, list[Path]]:
    """(the folder of checkpoints, those that are meant): all of a run, in the order of steps, or the one. Raises UserError."""
    if not path.is_dir():
        raise UserError(f"'{path}' is not a folder; give a run folder, or one of its checkpoints")
    path = path.resolve()
    if (path / "state.json").is_file() or path.name.startswith("step-"):
        folder = CheckpointFolder(path.parent.parent)
        folder.path = path.parent  # also where it was copied to
        return folder, [path]
    folder = CheckpointFolder(path.parent if path.name == "checkpoints" else path)
    checkpoints = sorted(folder.path.glob("step-*"))
    if not checkpoints:
        raise UserError(f"'{path}' holds no checkpoints; expected {folder.path}/step-*")
    return folder, checkpoints


def find_one(path: Path) -> tuple[CheckpointFolder, Path]:
    """The checkpoint that is meant, of a run the one that `latest` names; its sizes are right. Raises UserError."""
    folder, checkpoints = find(path)
    if len(checkpoints) == 1 and checkpoints[0] == path.resolve():
        folder.read_state(checkpoints[0])
        return folder, checkpoints[0]
    latest = folder.latest()
    if latest is None:
        raise UserError(
            f"'{folder.path}' has no file `latest`: nothing was ever saved whole; name one checkpoint"
        )
    return folder, latest
