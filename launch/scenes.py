"""Write scenes of handwritten digits on textured backgrounds, in ADE20K's layout with COCO's boxes and masks.

    python launch/scenes.py OUT [--train 1000] [--val 200] [--seed 0]

    OUT/images/training/scene_training_00000001.jpg      64 to 96 px a side; some are grey
    OUT/annotations/training/scene_training_00000001.png 0: no class (rims of strokes), 1 to 5: classes
    OUT/instances_training.json                          COCO: boxes, masks (run lengths), crowds
    OUT/objectInfo.txt                                   names of the maps' classes, as ADE20K's objectInfo150

A scene has two of four textures and up to five of scikit-learn's scans, and some scenes have none. A
texture is a pattern that leans to a colour, under so much noise that the mean colour of a whole texture
tells its class 19 times of 20, that of a patch of 8 px 16 times. One in twenty scenes has a row of small
digits, a crowd. Later digits hide parts of earlier ones. Maps have one class for all digits, COCO's files
ten: a detector tells them apart after 500 steps, a segmenter with a class for each did not after 4,000. The
first 1,400 scans are for training and the last 397 for validation, as in launch/digits.py. Equal seeds give
equal files.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

NUM_TRAIN = 1400  # scans
TEXTURES = ("stripes", "checks", "grain", "waves")
# The colour each texture leans to; how far; how far a texture of a scene differs from that; contrast; noise.
# Chosen on training scenes of seed 0, a tenth held out: of six sets of textures, the first on which frozen
# features of MAE came to tell textures better than random weights do (from 1,000 steps of 16 scenes on).
TINTS = ((1.0, -0.5, -0.5), (-0.5, 1.0, -0.5), (-0.5, -0.5, 1.0), (0.5, 0.5, -1.0))
BRIGHTNESS, TINT, CAST, CONTRAST, NOISE = 0.3, 0.06, 0.04, 0.1, 0.25
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INK, RIM = 0.4, 0.15  # shares of full ink from which a pixel belongs to a digit, and from which to no class
MIN_VISIBLE = 12  # px of a digit that is mostly hidden; below, it is no object
SHARE_GREY, SHARE_EMPTY, SHARE_CROWD = 0.03, 0.03, 0.05


def texture(kind: str, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a dark, noisy texture: [height, width, 3], 1 is white; noise may leave the range."""
    y, x = np.mgrid[:height, :width].astype(float)
    angle, period = rng.uniform(0, np.pi), rng.uniform(5, 12)
    along = (np.cos(angle) * x + np.sin(angle) * y) / period
    across = (np.cos(angle) * y - np.sin(angle) * x) / period
    if kind == "stripes":
        share = along % 1 < 0.5
    elif kind == "checks":
        share = (along % 1 < 0.5) ^ (across % 1 < 0.5)
    elif kind == "grain":
        share = rng.random((height, width))
    else:
        share = 0.5 + 0.5 * np.sin(2 * np.pi * along + 1.5 * np.sin(4 * across))
    base = BRIGHTNESS + TINT * np.array(TINTS[TEXTURES.index(kind)]) + CAST * rng.uniform(-1, 1, 3)
    pattern = CONTRAST * (2 * np.asarray(share, float)[..., None] - 1)
    return base + pattern + NOISE * rng.normal(size=(height, width, 3))


def ink_of(scan: np.ndarray, side: int) -> np.ndarray:
    """Enlarge a scan [8, 8] of 0 to 16 to the ink [side, side], 0 to 1."""
    image = Image.fromarray((scan / 16).astype(np.float32))
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)).clip(0, 1)


