"""Images of a set that have the same bytes: links and copies, which training sees more than once."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from dmae_ds.data.shards import Shard, index_name


class Repeats(NamedTuple):
    """Images with the bytes of an image before them.

    first: number of the first such image, and of the image before
    """

    count: int
    first: tuple[int, int]


def find_repeats(folder: Path, shards: list[Shard]) -> Repeats | None:
    """Find the images of equal size and crc32 in the indexes of new shards; None where there are none."""
    columns = ["number", "size", "crc32"]
    rows = np.concatenate([np.load(folder / index_name(shard.name))[columns] for shard in shards])
    content = rows["size"].astype(np.uint64) << np.uint64(32) | rows["crc32"]
    _, first, inverse = np.unique(content, return_index=True, return_inverse=True)
    repeats = np.flatnonzero(first[inverse] != np.arange(len(rows)))
    if not len(repeats):
        return None
    numbers = rows["number"][[repeats[0], first[inverse[repeats[0]]]]]
    return Repeats(len(repeats), (int(numbers[0]), int(numbers[1])))
