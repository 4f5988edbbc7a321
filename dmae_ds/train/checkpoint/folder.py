"""Checkpoints of a run on disk: which one is the newest, how the pointer moves, which are deleted (no torch).

    RUN/checkpoints/step-00000500/   DeepSpeed's files, and state.json
    RUN/checkpoints/latest           the name of the newest complete checkpoint

`state.json` is written after every rank has finished, and lists every file with its bytes and crc32 as the
rank that wrote it computed them. `latest` moves last, by an atomic rename, and a checkpoint that is deleted
loses its state.json first. So whatever is killed at whatever moment, `latest` names a complete checkpoint,
and a folder without a state.json is not a checkpoint.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from isal.isal_zlib import crc32

from dmae_ds.config.load import flatten
from dmae_ds.errors import RunFailed, UserError
from dmae_ds.output.durable import sync_folder, write_atomically
from dmae_ds.output.units import MIB

STATE_VERSION = 3
READABLE = (2, 3)  # version 2 had no crc32

# What must be equal for a checkpoint's weights and position to mean the same, and what to do where it is not.
# World size and ZeRO stage may differ: such a checkpoint is resharded when it is loaded (reshard.py).
MUST_AGREE = {
    "precision": "set precision back (fp32 and bf16_autocast continue each other)",
    "seed": "set run.seed back",
    "fingerprint": "set data.train to the shards that the run was trained on",
    "num_samples": "set data.share back",  # images of an epoch
    "order": "set data.block back",
    "repeat": "set data.repeat back",
    "global_batch": "set optim.global_batch back",
    "student": "set the student section back, or choose another run.dir",
    "students": "set the students section back, or choose another run.dir",
    "teacher": "set the teacher section back, or choose another run.dir",
    "teachers": "set the teachers section back, or choose another run.dir",
    "objective": "set the objective section back, or choose another run.dir",
    "positions": "the version that wrote it kept the positional embedding fixed and has no optimizer state "
    "for it; finish the run with that version, or begin another run.dir with student.weights of this one",
}

# Key of what tells the teachers' weights from others: compared where both sides know it in the same way.
TEACHER_WEIGHTS = "teacher_weights"

# Names of their keys in a recipe, where they have others.
IN_RECIPE = {"seed": "run.seed", "repeat": "data.repeat", "global_batch": "optim.global_batch"}
UNSET, SHOWN = "unset", 3  # how a missing key reads; how many differing keys are shown

# Different precisions that hold the same state: fp32 weights and moments.
SAME_STATE = ("fp32", "bf16_autocast")

# Values that a state.json from before a key existed stands for; a key that is not here is not compared then.
OLDER = {
    "order": {"version": 1, "block": 1},
    "repeat": 1,
    "positions": "fixed",
    "teachers": None,
    "students": None,
}

_CHUNK = 16 * MIB


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
        """Name of the checkpoint of a step."""
        return f"step-{step:08d}"

    def all(self) -> list[Path]:
        """Every checkpoint that has a state.json, complete or damaged, in the order of steps."""
        return sorted(path.parent for path in self.path.glob("step-*/state.json"))

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None.

        Raises UserError when the pointer names an incomplete one.
        """
        pointer = self.path / "latest"
        if not pointer.is_file():
            return None
        folder = self.path / pointer.read_text().strip()
        self.read_state(folder)
        return folder

    def read_state(self, folder: Path) -> dict:
        """Read a checkpoint's state.json, its files as {name: Written}, and check their sizes.

        Raises UserError.
        """
        try:
            state = parse_state(folder)
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(
                f"checkpoint '{folder}' has no readable state.json ({error}); {self.way_back(folder)}"
            ) from None
        for name, written in state["files"].items():
            self._raise_if(what_is_wrong(folder / name, written, read=False), folder)
        return state

    def check_bytes(self, folder: Path, *, part: int = 0, parts: int = 1) -> None:
        """Read every parts-th file of a checkpoint, from the part-th on, and compare its crc32.

        With `parts` readers each file is read once. Raises UserError.
        """
        for name, written in sorted(self.read_state(folder)["files"].items())[part::parts]:
            self._raise_if(what_is_wrong(folder / name, written, read=True), folder)

    def _raise_if(self, problem: str | None, folder: Path) -> None:
        if problem is not None:
            raise UserError(f"checkpoint '{folder}': {problem}; {self.way_back(folder)}")

    def way_back(self, folder: Path) -> str:
        """How to continue without a broken checkpoint; names the newest older one that is intact."""
        for older in reversed([path for path in self.all() if path.name < folder.name]):
            try:
                self.check_bytes(older)
            except UserError:
                continue
            return (
                f"{older.name} is complete; to continue from it: echo {older.name} > {self.path / 'latest'}"
            )
        return (
            "no older checkpoint is complete; choose another run.dir, "
            "or delete this run's checkpoints to start again"
        )

    def ways_on(self) -> str:
        """How to go on after a step that broke the run: from the newest checkpoint, or from an older one."""
        lower = "lower optim.base_lr, or set precision=fp32 instead of bf16_autocast"
        pointer = self.path / "latest"
        if not pointer.is_file():
            return f"no checkpoint was saved before; start again with --resume auto, and {lower}"
        newest = pointer.read_text().strip()
        older = [path.name for path in self.all() if path.name < newest]
        text = f"{newest} is untouched: --resume auto continues from it; {lower}"
        if not older:
            return f"{text}. It is the only one that {pointer} could name"
        return f"{text}. To go further back ({', '.join(older)}): echo {older[-1]} > {pointer}"

    def check_same_run(self, folder: Path, identity: dict) -> None:
        """Raise UserError unless a checkpoint can continue as the run with this identity.

        identity: the keys of MUST_AGREE, world_size and zero_stage; TEACHER_WEIGHTS where some are known
        """
        state = self.read_state(folder)
        for key, way_out in MUST_AGREE.items():
            saved = state.get(key, OLDER.get(key, identity[key]))
            is_same_state = key == "precision" and {saved, identity[key]} <= set(SAME_STATE)
            if saved != identity[key] and not is_same_state:
                raise UserError(f"checkpoint '{folder}' {_difference(key, saved, identity[key])}; {way_out}")
        for key, here in identity.get(TEACHER_WEIGHTS, {}).items():
            saved = state.get(TEACHER_WEIGHTS, {}).get(key)
            if type(saved) is type(here) and saved != here:
                raise UserError(
                    f"checkpoint '{folder}' was trained with another {key}: {saved}, this run has {here}; "
                    "give the weights that the run began with, or choose another run.dir"
                )
        if self.must_reshard(state, identity):
            self.check_can_reshard(folder, identity)

    def check_can_reshard(self, folder: Path, identity: dict) -> None:
        """Raise UserError where a checkpoint can be loaded only as it was written."""
        state = self.read_state(folder)
        if state["version"] < 3 and state["zero_stage"] == 0:
            reason = "does not record which optimizer state belongs to which parameter"
        elif identity["precision"] == "fp16":
            reason = "holds the loss scale of fp16"
        elif any("offloaded_tensors/" in name for name in state["files"]):
            reason = "holds tensors that were offloaded to NVMe"
        else:
            return
        if self.must_reshard(state, identity):
            changed = "another world size or ZeRO stage"
            way_out = f"start with {state['world_size']} ranks and ZeRO stage {state['zero_stage']}"
        else:
            changed = "other parameter groups of the optimizer"
            way_out = "set optim.weight_decay (0 or not) and optim.layer_decay back"
        raise UserError(
            f"checkpoint '{folder}' {reason}, so it cannot continue with {changed}; {way_out}, "
            "as it was written"
        )

    @staticmethod
    def must_reshard(state: dict, identity: dict) -> bool:
        """Whether a checkpoint was written with another world size or ZeRO stage than this run has."""
        return any(state[key] != identity[key] for key in ("world_size", "zero_stage"))

    def begin(self, step: int) -> None:
        """Make the folder of a checkpoint, deleting what a killed save left under its name.

        Raises RunFailed when fewer bytes are free than the checkpoint before took, OSError where the disk
        refuses.
        """
        self.remove(self.path / self.tag(step))
        (self.path / self.tag(step)).mkdir(parents=True)
        for before in self.all()[-1:]:
            needed, free = bytes_in(before), shutil.disk_usage(self.path).free
            if free < needed:
                raise RunFailed(
                    f"{before.name} took {needed / MIB:,.1f} MiB "
                    f"and {free / MIB:,.1f} MiB are free in {self.path}"
                )

    def commit(self, step: int, state: dict, files: dict[str, Written]) -> None:
        """Write state.json for a checkpoint whose files are all on the disk, and move the pointer.

        Raises OSError.
        """
        folder = self.path / self.tag(step)
        inner = {(folder / name).parent for name in files} - {folder}
        for parent in (*inner, folder, self.path, self.run_dir):  # the names of its files, and its own
            sync_folder(parent)
        entries = {name: written._asdict() for name, written in sorted(files.items())}
        content = {"version": STATE_VERSION, **state, "files": entries}
        write_atomically(folder / "state.json", json.dumps(content, indent=1).encode())
        write_atomically(self.path / "latest", self.tag(step).encode())

    def abandon(self, step: int) -> None:
        """Delete a save that failed, unless the pointer moved to it before it did."""
        pointer = self.path / "latest"
        if not (pointer.is_file() and pointer.read_text().strip() == self.tag(step)):
            self.remove(self.path / self.tag(step))

    def prune(self, keep: int) -> None:
        """Delete all but the newest `keep` checkpoints up to `latest`, and what killed saves left before it.

        Checkpoints after `latest`, of a run that was set back, stay: a person must decide about them.
        """
        newest = (self.path / "latest").read_text().strip()
        kept = [path for path in self.all() if path.name <= newest][-keep:]
        for old in sorted(self.path.glob("step-*")):
            if old not in kept and old.name < newest:
                self.remove(old)

    def remove(self, folder: Path) -> None:
        """Delete a checkpoint; if killed in the middle, what is left is not a checkpoint."""
        if folder.exists():
            (folder / "state.json").unlink(missing_ok=True)
            sync_folder(folder)
            shutil.rmtree(folder)


