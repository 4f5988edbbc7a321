"""Durable files, which appear under their name only when they are complete and on the disk.

Without torch, which `write_tensors` imports when it is called.
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Iterator

if TYPE_CHECKING:
    from torch import Tensor


def temporary_name(path: Path) -> Path:
    """Path under which a file is written before it is renamed."""
    return path.with_name(path.name + ".tmp")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` when the block ends; if the block fails, the file is removed."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:  # a full disk needs the space
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file, and flush its name to the disk, too. Raises OSError; then the old file stays."""
    with replacing(path) as file:
        file.write(content)
    sync_folder(path.parent)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file to the disk, readable by everyone. Raises OSError."""
    from safetensors.torch import save_file

    try:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata=metadata)
    except Exception as error:  # safetensors has one class for all errors
        if "os error" not in str(error).lower():
            raise
        raise OSError(str(error)) from None
    _sort_metadata(path)
    settle(path)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file, so that equal content is an equal file.

    The package writes them in an order of its own, another one each time. The header keeps its length.
    """
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if "__metadata__" not in header:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length)
        assert len(text) == length, f"the header of {path} grew from {length} to {len(text)} bytes"
        file.seek(8)
        file.write(text)


def replace_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Replace a safetensors file. Raises OSError; then the old file stays."""
    temporary = temporary_name(path)
    try:
        write_tensors(temporary, tensors, metadata)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)


def settle(path: Path) -> None:
    """Flush a file to the disk and make it readable by everyone; safetensors makes its files private."""
    with open(path, "rb") as file:
        os.fchmod(file.fileno(), 0o644)
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk; until then a power failure can undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
