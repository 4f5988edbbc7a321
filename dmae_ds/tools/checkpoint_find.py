"""Find the checkpoints that a path names: RUN, RUN/checkpoints, or one checkpoint's folder (no torch)."""

from __future__ import annotations

from pathlib import Path

from dmae_ds.config.load import family_of
from dmae_ds.errors import UserError
from dmae_ds.output.new_path import refuse_existing
from dmae_ds.train.checkpoint.folder import CheckpointFolder


def find(path: Path) -> tuple[CheckpointFolder, list[Path]]:
    """Return the folder of checkpoints, and those that the path names: all of a run, by step, or one.

    The folder of one student of a family means the family's, whose checkpoints hold all.
    Raises UserError where there is none.
    """
    if not path.is_dir():
        raise UserError(f"folder '{path}' not found; give a run folder, or the folder of one checkpoint")
    path = path.resolve()
    if (path / "state.json").is_file() or path.name.startswith("step-"):
        folder = CheckpointFolder(path.parent.parent)
        folder.path = path.parent  # a checkpoint may have been copied elsewhere
        return folder, [path]
    folder = CheckpointFolder(path.parent if path.name == "checkpoints" else family_of(path) or path)
    checkpoints = sorted(folder.path.glob("step-*"))
    if not checkpoints:
        raise UserError(f"'{path}' has no checkpoints; expected {folder.path}/step-*")
    return folder, checkpoints


def find_one(path: Path) -> tuple[CheckpointFolder, Path]:
    """Return the one checkpoint that the path names; of a run, the one that `latest` names.

    Raises UserError where there is none, or where a file is missing or has another size.
    """
    folder, checkpoints = find(path)
    if len(checkpoints) == 1 and checkpoints[0] == path.resolve():
        folder.read_state(checkpoints[0])
        return folder, checkpoints[0]
    latest = folder.latest()
    if latest is None:
        raise UserError(
            f"'{folder.path}' has no file `latest`, so no save was completed; give one checkpoint's folder"
        )
    return folder, latest


def find_to_convert(path: Path, out: Path) -> tuple[CheckpointFolder, Path]:
    """Find the one checkpoint that becomes OUT. Raises UserError as `find_one` does, and where OUT exists."""
    found = find_one(path)
    existing = refuse_existing(out, name="OUT", reads=path)
    if existing:
        raise UserError(existing)
    return found
