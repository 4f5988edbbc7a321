"""Convert one image with its label map and its annotations, in a worker of `make`."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from data_prep.annotations import UPRIGHT, Frame, convert_annotations, convert_map, is_drawn_upright
from data_prep.decode import check_pixels, orientation_of, shrink
from data_prep.dense import map_file
from data_prep.files import read_file
from data_prep.header import MAX_SHRUNK_PIXELS, read_header

if TYPE_CHECKING:
    from data_prep.convert import Settings


class Converted(NamedTuple):
    """What a shard gets of a sample."""

    image: tuple[bytes | memoryview, str, int, int]  # bytes, extension, width, height
    label_map: bytes | None
    annotations: bytes | None
    map_size_and_time: tuple[int, ...]
    modes: Counter  # what was changed or left out


def convert_dense(
    settings: Settings, path: bytes, line: bytes | None, image: tuple[bytes, str, int, int]
) -> Converted:
    """Convert a sample.

    line: its line of ANNOTATIONS; image: bytes, extension, width and height as they are in SRC
    Raises OSError or ValueError with a reason.
    """
    dense, modes, stored = settings.dense, Counter(), image[2:]
    max_pixels = None if settings.resize is None else MAX_SHRUNK_PIXELS
    orientation = orientation_of(image[0])
    sizes, map_data, facts = {}, b"", ()
    if dense.masks is not None:
        buffer, size, time_ns = read_file(map_file(dense.masks, path))
        map_data, facts = bytes(memoryview(buffer)[:size]), (size, time_ns)
        sizes["label map"] = _size_of_map(map_data, max_pixels)
    annotations = None if line is None else json.loads(line)
    if annotations is not None:
        sizes["COCO entry"] = annotations["width"], annotations["height"]
    is_upright = is_drawn_upright(orientation, stored, sizes, dense.exif)
    if settings.resize is not None or is_upright:
        image = shrink(image[0], short_side=settings.resize, quality=settings.quality)
    elif settings.decode:
        check_pixels(image[0])
    if is_upright:
        modes[UPRIGHT] += 1
    turn = 1 if is_upright or settings.resize is None else orientation
    frame = Frame(drawn=next(iter(sizes.values())), turn=turn, final=image[2:])
    label_map = text = None
    if dense.masks is not None:
        label_map = convert_map(map_data, dense, frame, max_pixels=max_pixels)
    if annotations is not None:
        text = convert_annotations(annotations, dense.info, frame, modes)
    return Converted(image, label_map, text, facts, modes)


def _size_of_map(data: bytes, max_pixels: int | None) -> tuple[int, int]:
    """Width and height of a map. Raises ValueError."""
    try:
        if not data:
            raise ValueError("empty")
        return read_header(data, len(data), max_pixels=max_pixels)[1:]
    except ValueError as error:
        raise ValueError(f"its label map: {error}") from None
