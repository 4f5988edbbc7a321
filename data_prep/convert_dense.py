"""Convert one image with its label map and its annotations, in a worker of `make`."""

import json
from collections import Counter
from typing import NamedTuple

from data_prep.annotations import UPRIGHT, Frame, convert_annotations, convert_map, is_drawn_upright
from data_prep.decode import check_pixels, orientation_of, shrink
from data_prep.dense import map_name
from data_prep.files import read_file
from data_prep.header import read_header


class Converted(NamedTuple):
    """What a shard gets of a sample."""

    image: tuple[bytes | memoryview, str, int, int]  # bytes, extension, width, height
    label_map: bytes | None
    annotations: bytes | None
    map_size_and_time: tuple[int, ...]
    modes: Counter  # what was changed or left out


def convert_dense(
    settings, path: bytes, line: bytes | None, data: bytes, stored: tuple[int, int]
) -> Converted:
    """Convert a sample.

    settings: Settings of convert.py, with `dense`; line: its line of ANNOTATIONS
    data: the image file, whose pixels are `stored`: (width, height)
    Raises OSError or ValueError with a reason.
    """
    dense, modes = settings.dense, Counter()
    orientation = orientation_of(data)
    sizes, map_data, facts = {}, b"", ()
    if dense.masks is not None:
        buffer, size, time_ns = read_file(b"%b/%b" % (dense.masks, map_name(path)))
        map_data, facts = bytes(memoryview(buffer)[:size]), (size, time_ns)
        sizes["label map"] = _size_of_map(map_data)
    annotations = None if line is None else json.loads(line)
    if annotations is not None:
        sizes["COCO entry"] = annotations["width"], annotations["height"]
    is_upright = is_drawn_upright(orientation, stored, sizes, dense.exif)
    image = (data, read_header(data, len(data))[0], *stored)
    if settings.resize is not None or is_upright:
        image = shrink(data, short_side=settings.resize, quality=settings.quality)
    elif settings.decode:
        check_pixels(data)
    if is_upright:
        modes[UPRIGHT] += 1
    turn = 1 if is_upright or settings.resize is None else orientation
    frame = Frame(drawn=next(iter(sizes.values())), turn=turn, final=image[2:])
    return Converted(
        image=image,
        label_map=convert_map(map_data, dense, frame) if dense.masks is not None else None,
        annotations=None
        if annotations is None
        else convert_annotations(annotations, dense.info, frame, modes),
        map_size_and_time=facts,
        modes=modes,
    )


def _size_of_map(data: bytes) -> tuple[int, int]:
    """Width and height of a map. Raises ValueError."""
    try:
        return read_header(data, len(data))[1:]
    except ValueError as error:
        raise ValueError(f"its label map: {error}") from None