def parse_state(folder: Path) -> dict:
    """Read a checkpoint's state.json, its files as {name: Written}.

    Raises OSError, JSONDecodeError; UserError for a version that is not READABLE.
    """
    state = json.loads((folder / "state.json").read_text())
    if state.get("version") not in READABLE:
        raise UserError(
            f"checkpoint '{folder}' has format version {state.get('version')}, this program reads "
            f"{' and '.join(map(str, READABLE))}; use the program that wrote it"
        )
    state["files"] = {
        name: Written(**entry) if isinstance(entry, dict) else Written(entry, None)
        for name, entry in state["files"].items()
    }
    return state


def what_is_wrong(path: Path, written: Written, *, read: bool) -> str | None:
    """How a file differs from what was written, or None: in its size or, with `read`, in its bytes."""
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        return f"{path.name} is missing"
    if size != written.bytes:
        return f"{path.name} has {size} bytes instead of {written.bytes}"
    if not read or written.crc32 is None:
        return None
    try:
        crc = crc32_of(path)
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    if crc != written.crc32:
        return f"{path.name} is damaged: its crc32 is {crc:08x} instead of {written.crc32:08x}"
    return None


def bytes_in(folder: Path) -> int:
    """Size of all files below a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def crc32_of(path: Path) -> int:
    """Compute a file's crc32, reading it in pieces."""
    crc = 0
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(_CHUNK):
            crc = crc32(piece, crc)
    return crc


def _difference(key: str, saved: object, here: object) -> str:
    """`has objective.decoder.depth 2, this run 4`, for the first keys that differ, and how many more do."""
    key = IN_RECIPE.get(key, key)
    old, new = flatten({key: saved}), flatten({key: here})
    differing = [name for name in {**old, **new} if old.get(name, UNSET) != new.get(name, UNSET)]
    texts = [
        f"has {name} {_short(old.get(name, UNSET))}, this run {_short(new.get(name, UNSET))}"
        for name in differing[:SHOWN]
    ]
    more = f", and {len(differing) - SHOWN} more keys" if len(differing) > SHOWN else ""
    return "; ".join(texts) + more


def _short(value: object, limit: int = 80) -> str:
    text = str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
