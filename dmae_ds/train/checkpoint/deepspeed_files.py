"""Writing and reading DeepSpeed's checkpoint files: with a crc32, without exceptions, without unpickling.

DeepSpeed lets a `checkpoint_engine` write and read its files. Its own one (torch.save, torch.load) raises
where a disk is full, on one rank, between barriers at which the others then wait; does not wait for the
disk; and unpickles anything.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Callable

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from isal.isal_zlib import crc32

from dmae_ds.errors import RunFailed
from dmae_ds.train.checkpoint.folder import Written


class SafeCheckpointEngine(CheckpointEngine):
    """Writes and reads the files of one rank.

    `written` {path: Written} and `problem` (the first error, or None) describe the save since `start`.
    """

    def __init__(self):
        super().__init__()
        self.start()

    def start(self) -> None:
        """Forget the previous save."""
        self.written: dict[Path, Written] = {}
        self.problem: str | None = None

    def attempt(self, action: Callable[[], Any], path: str | Path) -> None:
        """Do a part of a save; an OSError becomes `problem`, and every later part is skipped."""
        if self.problem is None:
            try:
                action()
            except OSError as error:
                self.problem = f"could not write {path}: {error.strerror or error}"

    def save(self, state_dict: dict, path: str) -> None:
        """Write one file and wait for the disk; read `problem` afterwards."""
        if self.problem is not None:
            return
        # A file object of ours: torch.save would turn an OSError of its own file into something else.
        with _CountedFile(Path(path), self) as file:
            torch.save(state_dict, file)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file that holds only DeepSpeed's own classes and plain data."""
        return load_file(path, map_location=map_location)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder; an OSError becomes `problem`."""
        self.attempt(lambda: os.makedirs(path, exist_ok=exist_ok), path)

    def create(self, info: Any) -> None:
        """Do nothing when DeepSpeed announces a save."""

    def commit(self, info: Any) -> bool:
        """Do nothing when a rank has written everything: CheckpointFolder commits."""
        return True


class _CountedFile:
    """A file for torch.save that computes size and crc32, and ignores everything after the first error."""

    def __init__(self, path: Path, files: SafeCheckpointEngine):
        self._path, self._files = path, files
        self._bytes = self._crc32 = 0
        self._file = None

    def __enter__(self):
        self._files.attempt(self._open, self._path)
        return self

    def _open(self) -> None:
        self._file = open(self._path, "wb", buffering=0)  # noqa: SIM115

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._files.attempt(lambda: self._write(view), self._path)
        return len(view)

    def _write(self, view: memoryview) -> None:
        self._crc32 = crc32(view, self._crc32)
        self._bytes += len(view)
        while view:
            view = view[self._file.write(view) :]  # a disk may accept only a part

    def flush(self) -> None:
        """Do nothing: the file has no buffer."""

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._files.attempt(lambda: os.fsync(self._file.fileno()), self._path)
            self._files.attempt(
                self._file.close, self._path
            )  # a network file system may report errors only here
            self._file.close()
        if self._files.problem is None and exc[0] is None:
            self._files.written[self._path] = Written(self._bytes, self._crc32)


def load_file(path: str | Path, *, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """Read a file of a checkpoint. mmap: tensors are read from the disk when they are used.

    Raises RunFailed when it holds more than tensors, plain values and DeepSpeed's own few classes.
    """
    with open(path, "rb") as file:
        mmap = mmap and file.read(2) == b"PK"  # not torch's old format, which DeepSpeed writes by itself
    with torch.serialization.safe_globals(allowed_classes()):
        try:
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
        except Exception as error:
            text = str(error)
            if "weights_only" not in text.lower() and "weights only" not in text.lower():
                raise
            raise RunFailed(
                f"{path} holds an object that no checkpoint of this trainer contains, and was not loaded: "
                f"{text.splitlines()[0]}"
            ) from None


def allowed_classes() -> list[type]:
    """Classes that DeepSpeed's files contain in addition to tensors and plain values."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
