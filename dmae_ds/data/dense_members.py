"""What a sample of a dense set has next to its image, and how its bytes are read. Without torch.

    KEY.seg.png    label map, 8 or 16 bit: the number of a class; 255 (of 16 bits 65535) is no class
    KEY.ann.json   {"annotations": [{"bbox": [x, y, w, h], "label": 0, "iscrowd": 0, "segmentation": ...}]}

A segmentation is COCO's: polygons [[x0, y0, x1, y1, ...], ...], or run lengths by columns, {"size": [h, w],
"counts": a list, or COCO's compressed text}. Other keys of an annotation stay and are not read. Bytes are
checked before anything is decoded: pycocotools writes outside its memory for some wrong counts.
"""

from __future__ import annotations

import io
import json
import math
import warnings
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dmae_ds.data.pixels import TooLarge, check_size
from dmae_ds.data.shards import ShardError

MAP_MODES = ("L", "P", "I;16", "I;16B", "I", "1")  # grey of 1 to 16 bits, and numbers in a palette
MAX_CLASSES = 65535
MIN_SIDE = 0.01  # px; a box below it has no area in float32
MAX_MASK_BYTES = 2**31  # of all masks of an image, a byte a pixel
MAX_POINTS = 10**6  # of the polygons of one object


@dataclass(frozen=True)
class DenseInfo:
    """The classes of a dense set, as in its manifest."""

    map_classes: list[str] | None  # names of the maps' classes; None: no sample has a map
    box_classes: list[str] | None  # names of the boxes' classes; None: no sample has annotations
    has_masks: bool  # whether every box has a mask

    @property
    def ignore_index(self) -> int:
        """Value of pixels without a class: 255, or 65535 where 255 is the number of a class."""
        return ignore_index(len(self.map_classes or ()))

    @classmethod
    def parse(cls, entry: object) -> DenseInfo:
        """Check `dense` of a manifest. Raises ValueError."""
        names = {field.name for field in fields(cls)}
        if not isinstance(entry, dict) or set(entry) != names:
            raise ValueError(f"dense does not have the fields {sorted(names)}")
        for name in ("map_classes", "box_classes"):
            value = entry[name]
            is_list = isinstance(value, list) and all(isinstance(item, str) for item in value)
            if value is not None and not (is_list and 0 < len(value) <= MAX_CLASSES):
                raise ValueError(f"dense.{name} is not a list of 1 to {MAX_CLASSES:,} names, or null")
        if entry["map_classes"] is None and entry["box_classes"] is None:
            raise ValueError("dense has neither map_classes nor box_classes")
        if type(entry["has_masks"]) is not bool:
            raise ValueError(f"dense.has_masks is {entry['has_masks']!r}, expected true or false")
        return cls(**entry)

    def describe(self) -> str:
        """What the samples have, with numbers of classes: `label maps (14 classes), boxes (10 classes)`."""
        shown = []
        if self.map_classes is not None:
            shown.append(f"label maps ({len(self.map_classes):,} classes)")
        if self.box_classes is not None:
            kind = "boxes with masks" if self.has_masks else "boxes"
            shown.append(f"{kind} ({len(self.box_classes):,} classes)")
        return ", ".join(shown)

    def entry(self) -> dict:
        """The same as JSON."""
        return asdict(self)


class Annotations(NamedTuple):
    """Checked content of a `.ann.json`; M objects."""

    boxes: np.ndarray  # [M, 4] float32: x0, y0, x1, y1 in pixels
    labels: np.ndarray  # [M] int64
    crowd: np.ndarray  # [M] bool
    segmentations: list  # of each object, as stored; None without one


def ignore_index(num_classes: int) -> int:
    """Value of pixels without a class in a map of so many classes."""
    return 255 if num_classes <= 255 else MAX_CLASSES


