"""Read a tar from its first byte to its last, as strictly as webdataset reads it leniently.

webdataset and tarfile end a tar in silence where a header is damaged or cut, and so lose samples; here that
is an error with its place. Understands ustar, GNU long names and pax; asks for no seeking, so a remote file
will do. A member
is a name and bytes: no name is ever used as a path, and nothing is unpickled.
"""

import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

MAX_EXTRA = 2**20  # bytes of a long name or of pax headers; real ones have hundreds
MAX_BYTES = 2**28  # of a member that is read
BLOCK = 512
KEY = re.compile(
    r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL
)  # webdataset's: up to the first dot of the base name


class Member(NamedTuple):
    name: str
    offset: int  # of its first byte in the tar
    size: int
    data: bytes | None  # None: larger than MAX_BYTES


def scan_tar(file: BinaryIO) -> Iterator[Member]:
    """The regular files of a tar. Raises ValueError that says where it is damaged or cut."""
    position, names, pax, everywhere = 0, {}, {}, {}
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
            everywhere |= _parse_pax(_read_padded(file, size, position), position)
        elif kind in b"LK":
            names[kind] = _read_padded(file, size, position).rstrip(b"\0")
        else:
            known = everywhere | pax
            if any(key.startswith("GNU.sparse") for key in known) or kind == b"S":
                raise ValueError(f"byte {position}: a sparse file")
            size = _parse_count(known["size"], position) if "size" in known else size
            name = (
                known["path"]
                if "path" in known
                else (names.get(b"L") or _plain_name(header)).decode(errors="surrogateescape")
            )
            regular = kind in b"0\0007" and not name.endswith("/")
            if not regular and kind in b"123456":
                size = 0  # links, devices and folders have no data, whatever their header says
            data = _read_padded(file, size, position) if size <= MAX_BYTES else _skip(file, size, position)
            if regular:
                yield Member(name, position, size, data)
            names, pax = {}, {}
        position += size + -size % BLOCK


def split_key(name: str) -> tuple[str, str] | None:
    """(key, extension in lower case) as webdataset has them; None: not of any sample."""
    match = KEY.fullmatch(name)
    return (match[1], match[2].lower()) if match else None


def _check_header(header: bytes, position: int) -> int:
    """Returns the size field."""
    try:
        checksum = int(header[148:156].strip(b"\0 ") or b"0", 8)
    except ValueError:
        checksum = -1
    if checksum != sum(header) - sum(header[148:156]) + 8 * 32:
        raise ValueError(f"byte {position}: no tar header, or a damaged one")
    field = header[124:136]
    if field[0] == 0x80:  # GNU's form for what is too large for octal digits
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b"\0 ") or b"0", 8)
    except ValueError:
        raise ValueError(f"byte {position}: a header without a size") from None


def _plain_name(header: bytes) -> bytes:
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    return b"%b/%b" % (prefix, name) if prefix and header[257:263] == b"ustar\0" else name


def _parse_pax(data: bytes, position: int) -> dict[str, str]:
    found = {}
    while data:
        match = re.match(rb"([0-9]{1,9}) ([^=]+)=", data)
        length = int(match[1]) if match else 0
        if match is None or not match.end() < length <= len(data):
            raise ValueError(f"byte {position}: damaged pax headers")
        found[match[2].decode(errors="replace")] = data[match.end() : length - 1].decode(
            errors="surrogateescape"
        )
        data = data[length:]
    return found


def _parse_count(text: str, position: int) -> int:
    if not re.fullmatch("[0-9]{1,18}", text):
        raise ValueError(f"byte {position}: a size of {text[:20]!r}")
    return int(text)


def _check_end(file: BinaryIO, position: int) -> None:
    rest = _read(file, BLOCK, position + BLOCK)
    while rest:
        if rest.strip(b"\0"):
            raise ValueError(f"byte {position}: something follows the end")
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
    """In pieces: a header that lies about a size must not make us ask for the memory."""
    data = file.read(min(size, 2**20))
    if len(data) == size:
        return data
    pieces = [data]
    while (left := size - sum(map(len, pieces))) and pieces[-1]:
        pieces.append(file.read(min(left, 2**22)))
    if left:
        raise ValueError(f"cut at byte {position + size - left}")
    return b"".join(pieces)
