"""What tells weights files from others without reading them whole."""

from __future__ import annotations

from pathlib import Path

from isal import isal_zlib

STATS = "stats.safetensors"  # what `dmae-ds teacher stats` writes into a folder of weights
UNIT = "(bytes, crc32)"  # what `identify` gives, for the end of a key
PIECES, PIECE_BYTES = 64, 2**16  # of a file


def identify(path: Path) -> list[int]:
    """A weights file, or a folder of some: [bytes of all files, crc32 of pieces spread over each]."""
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".bin", ".pth"))
        files = [file for file in files if file.name != STATS]
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
