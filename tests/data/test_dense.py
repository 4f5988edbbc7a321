"""dmae_ds/data/dense.py and dense_members.py: maps, boxes and masks as they were written."""

from __future__ import annotations

import io
import json
import pickle
import runpy
import struct
import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dmae_ds.data.dense import DenseInfo, open_dense
from dmae_ds.data.dense_members import (
    decode_masks,
    encode_mask,
    read_annotations,
    read_counts,
    read_map,
)
from dmae_ds.data.reader import CorruptSample
from dmae_ds.data.shards import NewSample, ShardError, write_manifest, write_shard
from tests.conftest import REPOSITORY
from tests.messages import refused

INFO = DenseInfo(map_classes=["sky", "sea"], box_classes=["ant", "bee"], has_masks=True)


def png(values: np.ndarray, mode: str | None = None) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values, mode).save(file, "PNG")
    return file.getvalue()


def small_png(row: bytes, *, width: int, bits: int) -> bytes:
    """A grey PNG of one row with less than 8 bits a pixel, which PIL does not write."""
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, 1, bits, 0, 0, 0, 0),
        b"IDAT": zlib.compress(b"\0" + row),
        b"IEND": b"",
    }
    packed = (struct.pack(">I", len(it)) + name + it for name, it in chunks.items())
    checked = (chunk + struct.pack(">I", zlib.crc32(chunk[4:])) for chunk in packed)
    return b"\x89PNG\r\n\x1a\n" + b"".join(checked)


def square(**changes) -> dict:
    """An annotation of a square of 4 px."""
    polygon = [2, 1, 6, 1, 6, 5, 2, 5]
    return {"bbox": [2, 1, 4, 4], "label": 1, "iscrowd": 0, "segmentation": [polygon]} | changes


def text(*annotations: object) -> bytes:
    return json.dumps({"annotations": annotations}).encode()


def test_samples_are_the_scenes_that_were_written(scenes):
    dense = open_dense(scenes / "train")
    assert (len(dense), dense.has_maps, dense.has_boxes, dense.has_masks) == (24, True, True, True)
    assert (
        dense.map_classes[:5] == ["stripes", "checks", "grain", "waves", "digit"] and len(dense.classes) == 5
    )
    assert len(dense.box_classes) == 10 and dense.ignore_index == 255
    names = [json.loads(line) for line in (scenes / "train" / "sources.txt").read_text().splitlines()]
    coco = json.loads((scenes / "src" / "instances_training.json").read_text())
    id_of = {image["file_name"]: image["id"] for image in coco["images"]}
    for number, name in enumerate(names):
        key, image, label_map, boxes, labels, masks, crowd = dense[number]
        assert key == dense.keys[number] == f"{number:09d}"
        drawn = np.array(Image.open(scenes / "src/images/training" / name).convert("RGB"))
        assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - drawn).max() <= 1
        given = np.array(Image.open(scenes / "src/annotations/training" / name.replace("jpg", "png")))
        assert (label_map.numpy() == np.where(given == 0, 255, given.astype(int) - 1)).all()
        entries = [entry for entry in coco["annotations"] if entry["image_id"] == id_of[name]]
        assert labels.tolist() == [entry["category_id"] - 1 for entry in entries]
        assert crowd.tolist() == [bool(entry["iscrowd"]) for entry in entries]
        for box, mask, entry in zip(boxes, masks, entries, strict=True):
            x, y, w, h = entry["bbox"]
            assert box.tolist() == [x, y, x + w, y + h] and int(mask.sum()) == entry["area"]
            rows, columns = torch.nonzero(mask, as_tuple=True)
            assert (int(columns.min()), int(rows.max()) + 1) == (x, y + h)
    assert len({dense.fingerprint, open_dense(scenes / "val").fingerprint}) == 2


def test_digits_of_training_and_validation_scenes_differ(tmp_path):
    """The two parts draw from the two parts of scikit-learn's scans, as launch/digits.py splits them."""
    module = runpy.run_path(str(REPOSITORY / "launch" / "scenes.py"))
    used = {}
    module["write_scenes"].__globals__["write_part"] = lambda out, part, *rest: used.update({part: rest})
    module["write_scenes"](tmp_path, {"train": 1, "val": 1})
    training, validation = (used[part][1] for part in ("training", "validation"))
    assert (len(training), len(validation)) == (1400, 397)
    assert (tmp_path / "objectInfo.txt").read_text().count("\n") == 6


def test_a_set_is_read_by_another_process(scenes):
    dense = open_dense(scenes / "val")
    again = pickle.loads(pickle.dumps(dense))
    assert all(torch.equal(a, b) for a, b in zip(dense[3][1:], again[3][1:], strict=True))
    assert dense[-1].key == dense.keys[-1]
    with pytest.raises(IndexError):
        dense[8]


