"""The run folder's checkpoints on disk: which is the newest whole one, how the pointer moves, which go (no torch).

    RUN/checkpoints/step-00000500/   DeepSpeed's files, and state.json
    RUN/checkpoints/latest           the name of the newest whole one

`state.json` is written after every rank has finished, and lists every file with its bytes and crc32 as the rank that
wrote it knows them; `latest` moves last, by an atomic rename, and a checkpoint that goes loses its state.json first. So
whatever is killed whenever, `latest` names a checkpoint that is whole, and one without a state.json is none.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from isal.isal_zlib import crc32

from dmae_ds.errors import RunFailed, UserError
from dmae_ds.output.durable import sync_folder, write_atomically

STATE_VERSION = 3
READABLE = (2, 3)  # version 2 knew no crc32

# What must be equal for a checkpoint's weights and position to mean the same thing, and the way out where it isn't.
# World size and ZeRO stage may differ: such a checkpoint is moved when it is loaded (train/moving.py).
MUST_AGREE = {
    "precision": "set precision back",
    "seed": "set run.seed back",
    "fingerprint": "point data.train at the shards that it was trained on",
    "order": "set data.block back",
    "repeat": "set data.repeat back",
    "global_batch": "set optim.global_batch back",
    "student": "set the student section back, or choose another run.dir",
    "teacher": "set the teacher section back, or choose another run.dir",
    "objective": "set the objective section back, or choose another run.dir",
}


# What a state.json that is older than a key meant by leaving it out.
OLDER = {"order": {"version": 1, "block": 1}, "repeat": 1}

_CHUNK = 16 * 2**20


class Written(NamedTuple):
    """A file of a checkpoint: its size, and its crc32 (None: a checkpoint of version 2)."""

    bytes: int
    crc32: int | None


class CheckpointFolder:
    """RUN/checkpoints: plain files, no collectives."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self.path = run_dir / "checkpoints"

    def tag(self, step: int) -> str:
        return f"step-{step:08d}"

    def all(self) -> list[Path]:
        """Every checkpoint that has a state.json, whole or damaged, in the order of steps."""
        return sorted(path.parent for path in self.path.glob("step-*/state.json"))

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None. Raises UserError when the pointer names one that is not whole."""
        pointer = self.path / "latest"
        if not pointer.is_file():
            return None
        folder = self.path / pointer.read_text().strip()
        self.read_state(folder)
        return folder

    def read_state(self, folder: Path) -> dict:
        """A checkpoint's state.json, its files a {name: Written}, with their sizes checked. Raises UserError."""
        try:
            state = parse_state(folder)
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(
                f"checkpoint '{folder}' has no readable state.json ({error}); {self.way_back(folder)}"
            ) from None
        for name, written in state["files"].items():
            self._refuse(folder, what_is_wrong(folder / name, written, read=False))
        return state

    def check_bytes(self, folder: Path, *, part: int = 0, parts: int = 1) -> None:
        """Read every parts-th file of a checkpoint and compare its crc32, so that `parts` readers check each file once. Raises UserError."""
        for name, written in sorted(self.read_state(folder)["files"].items())[part::parts]:
            self._refuse(folder, what_is_wrong(folder / name, written, read=True))

    def _refuse(self, folder: Path, wrong: str | None) -> None:
        if wrong is not None:
            raise UserError(f"checkpoint '{folder}': {wrong}; {self.way_back(folder)}")

    def way_back(self, folder: Path) -> str:
        """How to continue without a broken checkpoint: names the newest older one that is whole to the last byte."""
        for older in reversed([path for path in self.all() if path.name < folder.name]):
            try:
                self.check_bytes(older)
            except UserError:
                continue
            return (
                f"{older.name} before it is whole; to take that: echo {older.name} > {self.path / 'latest'}"
            )
        return (
            "no older one is whole; choose another run.dir, or delete this run's checkpoints to start again"
        )

    def check_same_run(self, folder: Path, identity: dict) -> None:
        """Raise UserError unless a checkpoint can continue as the run with this identity: MUST_AGREE's keys, world_size and zero_stage."""
        state = self.read_state(folder)
        for key, way_out in MUST_AGREE.items():
            found = state[key] if key in state else OLDER[key]
            if found != identity[key]:
                raise UserError(
                    f"checkpoint '{folder}' has {key} {_short(found)}, this run {_short(identity[key])}; {way_out}"
                )
        if not self.moves(state, identity):
            return
        wrote = f"{state['world_size']} ranks with ZeRO stage {state['zero_stage']}"
        if state["version"] < 3 and state["zero_stage"] == 0:
            why = "was written by a program that did not note which optimiser state is whose"
        elif identity["precision"] == "fp16":
            why = "has the loss scale of fp16, which does not move"
        elif any(name.startswith("offloaded_tensors/") for name in state["files"]):
            why = "holds tensors that were offloaded to NVMe, which do not move"
        else:
            return
        raise UserError(
            f"checkpoint '{folder}' {why} to another world size or ZeRO stage; start with {wrote}, as it was written"
        )

    @staticmethod
    def moves(state: dict, identity: dict) -> bool:
        """Whether a checkpoint was written by another number of ranks, or at another ZeRO stage, than this run has."""
        return any(state[key] != identity[key] for key in ("world_size", "zero_stage"))

    def begin(self, step: int) -> None:
        """Make room for a checkpoint, throwing away what a killed save left under its name.

        Raises RunFailed when there are fewer free bytes than the one before took, OSError where the disk refuses.
        """
        self.remove(self.path / self.tag(step))
        (self.path / self.tag(step)).mkdir(parents=True)
        for before in self.all()[-1:]:
            needed, free = bytes_in(before), shutil.disk_usage(self.path).free
            if free < needed:
                raise RunFailed(
                    f"{before.name} took {needed / 2**20:,.1f} MiB and {free / 2**20:,.1f} MiB are free in {self.path}"
                )

    def commit(self, step: int, state: dict, files: dict[str, Written]) -> None:
        """Seal a checkpoint whose files are all on the disk, and move the pointer to it. Raises OSError."""
        folder = self.path / self.tag(step)
        for written in (folder, self.path, self.run_dir):  # the names of its files, and its own
            sync_folder(written)
        content = {
            "version": STATE_VERSION,
            **state,
            "files": {name: written._asdict() for name, written in sorted(files.items())},
        }
        write_atomically(folder / "state.json", json.dumps(content, indent=1).encode())
        write_atomically(self.path / "latest", self.tag(step).encode())

    def abandon(self, step: int) -> None:
        """Throw away a save that failed, unless the pointer moved to it before it did."""
        pointer = self.path / "latest"
        if not (pointer.is_file() and pointer.read_text().strip() == self.tag(step)):
            self.remove(self.path / self.tag(step))

    def prune(self, keep: int) -> None:
        """Delete all but the newest `keep` of those up to the one that `latest` names, and what killed saves left before it."""
        newest = (self.path / "latest").read_text().strip()
        stay = [path for path in self.all() if path.name <= newest][-keep:]
        for old in sorted(self.path.glob("step-*")):
            if (
                old not in stay and old.name < newest
            ):  # later ones, of a run that went back, are for a person to judge
                self.remove(old)

    def remove(self, folder: Path) -> None:
        """Delete a checkpoint; killed in the middle, what is left is no checkpoint."""
        if folder.exists():
            (folder / "state.json").unlink(missing_ok=True)
            sync_folder(folder)
            shutil.rmtree(folder)


