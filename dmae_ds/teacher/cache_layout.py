"""Layout of stored features: which file holds which rows of a run's batches, and what a row's bytes are.

A row is a row of the global batch, with its number in the run (`Batch.rows`). A global batch is cut into
lanes of equally many rows, and a file holds one lane of a few consecutive steps. So a file depends neither on
the number of ranks that write nor on those that read, one rank writes it alone, and whoever reads its part of
every global batch reads its files from the beginning to the end.

    file    the rows, `row_bytes` each; a table with crc32, epoch and sample id of every row; four sums a tap
            about the error of storing; crc32 of the table and the sums
    row     every tap: scales in float32 where it is int8, then the numbers; padded to four bytes

All numbers are little-endian. Pure numbers, without torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod

import numpy as np

TARGET_BYTES = 2**29  # of all lanes of the steps in a file: what a kill of the writer loses, at most
MOST_STEPS = 16  # in a file
CODEC = "codec.safetensors"  # in the cache's folder: what int8 and PCA are restored with
STORED = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8"}
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
TABLE = np.dtype([("crc32", "<u4"), ("epoch", "<u4"), ("sample_id", "<i8")])  # an entry a row
SUMS = 4  # of a tap: squared error, squared features, cosines, number of vectors; float64
CRC_BYTES = 4


@dataclass(frozen=True)
class StoredTap:
    """Features of one tap: as a run gets them, and as they are stored.

    shape: of a row's features, [V, ..., D]; V views of an image that the teacher sees
    dtype: in which a run gets them; stored: of the file, a key of ITEM_BYTES
    width: numbers of a vector in the file: D, or the components of PCA
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored: str
    width: int

    @property
    def num_vectors(self) -> int:
        """Number of vectors [D] of a row."""
        return prod(self.shape[:-1])

    @property
    def scale_bytes(self) -> int:
        """Bytes of a row's scales, one a vector, where it is int8."""
        return 4 * self.num_vectors if self.stored == "int8" else 0

    @property
    def num_bytes(self) -> int:
        """Bytes of a row's features in the file."""
        size = self.scale_bytes + self.num_vectors * self.width * ITEM_BYTES[self.stored]
        return -(-size // 4) * 4

    @property
    def is_exact(self) -> bool:
        """Whether a run gets the very numbers that the teacher gave."""
        narrower = ITEM_BYTES[self.stored] < ITEM_BYTES[self.dtype] or {self.stored, self.dtype} == {
            "bfloat16",
            "float16",
        }
        return self.width == self.shape[-1] and not narrower


@dataclass(frozen=True)
class Piece:
    """Consecutive rows in one file: its first step and lane, the first row in the file, and their number."""

    first_step: int
    lane: int
    start: int
    count: int


@dataclass(frozen=True)
class Layout:
    """Files of a cache. `lane_rows` divides `global_batch`; the last files may have fewer steps."""

    global_batch: int
    lane_rows: int
    num_steps: int
    steps_per_file: int
    taps: tuple[StoredTap, ...]

    @classmethod
    def of(cls, taps: tuple[StoredTap, ...], *, global_batch: int, lane_rows: int, num_steps: int) -> Layout:
        """Choose the number of steps in a file."""
        step_bytes = global_batch * sum(tap.num_bytes for tap in taps)
        steps_per_file = max(1, min(MOST_STEPS, TARGET_BYTES // step_bytes))
        return cls(global_batch, lane_rows, num_steps, steps_per_file, taps)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's features, of all taps."""
        return sum(tap.num_bytes for tap in self.taps)

    @property
    def num_lanes(self) -> int:
        """Number of files for the same steps."""
        return self.global_batch // self.lane_rows

    def first_steps(self) -> range:
        """First steps of all files of a lane."""
        return range(0, self.num_steps, self.steps_per_file)

    def file_name(self, first_step: int, lane: int) -> str:
        """Name of a file in the cache's folder."""
        return f"features-{first_step:08d}-{lane:05d}.bin"

    def num_rows(self, first_step: int) -> int:
        """Number of rows in a file that begins with this step."""
        return min(self.steps_per_file, self.num_steps - first_step) * self.lane_rows

    @property
    def sums_bytes(self) -> int:
        """Bytes of a file's sums about the error of storing."""
        return 8 * SUMS * len(self.taps)

    def footer_bytes(self, first_step: int) -> int:
        """Bytes behind the rows of a file."""
        return self.num_rows(first_step) * TABLE.itemsize + self.sums_bytes + CRC_BYTES

    def file_bytes(self, first_step: int) -> int:
        """Size of a file that begins with this step."""
        return self.num_rows(first_step) * self.row_bytes + self.footer_bytes(first_step)

    def sizes(self, first_steps: range) -> dict[str, int]:
        """Names and sizes of the files that begin with these steps."""
        return {
            self.file_name(first, lane): self.file_bytes(first)
            for first in first_steps
            for lane in range(self.num_lanes)
        }

    def total_bytes(self) -> int:
        """Size of all files."""
        return self.num_lanes * sum(self.file_bytes(first) for first in self.first_steps())

    def pieces(self, row: int, count: int) -> list[Piece]:
        """Places of `count` consecutive rows of one step, from the row with this number in the run on."""
        step, within = divmod(row, self.global_batch)
        assert within + count <= self.global_batch and step < self.num_steps, (row, count)
        first_step = step // self.steps_per_file * self.steps_per_file
        pieces = []
        while count:
            lane, offset = divmod(within, self.lane_rows)
            taken = min(count, self.lane_rows - offset)
            start = (step - first_step) * self.lane_rows + offset
            pieces.append(Piece(first_step, lane, start, taken))
            within, count = within + taken, count - taken
        return pieces

    def as_json(self) -> dict:
        """Plain values, for the manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict) -> Layout:
        """The layout that `as_json` wrote. Raises KeyError or TypeError for other values."""
        taps = tuple(StoredTap(**{**tap, "shape": tuple(tap["shape"])}) for tap in values["taps"])
        return cls(**{**values, "taps": taps})