def test_sets_without_maps_or_boxes_are_refused(digits):
    with refused("--masks", "--coco", str(digits / "val"), error=ShardError):
        open_dense(digits / "val")


def test_what_is_not_wanted_is_not_read(scenes, monkeypatch):
    maps = open_dense(scenes / "val", boxes=False)
    monkeypatch.setattr("dmae_ds.data.dense.read_annotations", None)
    assert maps[0].label_map is not None and maps[0].boxes is None and maps[0].masks is None
    assert (maps.has_maps, maps.has_boxes, maps.has_masks, len(maps.classes)) == (True, False, False, 5)
    monkeypatch.undo()
    boxes = open_dense(scenes / "val", maps=False)
    assert boxes[0].label_map is None and len(boxes.classes) == 10 and boxes.ignore_index == 255
    assert maps.fingerprint == boxes.fingerprint


def test_maps_of_every_kind_are_read():
    values = np.array([[0, 1, 255], [1, 0, 0]], np.uint8)
    expected = values.astype(np.int64)
    assert (read_map(png(values), 2) == expected).all()
    palette = Image.fromarray(values).convert("P")
    palette.putpalette([9] * 768)
    file = io.BytesIO()
    palette.save(file, "PNG")
    assert (read_map(file.getvalue(), 2) == np.array(palette)).all()
    for bits, row in {1: b"\x50", 2: b"\x1b", 4: b"\x01\x23"}.items():
        numbers = [0, 1, 0, 1] if bits == 1 else [0, 1, 2, 3]
        assert read_map(small_png(row, width=4, bits=bits), 4).tolist() == [numbers]
    wide = np.array([[299, 255, 65535]], np.uint16)
    assert read_map(png(wide), 300).tolist() == [[299, 255, 65535]]
    assert read_map(png(values), 300).tolist() == [[0, 1, 65535], [1, 0, 0]]
    for data, words in (
        (png(values), ("class 1", "0 to 0")),
        (png(np.zeros((2, 2, 3), np.uint8)), ("PNG RGB",)),
        (png(values)[:40], ("cannot be decoded",)),
    ):
        with refused("label map", *words, error=ValueError):
            read_map(data, 1)


def test_masks_are_pycocotools_masks():
    from pycocotools import mask as coco

    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (7, 5), (33, 64)):
        for share in (0.0, 0.2, 0.9, 1.0):
            mask = rng.random((height, width)) < share
            compressed = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
            compressed["counts"] = compressed["counts"].decode()
            given = [encode_mask(mask), json.loads(json.dumps(compressed))]
            assert (decode_masks(given, width=width, height=height) == mask).all()
            lengths = [read_counts(entry, "it", width=width, height=height) for entry in given]
            assert lengths[0] == lengths[1]
    polygons = [[2.0, 1, 6, 1, 6, 5, 2, 5], [0, 0, 3, 0, 3, 2.5]]
    expected = coco.decode(coco.merge(coco.frPyObjects(polygons, 8, 9)))
    assert (decode_masks([polygons], width=9, height=8)[0] == expected.astype(bool)).all()
    assert decode_masks([[polygons[0]]], width=9, height=8)[0, 1:5, 2:6].all()


def test_missing_pycocotools_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with refused("pycocotools", "dmae-ds[dense]"):
        decode_masks([[[0, 0, 3, 0, 3, 3]]], width=4, height=4)
    run_lengths = {"size": [4, 4], "counts": [16]}
    assert not decode_masks([run_lengths], width=4, height=4).any()


def test_good_annotations_are_read():
    crowd = square(iscrowd=1, segmentation={"size": [8, 9], "counts": [10, 2, 60]}, bbox=[0, 0, 9, 8])
    found = read_annotations(text(square(), crowd), INFO, width=9, height=8)
    assert found.boxes.tolist() == [[2, 1, 6, 5], [0, 0, 9, 8]] and found.boxes.dtype == np.float32
    assert found.labels.tolist() == [1, 1] and found.crowd.tolist() == [False, True]
    empty = read_annotations(text(), INFO, width=9, height=8)
    assert empty.boxes.shape == (0, 4) and empty.labels.shape == (0,)
    assert decode_masks(empty.segmentations, width=9, height=8).shape == (0, 8, 9)