def parse_state(folder: Path) -> dict:
    """A checkpoint's state.json, its files a {name: Written}. Raises OSError, JSONDecodeError; UserError for another version."""
    state = json.loads((folder / "state.json").read_text())
    if state.get("version") not in READABLE:
        raise UserError(
            f"checkpoint '{folder}' has format version {state.get('version')}, this program reads {' and '.join(map(str, READABLE))}; use the program that wrote it"
        )
    state["files"] = {
        name: Written(**entry) if isinstance(entry, dict) else Written(entry, None)
        for name, entry in state["files"].items()
    }
    return state


def what_is_wrong(path: Path, written: Written, *, read: bool) -> str | None:
    """None, or how a file differs from what was written: in its size, or, if it is to be read, in its bytes."""
    found = path.stat().st_size if path.is_file() else None
    if found is None:
        return f"{path.name} is missing"
    if found != written.bytes:
        return f"{path.name} has {found} bytes instead of {written.bytes}"
    if not read or written.crc32 is None:
        return None
    try:
        crc = crc32_of(path)
    except OSError as error:
        return f"{path.name} can't be read: {error.strerror}"
    return (
        None
        if crc == written.crc32
        else f"{path.name} is damaged: its crc32 is {crc:08x} instead of {written.crc32:08x}"
    )


def bytes_in(folder: Path) -> int:
    """The size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def crc32_of(path: Path) -> int:
    """A file's crc32, read in pieces."""
    found = 0
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(_CHUNK):
            found = crc32(piece, found)
    return found


def _short(value: object, limit: int = 80) -> str:
    text = str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