def read_map_values(data: bytes, *, max_pixels: int | None = None) -> np.ndarray:
    """Decode a label map as it is: uint8 or uint16 [H, W]; numbers in a palette, not its colours.

    max_pixels: default, what training reads
    Raises ValueError with a reason unless it is a PNG of one channel with at most 16 bits.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of images that are within our own limits
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
                if image.format != "PNG" or image.mode not in MAP_MODES:
                    raise TypeError(f"{image.format} {image.mode}")
                check_size(image.width, image.height, max_pixels=max_pixels)
                values = np.array(image)
                # Byte 24 of the header has the bits; PIL scales numbers of 2 and 4 bits to 255.
                if image.mode == "L" and data[24] < 8:
                    values //= 255 // (2 ** data[24] - 1)
    except TooLarge:
        raise
    except TypeError as error:
        raise ValueError(
            f"its label map is {error}, expected a PNG with one number a pixel (grey or palette)"
        ) from None
    except Exception as error:  # PIL's decoders raise nearly anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise ValueError(f"its label map cannot be decoded ({reason})") from None
    return values.astype(np.uint8 if values.dtype.itemsize == 1 else np.uint16)


def read_map(data: bytes, num_classes: int) -> np.ndarray:
    """Decode a `.seg.png` to int64 [H, W], `ignore_index(num_classes)` where there is no class.

    Raises ValueError with a reason for bytes that are no label map, and for a class that the set lacks.
    """
    values = read_map_values(data)
    nothing = 255 if values.dtype == np.uint8 else MAX_CLASSES
    label_map, has_class = values.astype(np.int64), values != nothing
    check_map_classes(values[has_class], num_classes)
    label_map[~has_class] = ignore_index(num_classes)
    return label_map


def check_map_classes(values: np.ndarray, num_classes: int) -> None:
    """Raise ValueError for a number that is not one of the classes."""
    largest = int(values.max()) if values.size else 0
    if largest >= num_classes:
        raise ValueError(f"its label map has class {largest}, expected 0 to {num_classes - 1}")


def read_annotations(data: bytes, info: DenseInfo, *, width: int, height: int) -> Annotations:
    """Parse and check a `.ann.json` of an image of width x height. Raises ValueError with a reason."""
    try:
        annotations = json.loads(data)["annotations"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError('its annotations are not JSON with the key "annotations"') from None
    if not isinstance(annotations, list):
        raise ValueError(f"its annotations are a {type(annotations).__name__}, expected a list")
    if info.has_masks and len(annotations) * width * height > MAX_MASK_BYTES:
        raise ValueError(
            f"it has {len(annotations):,} objects in {width} x {height} pixels, and their masks would "
            f"have more than {MAX_MASK_BYTES:,} bytes; `dmae-shards make --resize N` stores it smaller"
        )
    num_classes = len(info.box_classes or ())
    boxes, labels, crowd, segmentations = [], [], [], []
    for number, annotation in enumerate(annotations):
        where = f"its annotation {number}"
        if not isinstance(annotation, dict):
            raise ValueError(f"{where} is a {type(annotation).__name__}, expected an object")
        x, y, w, h = check_box(annotation.get("bbox"), where, width=width, height=height)
        label, is_crowd = annotation.get("label"), annotation.get("iscrowd", 0)
        if type(label) is not int or not 0 <= label < num_classes:
            raise ValueError(f"{where} has label {label!r}, expected 0 to {num_classes - 1}")
        if is_crowd not in (0, 1):
            raise ValueError(f"{where} has iscrowd {is_crowd!r}, expected 0 or 1")
        segmentation = annotation.get("segmentation") if info.has_masks else None
        if info.has_masks:
            check_segmentation(segmentation, where, width=width, height=height)
        boxes.append((max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)))
        labels.append(label)
        crowd.append(bool(is_crowd))
        segmentations.append(segmentation)
    return Annotations(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        np.array(crowd, bool),
        segmentations,
    )


def check_box(box: object, where: str, *, width: int, height: int) -> tuple[float, float, float, float]:
    """Check COCO's [x, y, w, h]. Raises ValueError unless it is a box with an area inside of the image."""
    if not are_numbers(box) or len(box) != 4:
        raise ValueError(f"{where} has bbox {_short(box)}, expected four numbers [x, y, width, height]")
    x, y, w, h = map(float, box)
    slack = 1e-3  # of sums in floating point
    if not (min(w, h) >= MIN_SIDE and x >= -slack and y >= -slack):
        raise ValueError(f"{where} has bbox {_short(box)}, expected an area inside of the image")
    if x + w > width + slack or y + h > height + slack:
        raise ValueError(f"{where} has bbox {_short(box)}, outside of the image of {width} x {height}")
    return x, y, w, h


