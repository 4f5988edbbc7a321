"""Read a tar strictly, from its first byte to its last.

webdataset and tarfile end a tar without a message where a header is damaged or cut, and so lose samples; here
that is an error with its place. Supports ustar, GNU long names and pax; does not seek, so the file may be
remote. A member is a name and bytes: a name is never used as a path, and nothing is unpickled.
"""

import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

MAX_EXTRA = 2**20  # bytes of a long name or of pax headers, which usually have hundreds
MAX_BYTES = 2**28  # largest member that is read
BLOCK = 512
# as in webdataset: up to the first dot of the base name
KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    offset: int  # of its first byte in the tar
    size: int
    data: bytes | None  # None: larger than MAX_BYTES


def scan_tar(file: BinaryIO) -> Iterator[Member]:
    """Yield the regular files of a tar. Raises ValueError with the place where it is damaged or cut."""
    position = 0
    names, pax, global_pax = {}, {}, {}
    while True:
        header = _read(file, BLOCK, position)
        if header == bytes(BLOCK):
            _check_end(file, position)
            return
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
                raise ValueError(f"byte {position}: a sparse file")
            size = _parse_count(fields["size"], position) if "size" in fields else size
            name = fields.get("path")
            if name is None:
                name = (names.get(b"L") or _plain_name(header)).decode(errors="surrogateescape")
            is_regular = kind in b"0\0007" and not name.endswith("/")
            if not is_regular and kind in b"123456":
                size = 0  # links, devices and folders have no data, even if their header has a size
            data = _read_padded(file, size, position) if size <= MAX_BYTES else _skip(file, size, position)
            if is_regular:
                yield Member(name, position, size, data)
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


def _check_end(file: BinaryIO, position: int) -> None:
    """Raise ValueError unless only zeros follow."""
    rest = _read(file, BLOCK, position + BLOCK)
    while rest:
        if rest.strip(b"\0"):
            raise ValueError(f"byte {position}: bytes follow the end of the tar")
        rest = file.read(2**16)


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
