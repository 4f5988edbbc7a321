"""Read a tar strictly, from its first byte to its last.

webdataset and tarfile end a tar without a message where a header is damaged or cut, and so lose samples; here
that is an error with its place. Supports ustar, GNU long names and pax; does not seek, so the file may be
remote. A member is a name and bytes: a name is never used as a path, and nothing is unpickled. Tars in one
file (`cat a.tar b.tar`) are read to the last one.
"""

import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from dmae_ds.data.shards import name_format

MAX_EXTRA = 2**20  # bytes of a long name or of pax headers, which usually have hundreds
MAX_BYTES = 2**28  # largest member that is read
BLOCK = 512
RECORD = 20 * BLOCK  # tar programs fill a file up to a multiple of it
LINKS = {b"1": "hard link", b"2": "symbolic link"}
SPECIAL = {b"3": "device", b"4": "device", b"6": "pipe"}
WITHOUT_FILE = b"5DVNX"  # folders, listings and labels of tar programs
# as in webdataset: up to the first dot of the base name
KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)


class Member(NamedTuple):
    """A member of a tar that is not a folder."""

    name: str
    offset: int  # of its first byte in the tar
    size: int
    data: bytes | None  # None: larger than MAX_BYTES, or not a file
    kind: str = "file"  # or hard link, symbolic link, ...
    target: str = ""  # of a link
    archive: int = 0  # its number, where several tars are one file


class NotRead(ValueError):
    """A file that is whole, but not a tar that can be read; the message says what it is and what to do."""


def scan_tar(file: BinaryIO) -> Iterator[Member]:
    """Yield the files and links of a tar.

    Raises ValueError with the place where it is damaged or cut, NotRead for what is not a tar.
    """
    position, archive = 0, 0
    names, pax, global_pax = {}, {}, {}
    while True:
        header = _read(file, BLOCK, position)
        if header == bytes(BLOCK):
            position, header = _skip_end(file, position)
            if not header:
                return
            archive += 1
        size, kind = _check_header(header, position), header[156:157]
        position += BLOCK
        if kind in b"xgLK" and size > MAX_EXTRA:
            raise ValueError(f"byte {position}: a name or header of {size:,} bytes")
        if kind == b"x":
            pax = _parse_pax(_read_padded(file, size, position), position)
        elif kind == b"g":
            global_pax |= _parse_pax(_read_padded(file, size, position), position)
        elif kind in b"LK":
            names[kind] = _read_padded(file, size, position).rstrip(b"\0")
        else:
            fields = global_pax | pax
            if any(key.startswith("GNU.sparse") for key in fields) or kind == b"S":
                raise NotRead(f"has a sparse file at byte {position}; pack it again without --sparse")
            if kind == b"M" or "GNU.volume.offset" in fields:
                raise NotRead("is a part of an archive in several volumes; pack it again as one tar")
            size = _parse_count(fields["size"], position) if "size" in fields else size
            name = fields.get("path")
            if name is None:
                name = (names.get(b"L") or _plain_name(header)).decode(errors="surrogateescape")
            is_regular = kind in b"0\0007" and not name.endswith("/")
            link = fields.get("linkpath") or names.get(b"K") or header[157:257].split(b"\0")[0]
            if not is_regular and kind in b"123456":
                size = 0  # links, devices and folders have no data, even if their header has a size
            data = _read_padded(file, size, position) if size <= MAX_BYTES else _skip(file, size, position)
            if is_regular:
                yield Member(name, position, size, data, archive=archive)
            elif kind in LINKS:
                target = link if isinstance(link, str) else link.decode(errors="surrogateescape")
                yield Member(name, position, 0, None, LINKS[kind], target, archive)
            elif kind not in WITHOUT_FILE and not name.endswith("/"):
                special = SPECIAL.get(kind, f"member of type {kind!r}")
                yield Member(name, position, 0, None, special, archive=archive)
            names, pax = {}, {}
        position += size + -size % BLOCK


def split_key(name: str) -> tuple[str, str] | None:
    """Split a name into (key, extension in lower case) as webdataset does; None: it belongs to no sample."""
    match = KEY.fullmatch(name)
    return (match[1], match[2].lower()) if match else None


def _check_header(header: bytes, position: int) -> int:
    """Check a header; returns its size field. Raises ValueError."""
    try:
        checksum = int(header[148:156].strip(b"\0 ") or b"0", 8)
    except ValueError:
        checksum = -1
    if checksum != sum(header) - sum(header[148:156]) + 8 * 32:
        known = name_format(header) if position == 0 else None
        if known is not None:
            raise NotRead(f"is {known}")
        raise ValueError(f"byte {position}: no tar header, or a damaged one")
    field = header[124:136]
    if field[0] == 0x80:  # GNU's form of a size that is too large for octal digits
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b"\0 ") or b"0", 8)
    except ValueError:
        raise ValueError(f"byte {position}: a header without a size") from None


def _plain_name(header: bytes) -> bytes:
    """Name in a ustar header."""
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    return b"%b/%b" % (prefix, name) if prefix and header[257:263] == b"ustar\0" else name


def _parse_pax(data: bytes, position: int) -> dict[str, str]:
    """Fields of pax headers. Raises ValueError."""
    fields = {}
    while data:
        match = re.match(rb"([0-9]{1,9}) ([^=]+)=", data)
        length = int(match[1]) if match else 0
        if match is None or not match.end() < length <= len(data):
            raise ValueError(f"byte {position}: damaged pax headers")
        value = data[match.end() : length - 1]
        fields[match[2].decode(errors="replace")] = value.decode(errors="surrogateescape")
        data = data[length:]
    return fields


def _parse_count(text: str, position: int) -> int:
    if not re.fullmatch("[0-9]{1,18}", text):
        raise ValueError(f"byte {position}: a size of {text[:20]!r}")
    return int(text)


def _skip_end(file: BinaryIO, position: int) -> tuple[int, bytes]:
    """(position, first header) of the tar that follows the end of another one; (position, b"") if none does.

    Raises ValueError for other bytes.
    """
    num_empty = 0
    header = bytes(BLOCK)
    while header and not header.strip(b"\0"):
        num_empty, position = num_empty + 1, position + BLOCK
        header = file.read(BLOCK)
        while header and len(header) < BLOCK and (more := file.read(BLOCK - len(header))):
            header += more
    if header and (num_empty < 2 or position % RECORD or len(header) < BLOCK):
        raise ValueError(f"byte {position}: bytes follow the end of the tar")
    return position, header


def _read_padded(file: BinaryIO, size: int, position: int) -> bytes:
    data = _read(file, size, position)
    _read(file, -size % BLOCK, position + size)
    return data


def _skip(file: BinaryIO, size: int, position: int) -> None:
    left = size + -size % BLOCK
    while left:
        left -= len(_read(file, min(left, 2**20), position + size - left))


def _read(file: BinaryIO, size: int, position: int) -> bytes:
    """Read exactly `size` bytes, in pieces: a wrong size in a header must not reserve memory.

    Raises ValueError.
    """
    data = file.read(min(size, 2**20))
    if len(data) == size:
        return data
    pieces = [data]
    while (left := size - sum(map(len, pieces))) and pieces[-1]:
        pieces.append(file.read(min(left, 2**22)))
    if left:
        raise ValueError(f"cut at byte {position + size - left}")
    return b"".join(pieces)
