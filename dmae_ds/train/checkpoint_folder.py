"""The run folder's checkpoints on disk: which is the newest whole one, how the pointer moves, which go (no torch).

    RUN/checkpoints/step-00000500/   DeepSpeed's files, and state.json
    RUN/checkpoints/latest           the name of the newest whole one

`state.json` is written after every rank has finished, and lists every file with its size; `latest` moves last, by an
atomic rename. So whatever is killed whenever, `latest` names a checkpoint that is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from dmae_ds.errors import UserError

STATE_VERSION = 2

# What must be equal for a checkpoint's weights and position to mean the same thing, and the way out where it isn't.
MUST_AGREE = {
    "world_size": "start with as many ranks as wrote it",
    "zero_stage": "use the DeepSpeed file of the same ZeRO stage",
    "precision": "set precision back",
    "seed": "set run.seed back",
    "fingerprint": "point data.train at the shards that it was trained on",
    "order": "set data.block back",
    "global_batch": "set optim.global_batch back",
    "student": "set the student section back, or choose another run.dir",
    "teacher": "set the teacher section back, or choose another run.dir",
    "objective": "set the objective section back, or choose another run.dir",
}


# What a state.json that is older than a key meant by leaving it out.
OLDER = {"order": {"version": 1, "block": 1}}


class CheckpointFolder:
    """RUN/checkpoints: plain files, no collectives."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self.path = run_dir / "checkpoints"

    def tag(self, step: int) -> str:
        return f"step-{step:08d}"

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None. Raises UserError when the pointer names one that is not whole."""
        pointer = self.path / "latest"
        if not pointer.is_file():
            return None
        folder = self.path / pointer.read_text().strip()
        self.read_state(folder)
        return folder

    def read_state(self, folder: Path) -> dict:
        """A checkpoint's state.json, with its files checked. Raises UserError."""
        try:
            state = json.loads((folder / "state.json").read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"checkpoint '{folder}' has no readable state.json ({error}); write an older one's name into {self.path / 'latest'}") from None
        if state.get("version") != STATE_VERSION:
            raise UserError(f"checkpoint '{folder}' has format version {state.get('version')}, this program reads {STATE_VERSION}; use the program that wrote it")
        for name, size in state["files"].items():
            found = (folder / name).stat().st_size if (folder / name).is_file() else None
            if found != size:
                raise UserError(f"checkpoint '{folder}': {name} has {found} bytes instead of {size}; write an older one's name into {self.path / 'latest'}")
        return state

    def check_same_run(self, folder: Path, identity: dict) -> None:
        """Raise UserError unless a checkpoint is of the run with this identity: {key of MUST_AGREE: value}."""
        state = self.read_state(folder)
        for key, way_out in MUST_AGREE.items():
            found = state[key] if key in state else OLDER[key]
            if found != identity[key]:
                raise UserError(f"checkpoint '{folder}' has {key} {_short(found)}, this run {_short(identity[key])}; {way_out}")

    def begin(self, step: int) -> None:
        """Make room for a checkpoint, throwing away what a killed save left under its name."""
        shutil.rmtree(self.path / self.tag(step), ignore_errors=True)
        (self.path / self.tag(step)).mkdir(parents=True)

    def commit(self, step: int, state: dict, *, keep: int) -> None:
        """Seal a checkpoint whose files are all written, move the pointer, delete all but the newest `keep`."""
        folder = self.path / self.tag(step)
        files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
        write_atomically(folder / "state.json", json.dumps({"version": STATE_VERSION, **state, "files": files}, indent=1).encode())
        write_atomically(self.path / "latest", self.tag(step).encode())
        for old in sorted(path for path in self.path.glob("step-*") if path.name <= self.tag(step))[:-keep]:
            shutil.rmtree(old)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to the disk, and rename it into place."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _short(value: object, limit: int = 80) -> str:
    text = str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