@pytest.mark.parametrize(
    "annotation, words",
    [
        (5, ("expected an object",)),
        (square(bbox=[1, 2, 3]), ("bbox", "four numbers")),
        (square(bbox=[1, 2, 3, float("nan")]), ("bbox",)),
        (square(bbox=[2, 1, 0, 4]), ("bbox", "area")),
        (square(bbox=[2, 1, 8, 4]), ("outside", "9 x 8")),
        (square(label=2), ("label 2", "0 to 1")),
        (square(label=True), ("label True",)),
        (square(iscrowd=2), ("iscrowd 2",)),
        (square(segmentation=None), ("segmentation None",)),
        (square(segmentation=[[1, 1, 2, 2]]), ("polygon", "three points")),
        (square(segmentation=[[1, 1, 1e8, 2, 3, 3]]), ("far outside",)),
        (square(segmentation={"size": [9, 8], "counts": [72]}), ("[9, 8]", "[8, 9]")),
        (square(segmentation={"size": [8, 9], "counts": [71]}), ("71", "72")),
        (square(segmentation={"size": [8, 9], "counts": [-1, 73]}), ("whole numbers",)),
        (square(segmentation={"size": [8, 9], "counts": "\u00e9"}), ("compressed",)),
        (square(segmentation={"size": [8, 9], "counts": "o"}), ("middle of a number",)),
    ],
)
def test_bad_annotations_are_one_line(annotation, words):
    with refused("annotation 0", *words, error=ValueError):
        read_annotations(text(annotation), INFO, width=9, height=8)


def test_masks_that_fill_the_memory_are_refused():
    many = text(*[square()] * 40)
    assert len(read_annotations(many, INFO, width=7000, height=7000).labels) == 40
    with refused("44 objects", "7000 x 7000", error=ValueError):
        read_annotations(text(*[square()] * 44), INFO, width=7000, height=7000)


def test_bytes_that_are_no_annotations_are_one_line():
    for data in (b"", b"[]", b'{"annotations": {}}', b"[" * 5000):
        with refused("annotations", error=ValueError):
            read_annotations(data, INFO, width=9, height=8)


def write_set(folder, samples, info=INFO):
    folder.mkdir(exist_ok=True)
    shard = write_shard(folder, "shard-000000.tar", samples, dense=True)
    write_manifest(folder, classes=[], seed=0, shards=[shard], dense=info.entry())
    return open_dense(folder)


def sample(**members) -> NewSample:
    return NewSample(0, "png", png(np.zeros((8, 9, 3), np.uint8)), 9, 8, -1, **members)


def test_bad_members_are_corrupt_samples(tmp_path):
    label_map = png(np.zeros((8, 9), np.uint8))
    good = write_set(tmp_path / "good", [sample(seg=label_map, ann=text(square()))])
    assert good[0].masks.sum() == 16 and good[0].label_map.shape == (8, 9)
    for number, (members, words) in enumerate(
        (
            ({"ann": text()}, (".seg.png",)),
            ({"seg": label_map}, (".ann.json",)),
            ({"seg": png(np.zeros((9, 8), np.uint8)), "ann": text()}, ("8 x 9", "9 x 8")),
            ({"seg": label_map, "ann": text(square(label=7))}, ("label 7",)),
        )
    ):
        dense = write_set(tmp_path / str(number), [sample(**members)])
        with refused("000000000", *words, error=CorruptSample):
            dense[0]
    tar = tmp_path / "good" / "shard-000000.tar"
    data = tar.read_bytes()
    for member in (label_map, text(square())):
        at = data.index(member) + len(member) // 2
        tar.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with refused("000000000", "crc32", error=CorruptSample):
            open_dense(tmp_path / "good")[0]


def test_a_set_is_described_by_what_its_samples_have():
    maps, boxes = "label maps (2 classes)", "boxes with masks (2 classes)"
    assert INFO.describe() == f"{maps}, {boxes}"
    assert replace(INFO, box_classes=None, has_masks=False).describe() == maps
    assert replace(INFO, map_classes=None).describe() == boxes
    assert replace(INFO, map_classes=None, has_masks=False).describe() == "boxes (2 classes)"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"map_classes": "ab"}, ("map_classes",)),
        ({"map_classes": None, "box_classes": None}, ("neither",)),
        ({"has_masks": 1}, ("has_masks", "true or false")),
        ({"other": 1}, ("fields",)),
    ],
)
def test_a_wrong_manifest_is_one_line(tmp_path, changes, words):
    write_set(tmp_path, [sample(seg=png(np.zeros((8, 9), np.uint8)), ann=text())])
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["dense"] |= changes
    path.write_text(json.dumps(manifest))
    with refused("manifest.json", *words, error=ShardError):
        open_dense(tmp_path)
    manifest["dense"] = None
    path.write_text(json.dumps(manifest))
    with refused("fingerprint", error=ShardError):
        open_dense(tmp_path)
