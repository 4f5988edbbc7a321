"""Convert the label map and the annotations of one image, in a worker of `make`.

Both follow their image: turned upright with it, and scaled with it (maps by nearest neighbours). A map's
bytes stay unless its values or its size change; polygons and run lengths stay unless the image changes.
"""

import io
import json
from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_prep.dense import DenseSettings
from dmae_ds.data.dense_members import (
    MAX_CLASSES,
    MIN_SIDE,
    DenseInfo,
    are_numbers,
    check_map_classes,
    check_segmentation,
    decode_masks,
    encode_mask,
    ignore_index,
    read_annotations,
    read_map_values,
)

NO_AREA = "boxes without an area were left out"
CLIPPED = "boxes over the edge of their image were cut to it"
NO_MASK = "objects without a mask were left out (others have one)"
UPRIGHT = "images were stored upright, as their maps or boxes were drawn"
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Frame:
    """How an image changes on its way into a shard."""

    drawn: tuple[int, int]  # width and height of what maps and boxes were drawn on
    turn: int  # EXIF orientation by which they are turned; 1: not
    final: tuple[int, int]  # width and height in the shard

    @property
    def turned(self) -> tuple[int, int]:
        """Width and height after the turn."""
        return self.drawn[::-1] if self.turn >= 5 else self.drawn

    @property
    def is_unchanged(self) -> bool:
        """Whether maps and boxes stay as they are."""
        return self.turn == 1 and self.drawn == self.final


def is_drawn_upright(
    orientation: int, stored: tuple[int, int], sizes: dict[str, tuple[int, int]], exif: str | None
) -> bool:
    """Whether maps and boxes were drawn on the upright image, and not on its stored pixels.

    orientation: EXIF's, 1 to 8; stored: width and height of the stored pixels
    sizes: width and height of what was drawn, by its name; exif: the user's word, stored or upright
    Raises ValueError where sizes contradict each other or the image, or do not tell it.
    """
    upright = stored[::-1] if orientation >= 5 else stored
    allowed = {"stored": [stored], "upright": [upright], None: [stored, upright]}[exif]
    for name, size in sizes.items():
        if size not in allowed or size != next(iter(sizes.values())):
            shown = " x ".join(map(str, allowed[0]))
            raise ValueError(f"its {name} has {size[0]} x {size[1]} pixels, expected {shown} as its image")
    if orientation == 1:
        return False
    if exif is not None:
        return exif == "upright"
    if stored == upright:
        raise ValueError(
            f"its EXIF data turn it (orientation {orientation}), and sizes do not tell whether its map or "
            f"boxes were drawn before; add --exif stored or --exif upright"
        )
    return next(iter(sizes.values())) == upright


def convert_map(
    data: bytes, settings: DenseSettings, frame: Frame, *, max_pixels: int | None = None
) -> bytes:
    """The `.seg.png` of a map file. Raises ValueError with a reason."""
    values = read_map_values(data, max_pixels=max_pixels)
    num_classes = len(settings.info.map_classes)
    nothing = ignore_index(num_classes)
    given = settings.ignore_label
    if given is None:
        given = 255 if values.dtype == np.uint8 else MAX_CLASSES
    has_class = values != given
    numbers = values.astype(np.int64)
    if settings.zero_is_unlabelled:
        has_class &= values != 0
        numbers -= 1
    check_map_classes(numbers[has_class], num_classes)
    numbers[~has_class] = nothing
    dtype = np.uint8 if nothing == 255 else np.uint16
    is_same = values.dtype == dtype and np.array_equal(numbers, values) and _is_grey(data)
    if is_same and frame.is_unchanged:
        return data
    image = Image.fromarray(numbers.astype(dtype))
    if frame.turn != 1:
        image = image.transpose(TURNS[frame.turn])
    if image.size != frame.final:
        image = image.resize(frame.final, Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def convert_annotations(line: dict, info: DenseInfo, frame: Frame, modes: Counter) -> bytes:
    """The `.ann.json` of an image; what is changed or left out is counted in `modes`.

    line: width, height, image_id and annotations as in COCO's file, with the label of each
    Raises ValueError with a reason.
    """
    width, height = frame.drawn
    kept = []
    for annotation in line["annotations"]:
        where = f"its annotation {annotation['id']}"
        box = _clip(annotation.get("bbox"), where, width, height, modes)
        if box is None:
            continue
        annotation = {**annotation, "bbox": box}
        if not are_numbers([annotation.get("area")]):
            annotation.pop("area", None)  # a NaN would not be JSON for other readers
        if info.has_masks:
            segmentation = _usable(annotation.get("segmentation"))
            if segmentation is None:
                modes[NO_MASK] += 1
                continue
            check_segmentation(segmentation, where, width=width, height=height)
            annotation["segmentation"] = segmentation
        else:
            annotation.pop("segmentation", None)
        if not frame.is_unchanged:
            annotation = _transform(annotation, frame)
        if min(annotation["bbox"][2:]) < MIN_SIDE:
            modes[NO_AREA] += 1
            continue
        kept.append(annotation)
    entry = {"image_id": line["image_id"], "width": frame.final[0], "height": frame.final[1]}
    data = json.dumps(entry | {"annotations": kept}).encode()
    read_annotations(data, info, width=frame.final[0], height=frame.final[1])
    return data


def _clip(box: object, where: str, width: int, height: int, modes: Counter) -> list[float] | None:
    """A box cut to the image; None without an area. Raises ValueError for one that is no box, or outside."""
    is_box = isinstance(box, list) and len(box) == 4 and all(type(value) in (int, float) for value in box)
    if not is_box or not all(abs(value) < 1e9 for value in box):
        raise ValueError(f"{where} has bbox {box!r:.60}, expected four numbers [x, y, width, height]")
    x, y, w, h = box
    if min(w, h) < MIN_SIDE:
        modes[NO_AREA] += 1
        return None
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if min(right - left, bottom - top) < MIN_SIDE:
        raise ValueError(f"{where} has bbox {box}, outside of the image of {width} x {height}")
    if (left, top) == (x, y) and right == x + w and bottom == y + h:
        return box
    modes[CLIPPED] += 1
    return [left, top, right - left, bottom - top]


def _usable(segmentation: object) -> object:
    """The segmentation without polygons of fewer than three points; None where nothing is left."""
    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if not isinstance(polygon, list) or len(polygon) >= 6]
        return polygons or None
    return segmentation or None


def _transform(annotation: dict, frame: Frame) -> dict:
    """An annotation turned and scaled as its image."""
    x, y, w, h = annotation["bbox"]
    corners = _move(np.array([[x, y], [x + w, y + h]], float), frame)
    (left, top), (right, bottom) = corners.min(0), corners.max(0)
    changed = {**annotation, "bbox": [_round(value) for value in (left, top, right - left, bottom - top)]}
    scale = frame.final[0] * frame.final[1] / (frame.drawn[0] * frame.drawn[1])
    if "area" in annotation:
        changed["area"] = annotation["area"] * scale
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, list):
        changed["segmentation"] = [
            [_round(value) for value in _move(np.array(polygon, float).reshape(-1, 2), frame).reshape(-1)]
            for polygon in segmentation
        ]
    elif segmentation is not None:
        width, height = frame.drawn
        mask = Image.fromarray(decode_masks([segmentation], width=width, height=height)[0].astype(np.uint8))
        if frame.turn != 1:
            mask = mask.transpose(TURNS[frame.turn])
        mask = mask.resize(frame.final, Image.Resampling.NEAREST)
        changed["segmentation"] = encode_mask(np.asarray(mask))
    return changed


def _move(points: np.ndarray, frame: Frame) -> np.ndarray:
    """Turn and scale points [N, 2] of x and y."""
    width, height = frame.drawn
    x, y = points.T
    turned = {
        1: (x, y),
        2: (width - x, y),
        3: (width - x, height - y),
        4: (x, height - y),
        5: (y, x),
        6: (height - y, x),
        7: (height - y, width - x),
        8: (y, width - x),
    }[frame.turn]
    scale = np.array(frame.final, float) / np.array(frame.turned, float)
    return np.stack(turned, axis=1) * scale


def _round(value: float) -> float:
    return round(float(value), 4)


def _is_grey(data: bytes) -> bool:
    """Whether a PNG is grey without transparency, of 8 or 16 bits: bytes 24 and 25 of its header."""
    return data[24] in (8, 16) and data[25] == 0
