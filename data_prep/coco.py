"""Read COCO's instances JSON for `make --coco`, and check that its parts fit together.

What would concern every image (an unknown category, an id that comes twice) is an error at once. What
concerns one image is found by the worker that converts it (`data_prep/annotations.py`), and skips that image.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmae_ds.data.shards import ShardError


@dataclass
class CocoFile:
    """A checked file; its images by file name."""

    classes: list[str]  # names of the categories, by their ids
    images: dict[str, dict]
    has_masks: bool
    sha256: str
    _annotations: dict[int, list[dict]] = field(default_factory=dict)  # by image id

    def line(self, name: str) -> str:
        """The entry of an image with its annotations, as one line of JSON."""
        image = self.images[name]
        annotations = self._annotations.get(image["id"], [])
        facts = {key: image[key] for key in ("width", "height")} | {"image_id": image["id"]}
        return json.dumps(facts | {"annotations": annotations})


def read_coco(path: Path) -> CocoFile:
    """Read the file. Raises ShardError for one that is not COCO's, or contradicts itself."""
    where = f"--coco '{path}'"
    try:
        data = path.read_bytes()
        content = json.loads(data)
    except OSError as error:
        raise ShardError(f"{where} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{where} is not JSON: {' '.join(str(error).split())[:100]}") from None
    digest = hashlib.sha256(data).hexdigest()
    del data
    lists = {}
    for key in ("images", "annotations", "categories"):
        lists[key] = content.get(key) if isinstance(content, dict) else None
        if not isinstance(lists[key], list):
            raise ShardError(
                f"{where} has no list {key!r}; expected COCO's instances: an object with the lists images, "
                f"annotations and categories"
            )
    categories = dict(_by_id(lists["categories"], "category", where, {"name": str}))
    if not categories:
        raise ShardError(f"{where} has no categories")
    numbers = sorted(categories)
    classes = [categories[number]["name"] for number in numbers]
    _refuse_twice(classes, f"{where}: the category name")
    images = dict(_by_id(lists["images"], "image", where, {"file_name": str, "width": int, "height": int}))
    _refuse_twice([image["file_name"] for image in images.values()], f"{where}: the file_name")
    label_of = {number: label for label, number in enumerate(numbers)}
    grouped: dict[int, list[dict]] = {}
    has_masks = False
    fields = {"image_id": int, "category_id": int}
    for number, annotation in _by_id(lists["annotations"], "annotation", where, fields):
        category = annotation["category_id"]
        if category not in label_of:
            raise ShardError(
                f"{where}: annotation {number} has category_id {category}, which is not one of its "
                f"{len(classes)} categories; correct or remove it"
            )
        if annotation["image_id"] not in images:
            raise ShardError(
                f"{where}: annotation {number} has image_id {annotation['image_id']}, which is not one of "
                f"its {len(images):,} images; correct or remove it"
            )
        has_masks = has_masks or bool(annotation.get("segmentation"))
        kept = {"id": number, "category_id": category, "label": label_of[category]}
        kept |= {
            key: annotation[key] for key in ("bbox", "area", "iscrowd", "segmentation") if key in annotation
        }
        grouped.setdefault(annotation["image_id"], []).append(kept)
    by_name = {image["file_name"]: image for image in images.values()}
    return CocoFile(classes, by_name, has_masks, digest, grouped)


def _by_id(entries: list, kind: str, where: str, expected: dict[str, type]) -> Iterator[tuple[int, dict]]:
    """Yield (id, entry). Raises ShardError for an id that comes twice, and for a missing or wrong field."""
    seen: set[Any] = set()
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ShardError(f"{where}: {kind} {place} is not an object")
        for key, kind_of_value in {"id": int, **expected}.items():
            if type(entry.get(key)) is not kind_of_value:
                value = "missing" if key not in entry else repr(entry[key])[:40]
                wanted = "a whole number" if kind_of_value is int else "a name"
                raise ShardError(
                    f"{where}: {kind} {entry.get('id', place)!r} has {key} {value}, expected {wanted}"
                )
        if entry["id"] in seen:
            raise ShardError(f"{where} has two {kind} entries with id {entry['id']}; ids must differ")
        seen.add(entry["id"])
        yield entry["id"], entry


def _refuse_twice(names: list[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ShardError(f"{what} {name!r} comes twice; names must differ")
        seen.add(name)
