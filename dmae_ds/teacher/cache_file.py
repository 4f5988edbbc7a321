"""Files of stored features: written whole or not at all, and read by rows whose crc32 is compared.

cache_layout.py describes the bytes. Without torch.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO

import numpy as np
from isal import isal_zlib  # a crc32 much faster than zlib's

from dmae_ds.data.shards import ShardError
from dmae_ds.data.storage import (
    Access,
    LocalFile,
    LocalFolder,
    RemoteFile,
    RemoteFolder,
    is_url,
    open_folder,
)
from dmae_ds.errors import UserError
from dmae_ds.teacher.cache_layout import CRC_BYTES, SUMS, TABLE, Layout, Piece

LABEL = "teacher.cache"
MAX_OPEN = 128  # files of a reader


class FileWriter:
    """Appends the rows of one file in their order; `finish` writes what follows them."""

    def __init__(self, file: BinaryIO, layout: Layout):
        self.file, self.layout = file, layout
        self.entries: list[np.ndarray] = []
        self.sums = np.zeros((len(layout.taps), SUMS))

    def add(self, rows: np.ndarray, *, epochs: np.ndarray, sample_ids: np.ndarray, sums: np.ndarray) -> None:
        """Append rows [n, row_bytes] uint8 with their keys [n], and the sums [taps, SUMS] of their error."""
        entries = np.zeros(len(rows), TABLE)
        entries["crc32"] = [isal_zlib.crc32(row) for row in rows]
        entries["epoch"], entries["sample_id"] = epochs, sample_ids
        self.file.write(rows.data)
        self.entries.append(entries)
        self.sums += sums

    def finish(self) -> None:
        """Write the table, the sums and their crc32."""
        footer = np.concatenate(self.entries).tobytes() + self.sums.astype("<f8").tobytes()
        self.file.write(footer + isal_zlib.crc32(footer).to_bytes(CRC_BYTES, "little"))


class OpenFile:
    """A file that is open for reading: its table [rows] and its sums [taps, SUMS]. Raises UserError."""

    def __init__(self, file: LocalFile | RemoteFile, layout: Layout, first_step: int):
        self.file = file
        size = layout.footer_bytes(first_step)
        footer = file.read(layout.file_bytes(first_step) - size, size + 1)  # one more: is the file longer?
        content, crc = footer[:-CRC_BYTES], int.from_bytes(footer[-CRC_BYTES:], "little")
        if len(footer) != size or isal_zlib.crc32(content) != crc:
            raise damaged(file.path, "its table")
        self.table = np.frombuffer(content[: -layout.sums_bytes], TABLE)
        self.sums = np.frombuffer(content[-layout.sums_bytes :], "<f8").reshape(-1, SUMS)


class RowReader:
    """Reads rows of a cache, in a folder or behind a URL; several threads may call it."""

    def __init__(self, location: str, layout: Layout, *, access: Access):
        self.layout = layout
        self.folder = open_cache(location, access=access)
        self._open: OrderedDict[str, OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, row: int, rows: np.ndarray) -> np.ndarray:
        """Fill `rows` [n, row_bytes] uint8 with the rows from this number of the run on.

        Returns their entries [n] of the table. Raises UserError for bytes that are not those that were
        written, ShardError for those that cannot be read.
        """
        entries, place = [], 0
        for piece in self.layout.pieces(row, len(rows)):
            entries.append(self._read_piece(piece, rows[place : place + piece.count]))
            place += piece.count
        return np.concatenate(entries)

    def open(self, first_step: int, lane: int) -> OpenFile:
        """Open a file, and read its table."""
        name = self.layout.file_name(first_step, lane)
        with self._lock:
            if name not in self._open:
                file = self.folder.open(name, size=self.layout.file_bytes(first_step))
                self._open[name] = OpenFile(file, self.layout, first_step)
                if len(self._open) > MAX_OPEN:
                    self._open.popitem(last=False)
            return self._open[name]

    def _read_piece(self, piece: Piece, rows: np.ndarray) -> np.ndarray:
        opened, size = self.open(piece.first_step, piece.lane), self.layout.row_bytes
        if fill(opened.file, piece.start * size, memoryview(rows.reshape(-1))) != rows.size:
            raise damaged(opened.file.path, f"what follows row {piece.start}")
        entries = opened.table[piece.start : piece.start + piece.count]
        for number, (row, crc) in enumerate(zip(rows, entries["crc32"].tolist(), strict=True)):
            if isal_zlib.crc32(row) != crc:
                raise damaged(opened.file.path, f"row {piece.start + number}")
        return entries


def open_cache(location: str, *, access: Access) -> LocalFolder | RemoteFolder:
    """Open the folder or URL of a cache. Raises ShardError for an unknown kind of URL."""
    place = location if is_url(location) else Path(location).expanduser()
    return open_folder(place, access=access, label=LABEL)


def fill(file: LocalFile | RemoteFile, offset: int, buffer: memoryview) -> int:
    """Fill a buffer from a file, a local one without a copy in between; returns how many bytes there were.

    Raises ShardError.
    """
    if isinstance(file, RemoteFile):
        data = file.read(offset, len(buffer))
        buffer[: len(data)] = data
        return len(data)
    done = 0
    try:
        while done < len(buffer) and (count := os.preadv(file.descriptor, [buffer[done:]], offset + done)):
            done += count
    except OSError as error:
        raise ShardError(f"{file.path} cannot be read: {error.strerror}") from None
    return done


def damaged(path: str | Path, part: str) -> UserError:
    """The error for a file whose bytes are not those that were written."""
    error = UserError(
        f"{path} is damaged: {part} has another crc32 than when it was written; remove that file and run the "
        "same dmae-ds teacher cache command, which writes it again"
    )
    error.of_one_rank = True  # the other ranks read other rows
    return error