def draw_background(height: int, width: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw two textures with a straight border: (image [H, W, 3], label map [H, W] from 1)."""
    y, x = np.mgrid[:height, :width].astype(float)
    angle = rng.uniform(0, 2 * np.pi)
    side = np.cos(angle) * (x - width / 2) + np.sin(angle) * (y - height / 2)
    is_first = side < rng.uniform(-0.25, 0.25) * min(width, height)
    first, second = rng.choice(len(TEXTURES), 2, replace=False)
    drawn = [texture(TEXTURES[kind], height, width, rng) for kind in (first, second)]
    image = np.where(is_first[..., None], *drawn)
    return image, np.where(is_first, first + 1, second + 1).astype(np.uint8)


def place(shape: tuple[int, int], label_map: np.ndarray, rng: np.random.Generator) -> tuple[slice, slice]:
    """Draw a window where few pixels belong to a digit; after ten tries any."""
    height, width = label_map.shape
    for _ in range(10):
        top = int(rng.integers(0, height - shape[0] + 1))
        left = int(rng.integers(0, width - shape[1] + 1))
        window = (slice(top, top + shape[0]), slice(left, left + shape[1]))
        if (label_map[window] > len(TEXTURES)).mean() < 0.1:
            break
    return window


def draw_digits(
    image: np.ndarray, label_map: np.ndarray, scans: np.ndarray, classes: np.ndarray, rng: np.random.Generator
) -> list[dict]:
    """Draw digits into a scene, and list them as {label, mask, iscrowd}; later ones hide earlier ones."""
    objects: list[dict] = []
    num_digits = 0 if rng.random() < SHARE_EMPTY else int(rng.integers(1, 6))
    groups = [(1, int(rng.integers(20, 37))) for _ in range(num_digits)]
    if rng.random() < SHARE_CROWD:
        groups.append((4, 12))
    for length, side in groups:
        number = int(rng.integers(len(scans)))
        ink = np.tile(ink_of(scans[number], side), (1, length))
        window = place(ink.shape, label_map, rng)
        colour = rng.uniform(0.6, 1, 3)
        image[window] += (colour - image[window]) * ink[..., None]
        mask = np.zeros(label_map.shape, bool)
        mask[window] = ink >= INK
        label_map[window][ink >= RIM] = 0
        label_map[mask] = len(TEXTURES) + 1
        hidden = np.zeros(label_map.shape, bool)
        hidden[window] = ink >= RIM
        for other in objects:
            other["mask"] &= ~hidden
        objects.append({"label": int(classes[number]), "mask": mask, "iscrowd": int(length > 1)})
    return [entry for entry in objects if entry["mask"].sum() >= MIN_VISIBLE]


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's run lengths by columns, not compressed."""
    pixels = np.concatenate([[False], mask.T.reshape(-1)])
    return np.diff([0, *np.flatnonzero(np.diff(pixels)).tolist(), mask.size]).tolist()


def describe(entry: dict, number: int, image_id: int) -> dict:
    """Describe an object as COCO does."""
    mask = entry["mask"]
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    return {
        "id": number,
        "image_id": image_id,
        "category_id": entry["label"] + 1,
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "area": int(mask.sum()),
        "iscrowd": entry["iscrowd"],
        "segmentation": {"size": list(mask.shape), "counts": run_lengths(mask)},
    }


def write_part(
    out: Path, part: str, num_scenes: int, scans: np.ndarray, classes: np.ndarray, seed: int
) -> None:
    """Write the scenes of one part, and its COCO file."""
    images, maps = out / "images" / part, out / "annotations" / part
    for folder in (images, maps):
        folder.mkdir(parents=True, exist_ok=True)
    coco: dict = {"images": [], "annotations": [], "categories": []}
    coco["categories"] = [{"id": number + 1, "name": name} for number, name in enumerate(DIGITS)]
    for number in range(1, num_scenes + 1):
        rng = np.random.default_rng([seed, len(part), number])
        height, width = (int(side) for side in rng.integers(64, 97, 2))
        image, label_map = draw_background(height, width, rng)
        objects = draw_digits(image, label_map, scans, classes, rng)
        name = f"scene_{part}_{number:08d}"
        picture = Image.fromarray((255 * image.clip(0, 1)).astype(np.uint8))
        picture = picture.convert("L") if rng.random() < SHARE_GREY else picture
        picture.save(images / f"{name}.jpg", quality=95)
        Image.fromarray(label_map).save(maps / f"{name}.png")
        coco["images"].append({"id": number, "file_name": f"{name}.jpg", "width": width, "height": height})
        for entry in objects:
            coco["annotations"].append(describe(entry, len(coco["annotations"]) + 1, number))
    (out / f"instances_{part}.json").write_text(json.dumps(coco))


def write_scenes(out: Path, num_scenes: dict[str, int], *, seed: int = 0) -> None:
    """Write both parts into the folder; existing files are overwritten.

    num_scenes: of `train` and of `val`
    """
    digits = load_digits()
    scans, classes = digits.images, digits.target
    write_part(out, "training", num_scenes["train"], scans[:NUM_TRAIN], classes[:NUM_TRAIN], seed)
    write_part(out, "validation", num_scenes["val"], scans[NUM_TRAIN:], classes[NUM_TRAIN:], seed)
    lines = ["Idx\tName", *(f"{number}\t{name}" for number, name in enumerate((*TEXTURES, "digit"), start=1))]
    (out / "objectInfo.txt").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Read the arguments, and write the scenes."""
    parser = argparse.ArgumentParser(description="Write scenes of handwritten digits with maps and boxes.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=1000, help="training scenes; default 1000")
    parser.add_argument("--val", type=int, default=200, help="validation scenes; default 200")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_scenes(args.out, {"train": args.train, "val": args.val}, seed=args.seed)
    print(f"{args.train} training and {args.val} validation scenes in {args.out}")


if __name__ == "__main__":
    main()
