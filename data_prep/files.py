"""Read source files of `make` over one reused buffer, and tell whether they changed between two runs."""

import os
import stat

MAX_BYTES = 2**28  # largest file, and so the largest buffer of a worker
_buffer = bytearray(2**20)


def read_file(path: bytes) -> tuple[bytearray, int, int]:
    """Read a file; returns (a buffer that begins with the file, its size, its time in ns).

    The next call reuses the buffer. Raises OSError, or ValueError for a file that is not regular, is larger
    than MAX_BYTES or shrinks while it is read.
    """
    global _buffer
    # without O_NONBLOCK, opening a pipe waits for its other end
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if size > MAX_BYTES:
            raise ValueError(f"{size:,} bytes are more than {MAX_BYTES:,}")
        if size > len(_buffer):
            _buffer = bytearray(1 << (size - 1).bit_length())
        view = memoryview(_buffer)
        done = os.readv(descriptor, (view[:size],)) if size else 0
        while done < size:
            count = os.readv(descriptor, (view[done:size],))
            if not count:
                raise ValueError(f"it shrank while it was read, from {size:,} to {done:,} bytes")
            done += count
    finally:
        os.close(descriptor)
    return _buffer, size, status.st_mtime_ns


def size_and_time(path: bytes) -> tuple[int, int]:
    """Size and time of a file, by which a later run sees that it has changed; -1, -1 without it."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns
