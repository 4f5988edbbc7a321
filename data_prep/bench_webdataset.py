"""Conversion as in webdataset's manual, for `dmae-shards bench`.

`python -m data_prep.bench_webdataset IMAGES OUT` is a process of its own like our row, so that both include
their start.
"""

import os
import sys
from pathlib import Path

from data_prep.find import find_images


def main() -> None:
    """Write IMAGES as shards of 1,000 with webdataset.ShardWriter."""
    from webdataset import ShardWriter

    images, out = Path(sys.argv[1]), sys.argv[2]
    listing = find_images(images)
    with ShardWriter(f"{out}/shard-%06d.tar", maxcount=1000, maxsize=1e12, verbose=0) as writer:
        for number in range(len(listing)):
            data = (images / os.fsdecode(listing.path(number))).read_bytes()
            writer.write({"__key__": f"{number:09d}", "jpg": data, "cls": str(listing.labels[number])})


if __name__ == "__main__":
    main()
