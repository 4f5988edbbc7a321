"""Show the content of a shard folder as a table and, with --sheet, as an image: `dmae-shards info DST`.

The sheet of a dense set shows the classes of the map and the masks in colours over the image, and boxes as
frames; what has no class keeps its own colours, and frames of crowds are white.
"""

import io
import json
import random
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from data_prep.mean_std import mean_and_std
from dmae_ds.data.arrays import decode_array, is_array
from dmae_ds.data.dense_members import DenseInfo, decode_masks, read_annotations, read_map
from dmae_ds.data.pixels import to_rgb
from dmae_ds.data.reader import CorruptSample, SampleReader
from dmae_ds.data.shard_set import MANIFEST_BYTES, ShardSet
from dmae_ds.data.shards import MANIFEST, ShardError
from dmae_ds.output.units import GIB

COLUMNS, ROWS = 8, 6
TILE, CAPTION = 128, 16  # pixels
# of classes by their numbers, bright and far apart: each a step of the golden ratio around the colour circle
COLOURS = np.array(
    [ImageColor.getrgb(f"hsv({round(number * 137.508) % 360}, 80%, 100%)") for number in range(256)]
)


def print_info(
    dst: Path | str, *, sheet: Path | None = None, mean_std: bool = False, images: int = 2000
) -> None:
    """Print the table, and write the contact sheet.

    dst: a folder, or its URL as a str; mean_std: whether to read `images` images for their mean and std
    """
    shard_set = ShardSet.open(dst, label="DST")
    made = json.loads(shard_set.indexes.read_all(MANIFEST, limit=MANIFEST_BYTES))["made"] or {}
    rows = {
        "samples": f"{shard_set.num_samples:,}",
        "skipped": f"{made.get('num_skipped', 0):,}",
        "classes": f"{len(shard_set.classes):,}" if shard_set.classes else "unlabelled",
        **({} if shard_set.dense is None else {"dense": shard_set.dense.describe()}),
        "shards": f"{len(shard_set.shards):,}",
        "GiB": f"{sum(shard.bytes for shard in shard_set.shards) / GIB:.3f}",
        "images": shard_set.images,
        "tars": shard_set.base or "here",
        "made by": made.get("by", "unknown"),
        "seed": "none" if shard_set.seed is None else shard_set.seed,
        "fingerprint": shard_set.fingerprint,
    }
    for name, value in rows.items():
        print(f"{name:<12} {value}")
    if mean_std:
        mean, std, count = mean_and_std(shard_set, num_images=images)
        shown = [f"[{', '.join(f'{value:.4f}' for value in values)}]" for values in (mean, std)]
        print(f"{'mean, std':<12} data.mean='{shown[0]}' data.std='{shown[1]}' (of {count:,} images)")
    if sheet is not None:
        write_sheet(shard_set, sheet)
        print(f"{'sheet':<12} {sheet}")


def write_sheet(shard_set: ShardSet, path: Path) -> None:
    """Write a sheet of up to 48 images with their classes; the same images each time."""
    chosen = random.Random(0).sample(range(shard_set.num_samples), min(COLUMNS * ROWS, shard_set.num_samples))
    image = Image.new("RGB", (COLUMNS * TILE, ROWS * (TILE + CAPTION)), "white")
    draw, reader = ImageDraw.Draw(image), SampleReader(shard_set)
    for place, sample_id in enumerate(sorted(chosen)):
        shard, row = shard_set.locate(sample_id)
        label = int(shard_set.open_index(shard)[row]["label"])
        name = shard_set.classes[label] if 0 <= label < len(shard_set.classes) else str(label)
        left, top = place % COLUMNS * TILE, place // COLUMNS * (TILE + CAPTION)
        try:
            tile = _open(reader.read(sample_id).data)
            size = tile.size
            tile.thumbnail((TILE - 2, TILE - 2))
            if shard_set.dense is not None:
                members = reader.read_members(sample_id)
                tile = draw_members(tile, members, shard_set.dense, size=size)
                name = _name_objects(members, shard_set.dense, size=size)
            image.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
        except CorruptSample as error:
            draw.text((left + 2, top + TILE // 2), error.reason[:20], fill="red")
        except ShardError:
            raise
        except Exception as error:  # PIL's decoders raise nearly anything
            draw.text((left + 2, top + TILE // 2), type(error).__name__, fill="red")
        draw.text((left + 2, top + TILE + 2), name.encode("ascii", "replace").decode()[:20], fill="black")
    try:
        image.save(path)
    except (OSError, ValueError) as error:  # ValueError: PIL has no format for the suffix
        raise ShardError(f"--sheet '{path}' cannot be written: {error}") from None


def draw_members(
    tile: Image.Image, members: dict[str, bytes], info: DenseInfo, *, size: tuple[int, int]
) -> Image.Image:
    """Draw the map, the masks and the boxes of a sample over its shrunk image.

    size: width and height of the whole image. Raises ValueError for members that cannot be used
    """
    pixels = np.asarray(tile, np.float32).copy()
    if "seg" in members:
        label_map = read_map(members["seg"], len(info.map_classes))
        small = np.asarray(
            Image.fromarray(label_map.astype(np.int32)).resize(tile.size, Image.Resampling.NEAREST)
        )
        has_class = small != info.ignore_index
        pixels[has_class] = 0.5 * pixels[has_class] + 0.5 * COLOURS[small[has_class] % len(COLOURS)]
    if "ann" not in members:
        return Image.fromarray(pixels.astype(np.uint8))
    found = read_annotations(members["ann"], info, width=size[0], height=size[1])
    if info.has_masks and "seg" not in members:
        for mask, label in zip(
            decode_masks(found.segmentations, width=size[0], height=size[1]), found.labels, strict=True
        ):
            small = np.asarray(Image.fromarray(mask).resize(tile.size, Image.Resampling.NEAREST))
            pixels[small] = 0.5 * pixels[small] + 0.5 * COLOURS[label % len(COLOURS)]
    drawn = Image.fromarray(pixels.astype(np.uint8))
    scale = np.array([*tile.size, *tile.size]) / np.array([*size, *size])
    for box, label, is_crowd in zip(found.boxes, found.labels, found.crowd, strict=True):
        left, top, right, bottom = (box * scale).round().astype(int).tolist()
        colour = "white" if is_crowd else tuple(COLOURS[label % len(COLOURS)].tolist())
        corners = (left, top, max(left, right - 1), max(top, bottom - 1))
        ImageDraw.Draw(drawn).rectangle(corners, outline=colour)
    return drawn


def _name_objects(members: dict[str, bytes], info: DenseInfo, *, size: tuple[int, int]) -> str:
    """Classes of a sample's boxes, or of its map from the largest to the smallest."""
    if "ann" in members:
        labels = read_annotations(members["ann"], info, width=size[0], height=size[1]).labels
        names = info.box_classes
    else:
        values = read_map(members["seg"], len(info.map_classes))
        counts = np.bincount(values[values != info.ignore_index], minlength=1)
        labels = [label for label in np.argsort(-counts, kind="stable") if counts[label]]
        names = info.map_classes
    return ", ".join(names[label] for label in dict.fromkeys(labels)) or "nothing"


def _open(data: bytes) -> Image.Image:
    """The image as training sees it; of an array the first three channels, or the first one."""
    if is_array(data):
        values = decode_array(data, bits=8)
        return Image.fromarray(values[:, :, :3] if values.shape[2] >= 3 else values[:, :, 0]).convert("RGB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PIL, for images that training reads
        return to_rgb(Image.open(io.BytesIO(data), formats=("JPEG", "PNG")))