def check_segmentation(segmentation: object, where: str, *, width: int, height: int) -> None:
    """Raise ValueError unless it is COCO's polygons or run lengths, for an image of width x height."""
    if isinstance(segmentation, dict):
        read_counts(segmentation, where, width=width, height=height)
        return
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError(f"{where} has segmentation {_short(segmentation)}, expected polygons or run lengths")
    if sum(len(polygon) for polygon in segmentation if isinstance(polygon, list)) > 2 * MAX_POINTS:
        raise ValueError(f"{where} has polygons of more than {MAX_POINTS:,} points")
    for polygon in segmentation:
        if not are_numbers(polygon) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"{where} has polygon {_short(polygon)}, expected x, y of at least three points")
        # labelling tools draw a little over the edge; far outside pycocotools would reserve any memory
        xs, ys = polygon[::2], polygon[1::2]
        if not (-width <= min(xs) <= max(xs) <= 2 * width and -height <= min(ys) <= max(ys) <= 2 * height):
            raise ValueError(f"{where} has a polygon far outside of the image of {width} x {height}")


def read_counts(segmentation: dict, where: str, *, width: int, height: int) -> list[int]:
    """Lengths of the runs of COCO's RLE, of 0 and 1 in turn, by columns. Raises ValueError."""
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, list) or size != [height, width]:
        raise ValueError(f"{where} has run lengths of size {_short(size)}, expected {[height, width]}")
    if isinstance(counts, str):
        counts = _decompress(counts, where)
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"{where} has run lengths {_short(counts)}, expected whole numbers from 0")
    if sum(counts) != width * height:
        raise ValueError(f"{where} has run lengths of {sum(counts)} pixels, expected {width * height}")
    return counts


def decode_masks(segmentations: list, *, width: int, height: int) -> np.ndarray:
    """Masks of checked segmentations, bool [M, height, width]. Raises ShardError without pycocotools.

    Polygons are filled by pycocotools, as COCO's evaluation does.
    """
    masks = np.zeros((len(segmentations), height, width), bool)
    for number, segmentation in enumerate(segmentations):
        if isinstance(segmentation, dict):
            counts = read_counts(segmentation, f"annotation {number}", width=width, height=height)
            values = np.arange(len(counts)) % 2 == 1
            masks[number] = np.repeat(values, counts).reshape(width, height).T
        else:
            coco = _pycocotools()
            rle = coco.merge(coco.frPyObjects(segmentation, height, width))
            masks[number] = coco.decode(rle).astype(bool)
    return masks


def encode_mask(mask: np.ndarray) -> dict:
    """Run lengths of a mask [H, W], not compressed."""
    height, width = mask.shape
    pixels = mask.T.reshape(-1).astype(bool)
    changes = np.flatnonzero(np.diff(np.concatenate([[False], pixels]))).tolist()
    counts = np.diff([0, *changes, pixels.size]).tolist()
    return {"size": [height, width], "counts": counts}


def _decompress(text: str, where: str) -> list[int]:
    """Counts of COCO's compressed RLE: five bits a character, differences from the third on."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 35:
            raise ValueError(f"{where} has run lengths that are not COCO's compressed text")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError(f"{where} has run lengths that end in the middle of a number")
    return counts


def are_numbers(values: object) -> bool:
    """Whether it is a list of finite numbers."""
    return isinstance(values, list) and all(
        type(value) in (int, float) and abs(value) < 1e9 and math.isfinite(value) for value in values
    )


def _short(value: object) -> str:
    return repr(value)[:60]


def _pycocotools() -> Any:
    try:
        from pycocotools import mask
    except ImportError:
        raise ShardError(
            'polygons require pycocotools, which is not installed; pip install "dmae-ds[dense]"'
        ) from None
    return mask
