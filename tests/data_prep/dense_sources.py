"""Made-up images, label maps and COCO files in the layouts of ADE20K, VOC and COCO."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.dense import DenseOptions
from data_prep.make import MakeOptions, make_shards
from dmae_ds.data.dense import DenseSet, open_dense


def image_of(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def map_of(width: int, height: int, num_values: int, seed: int = 0) -> Image.Image:
    """A map of blocks with values 0 to num_values - 1."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, num_values, (3, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.NEAREST)


def save(image: Image.Image, path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def make_ade20k(root: Path) -> Path:
    """ADEChallengeData2016: four training images, one of them grey and one of odd size; 150 classes."""
    for number, (width, height, mode) in enumerate(
        ((40, 30, "RGB"), (30, 44, "L"), (33, 27, "RGB"), (52, 20, "RGB")), start=1
    ):
        name = f"training/ADE_train_{number:08d}"
        save(image_of(width, height, number, mode), root / "images" / f"{name}.jpg")
        save(map_of(width, height, 151, number), root / "annotations" / f"{name}.png")
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    lines += [f"{number}\t0.1\t9\t9\t0\tclass {number}, thing" for number in range(1, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(lines) + "\n")
    return root


def make_voc(root: Path) -> Path:
    """VOC2012: five images, three of them with a palette map; 255 is the void at borders."""
    palette = np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tolist()
    for number in range(1, 6):
        save(image_of(36, 28, number), root / "JPEGImages" / f"2007_{number:06d}.jpg")
        if number > 3:
            continue
        values = np.asarray(map_of(36, 28, 21, number)).copy()
        values[:, 10:12] = 255
        label_map = Image.fromarray(values)
        label_map.putpalette(palette)
        save(label_map, root / "SegmentationClass" / f"2007_{number:06d}.png")
    split = root / "ImageSets" / "Segmentation" / "train.txt"
    split.parent.mkdir(parents=True)
    split.write_text("2007_000001\n2007_000003\n")
    return root


def polygon(x: float, y: float, w: float, h: float) -> list[float]:
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def annotation(number: int, image_id: int, box: list, **changes) -> dict:
    entry = {"id": number, "image_id": image_id, "category_id": 18, "bbox": box, "area": box[2] * box[3]}
    return entry | {"iscrowd": 0, "segmentation": [polygon(*box)]} | changes


def coco_content() -> dict:
    """COCO's instances: ids with gaps, a crowd, an image without a box, a grey image, a box over the edge."""
    sizes = {9: (40, 30), 25: (30, 44), 30: (33, 27), 34: (52, 20)}
    images = [
        {"id": number, "file_name": f"{number:012d}.jpg", "width": width, "height": height}
        for number, (width, height) in sizes.items()
    ]
    crowd = {"size": [44, 30], "counts": [44 * 10, 44 * 5, 44 * 15]}
    annotations = [
        annotation(101, 9, [4, 5, 10, 12.5]),
        annotation(102, 9, [20, 1, 15, 8], category_id=1),
        annotation(103, 25, [10, 0, 5, 44], category_id=1, iscrowd=1, segmentation=crowd),
        annotation(104, 30, [25, 20, 8.02, 7.01]),
    ]
    categories = [{"id": 18, "name": "dog", "supercategory": "animal"}, {"id": 1, "name": "person"}]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def make_coco(root: Path, content: dict | None = None) -> Path:
    """COCO's train2017 and annotations/instances_train2017.json; returns the JSON file."""
    content = coco_content() if content is None else content
    for image in coco_content()["images"]:
        mode = "L" if image["id"] == 25 else "RGB"
        picture = image_of(image["width"], image["height"], image["id"], mode)
        save(picture, root / "train2017" / image["file_name"])
    path = root / "annotations" / "instances_train2017.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def make_dense(src: Path, dst: Path, *, max_skip: int = 0, num_workers: int = 1, **options) -> DenseSet:
    """Make a dense set; options of both kinds by name."""
    names = DenseOptions.__dataclass_fields__
    dense = DenseOptions(**{name: options.pop(name) for name in list(options) if name in names})
    samples_per_shard = options.pop("samples_per_shard", 3)
    plan = MakeOptions(samples_per_shard=samples_per_shard, dense=dense, **options)
    make_shards(src, dst, plan, max_skip=max_skip, num_workers=num_workers)
    return open_dense(dst)


def by_source(dense: DenseSet) -> dict[str, object]:
    """Samples of a set by the base names of their sources."""
    lines = (dense.shard_set.folder / "sources.txt").read_text().splitlines()
    names = [Path(json.loads(line)).stem for line in lines]
    return {names[int(key)]: dense[number] for number, key in enumerate(dense.keys)}
