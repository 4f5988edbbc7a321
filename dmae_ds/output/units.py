"""Units of memory and sizes as text."""

from __future__ import annotations

MIB = 2**20
GIB = 2**30


def size_text(num_bytes: int) -> str:
    """Format a size: 1.76 GiB, 3.1 MiB."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / MIB:.1f} MiB"
