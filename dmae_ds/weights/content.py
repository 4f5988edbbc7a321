"""What tells weights files from others without reading them whole."""

from __future__ import annotations

import json
from pathlib import Path

from isal import isal_zlib

STATS = "stats.safetensors"  # what `dmae-ds teacher stats` writes into a folder of weights
UNIT = "(bytes, crc32)"  # what `identify` gives, for the end of a key
# Files that are looked for in a folder, the first that exists wins: our own name, then those of transformers.
IN_A_FOLDER = (
    "student.safetensors",
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
PIECES, PIECE_BYTES = 64, 2**16  # of a file


def identify(path: Path) -> list[int]:
    """A weights file, or a folder of some: [bytes of all files, crc32 of pieces spread over each]."""
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".bin", ".pth"))
        files = [file for file in files if file.name != STATS]
    return _identify(files)


def identify_opened(path: Path) -> list[int]:
    """Like `identify`, but of a folder or an index of several files only those that are opened.

    So other files may come into the folder later.
    """
    if path.is_dir():
        path = next((path / name for name in IN_A_FOLDER if (path / name).is_file()), path)
    if not path.name.endswith(".index.json"):
        return identify(path)
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [path.parent / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError):  # it is refused where it is opened
        return identify(path)
    return _identify([file for file in files if file.is_file()])


def _identify(files: list[Path]) -> list[int]:
    crc = 0
    for file in files:
        crc = _crc_of_pieces(file, crc)
    return [sum(file.stat().st_size for file in files), crc]


def _crc_of_pieces(path: Path, crc: int) -> int:
    size = path.stat().st_size
    with open(path, "rb") as file:
        for number in range(PIECES):
            file.seek(max(0, size - PIECE_BYTES) * number // (PIECES - 1))
            crc = isal_zlib.crc32(file.read(PIECE_BYTES), crc)
    return crc
