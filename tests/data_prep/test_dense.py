"""`make --masks` and `--coco`: the layouts of ADE20K, VOC and COCO, their odd cases, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.cli import main
from data_prep.verify import verify_shards
from dmae_ds.data.shards import ShardError
from tests.data_prep.dense_sources import (
    annotation,
    by_source,
    coco_content,
    image_of,
    make_ade20k,
    make_coco,
    make_dense,
    make_voc,
    map_of,
    save,
)
from tests.messages import refused


def skipped(dst: Path) -> dict[str, str]:
    """Reasons by base name."""
    lines = (dst / "skipped.jsonl").read_text().splitlines()
    return {entry["source"].rpartition("/")[2]: entry["reason"] for entry in map(json.loads, lines)}


def test_ade20k_is_read_with_its_zero_as_no_class(tmp_path):
    root = make_ade20k(tmp_path / "ADEChallengeData2016")
    options = {"masks": root / "annotations" / "training", "classes": root / "objectInfo150.txt"}
    with refused("--zero-is-unlabelled", "--ignore-label", error=ShardError):
        make_dense(root / "images" / "training", tmp_path / "dst", **options)
    assert not (tmp_path / "dst").exists()
    dense = make_dense(root / "images" / "training", tmp_path / "dst", zero_is_unlabelled=True, **options)
    assert len(dense) == 4 and dense.has_maps and not dense.has_boxes
    assert len(dense.classes) == 150 and dense.classes[1] == "class 2, thing"
    for name, sample in by_source(dense).items():
        given = np.array(Image.open(root / "annotations" / "training" / f"{name}.png")).astype(int)
        assert (sample.label_map.numpy() == np.where(given == 0, 255, given - 1)).all()
        assert sample.image.shape[1:] == given.shape and sample.boxes is None
    verify_shards(tmp_path / "dst")


def test_voc_is_read_by_its_list_with_its_palette_and_void(tmp_path):
    root = make_voc(tmp_path / "VOC2012")
    options = {"masks": root / "SegmentationClass", "num_classes": 21}
    with refused("2 files", "no label map", "--max-skip 2", error=ShardError):
        make_dense(root / "JPEGImages", tmp_path / "all", **options)
    only = root / "ImageSets" / "Segmentation" / "train.txt"
    dense = make_dense(root / "JPEGImages", tmp_path / "dst", only=only, **options)
    samples = by_source(dense)
    assert set(samples) == {"2007_000001", "2007_000003"}
    for name, sample in samples.items():
        given = np.array(Image.open(root / "SegmentationClass" / f"{name}.png"))
        assert (sample.label_map.numpy() == given).all() and (given == 255).any()
    stored = (tmp_path / "dst" / "shard-000000.tar").read_bytes()
    assert b"PLTE" not in stored  # any reader gets numbers, not colours
    parts = [
        by_source(make_dense(root / "JPEGImages", tmp_path / part, only=only, part=part, **options))
        for part in ("train", "val")
    ]
    assert {name for part in parts for name in part} == set(samples) and len(parts[0]) == len(parts[1]) == 1
    only.write_text("2007_000001\n2007_000009\n")
    with refused("--only", "line 2", "2007_000009", error=ShardError):
        make_dense(root / "JPEGImages", tmp_path / "other", only=only, **options)


def test_coco_is_read_with_crowds_and_images_without_a_box(tmp_path, capsys):
    coco = make_coco(tmp_path)
    dense = make_dense(tmp_path / "train2017", tmp_path / "dst", coco=coco)
    assert dense.classes == dense.box_classes == ["person", "dog"]  # by their ids
    assert dense.has_masks and not dense.has_maps
    samples = by_source(dense)
    first, crowd, cut, empty = (samples[f"{number:012d}"] for number in (9, 25, 30, 34))
    assert first.boxes.tolist() == [[4, 5, 14, 17.5], [20, 1, 35, 9]] and first.labels.tolist() == [1, 0]
    assert first.masks[1].sum() == 15 * 8 and first.masks[1, 1:9, 20:35].all()
    assert crowd.crowd.tolist() == [True] and crowd.masks[0, :, 10:15].all() and crowd.masks.sum() == 44 * 5
    assert cut.boxes.tolist() == [[25, 20, 33, 27]]
    assert empty.boxes.shape == (0, 4) and empty.masks.shape == (0, 20, 52) and empty.label_map is None
    assert "1 boxes over the edge" in capsys.readouterr().out
    member = json.loads(read_member(tmp_path / "dst", "ann.json", 9, samples))
    assert member["image_id"] == 9 and member["annotations"][0]["id"] == 101
    assert member["annotations"][0]["segmentation"] == coco_content()["annotations"][0]["segmentation"]
    verify_shards(tmp_path / "dst")


def read_member(dst: Path, extension: str, number: int, samples: dict) -> bytes:
    import tarfile

    key = samples[f"{number:012d}"].key
    for path in dst.glob("*.tar"):
        with tarfile.open(path) as file:
            if f"{key}.{extension}" in file.getnames():
                return file.extractfile(f"{key}.{extension}").read()
    raise AssertionError(key)


def test_maps_and_boxes_may_be_given_together(tmp_path):
    coco = make_coco(tmp_path)
    for image in coco_content()["images"]:
        name = image["file_name"].replace("jpg", "png")
        save(map_of(image["width"], image["height"], 7, image["id"]), tmp_path / "stuff" / name)
    dense = make_dense(
        tmp_path / "train2017", tmp_path / "dst", coco=coco, masks=tmp_path / "stuff", num_classes=7
    )
    assert dense.has_maps and dense.has_boxes and len(dense.classes) == 7 and len(dense.box_classes) == 2
    assert all(sample.masks.shape[1:] == sample.label_map.shape for sample in by_source(dense).values())
    verify_shards(tmp_path / "dst")
    verify_shards(tmp_path / "dst", sample=0.5)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_smaller_images_take_their_maps_and_boxes_with_them(tmp_path, num_workers):
    """A white patch, its class, its box and its mask: at the same place of the stored image."""
    image, values = np.zeros((60, 90, 3), np.uint8), np.zeros((60, 90), np.uint8)
    image[12:36, 30:72], values[12:36, 30:72] = 255, 200
    save(Image.fromarray(image), tmp_path / "src" / "a.png")
    save(Image.fromarray(values), tmp_path / "maps" / "a.png")
    counts = np.diff([0, *np.flatnonzero(np.diff(np.r_[0, (values == 200).T.reshape(-1)])), 5400]).tolist()
    content = coco_content() | {
        "images": [{"id": 1, "file_name": "a.png", "width": 90, "height": 60}],
        "annotations": [
            annotation(1, 1, [30, 12, 42, 24]),
            annotation(2, 1, [30, 12, 42, 24], segmentation={"size": [60, 90], "counts": counts}),
            annotation(3, 1, [0, 0, 0.02, 4]),
        ],
    }
    coco = tmp_path / "coco.json"
    coco.write_text(json.dumps(content))
    options = {"coco": coco, "masks": tmp_path / "maps", "num_classes": 201}
    dense = make_dense(
        tmp_path / "src", tmp_path / "dst", resize=20, quality=95, num_workers=num_workers, **options
    )
    sample = dense[0]
    assert sample.image.shape == (3, 20, 30)
    expected = torch.zeros(20, 30, dtype=torch.bool)
    expected[4:12, 10:24] = True
    assert torch.equal(sample.label_map == 200, expected)
    assert (sample.label_map[~expected] == 0).all()  # no value between classes
    assert ((sample.image.float().mean(0) > 127) == expected).all()
    assert torch.equal(sample.masks, expected[None].expand(2, -1, -1)) and len(sample.labels) == 2
    assert sample.boxes.tolist() == [[10, 4, 24, 12]] * 2
    verify_shards(tmp_path / "dst")


def bad_maps(folder: Path) -> dict[str, tuple[str, ...]]:
    """Images with maps that cannot be used -> words of their reasons."""
    values = np.zeros((8, 10), np.uint8)
    maps = {
        "size.png": (Image.fromarray(values.T), ("8 x 10", "10 x 8")),
        "colour.png": (Image.new("RGB", (10, 8)), ("PNG RGB",)),
        "class.png": (Image.fromarray(values + 4), ("class 4", "0 to 3")),
        "good.png": (Image.fromarray(values + 3), ()),
        "void.png": (Image.fromarray(values + 255), ()),
    }
    for name, (label_map, _) in maps.items():
        save(image_of(10, 8), folder / "src" / name)
        save(label_map, folder / "maps" / name)
    for name, data in {"text.png": b"no image", "empty.png": b"", "cut.png": None}.items():
        save(image_of(10, 8), folder / "src" / name)
        path = save(map_of(200, 200, 4), folder / "maps" / name)
        path.write_bytes(path.read_bytes()[:-40] if data is None else data)
    save(image_of(10, 8), folder / "src" / "lonely.jpg")
    save(map_of(10, 8, 2), folder / "maps" / "orphan.png")
    words = {name: words for name, (_, words) in maps.items() if words}
    words |= {"text.png": ("label map",), "empty.png": ("empty",), "cut.png": ("truncated",)}
    return words | {"lonely.jpg": ("no label map",), "orphan.png": ("without an image",)}


def test_maps_that_cannot_be_used_are_skipped_with_reasons(tmp_path):
    expected = bad_maps(tmp_path)
    options = {"masks": tmp_path / "maps", "num_classes": 4}
    with refused(f"{len(expected)} files", "skipped.jsonl", error=ShardError):
        make_dense(tmp_path / "src", tmp_path / "dst", **options)
    dense = make_dense(tmp_path / "src", tmp_path / "dst", max_skip=len(expected), **options)
    assert len(dense) == 2
    reasons = skipped(tmp_path / "dst")
    assert set(reasons) == set(expected)
    assert len((tmp_path / "dst" / "skipped.jsonl").read_text().splitlines()) == len(expected)
    for name, words in expected.items():
        assert all(word in reasons[name] for word in words), reasons[name]
    verify_shards(tmp_path / "dst")


def test_sixteen_bits_and_other_void_values(tmp_path):
    wide = np.zeros((8, 10), np.uint16)
    wide[0], wide[1] = 299, 65535
    save(image_of(10, 8), tmp_path / "src" / "a.jpg")
    save(Image.fromarray(wide), tmp_path / "maps" / "a.png")
    dense = make_dense(tmp_path / "src", tmp_path / "dst", masks=tmp_path / "maps", num_classes=300)
    assert dense.ignore_index == 65535
    assert dense[0].label_map[:2, 0].tolist() == [299, 65535]
    save(Image.fromarray(np.minimum(wide, 9).astype(np.uint8)), tmp_path / "maps" / "a.png")
    dense = make_dense(
        tmp_path / "src", tmp_path / "few", masks=tmp_path / "maps", num_classes=3, ignore_label=9
    )
    assert dense[0].label_map[:3, 0].tolist() == [255, 255, 0]


def broken(**changes) -> dict:
    content = coco_content()
    for path, value in changes.items():
        name, _, number = path.partition("_")
        if number:
            content[name][int(number)] |= value
        else:
            content[name] = value
    return content


@pytest.mark.parametrize(
    "content, words",
    [
        ([], ("images", "annotations", "categories")),
        ({"images": []}, ("'annotations'",)),
        (broken(categories=[]), ("categories",)),
        (broken(annotations_0={"category_id": 3}), ("101", "category_id 3")),
        (broken(annotations_0={"image_id": 3}), ("101", "image_id 3")),
        (broken(annotations_1={"id": 101}), ("two", "101")),
        (broken(images_1={"id": 9}), ("two", "id 9")),
        (broken(images_1={"file_name": "000000000009.jpg"}), ("file_name", "000000000009.jpg")),
        (broken(categories_1={"name": "dog"}), ("category name", "dog")),
        (broken(images_0={"width": "40"}), ("width", "'40'")),
        (broken(annotations=[5]), ("annotation 0",)),
    ],
)
def test_a_coco_file_that_contradicts_itself_is_one_line(tmp_path, content, words):
    coco = make_coco(tmp_path, content)
    with refused("--coco", *words, error=ShardError):
        make_dense(tmp_path / "train2017", tmp_path / "dst", coco=coco)
    assert not (tmp_path / "dst").exists()


def test_annotations_that_cannot_be_used_skip_their_image_or_are_counted(tmp_path, capsys):
    cases = {
        9: ([annotation(1, 9, [50, 5, 10, 12])], ("annotation 1", "outside", "40 x 30")),
        25: ([annotation(2, 25, [1, 1, 4, 4], bbox=[1, 1, 4])], ("annotation 2", "four numbers")),
        30: ([annotation(3, 30, [1, 1, 4, 4], segmentation={"size": [9, 9], "counts": [81]})], ("[9, 9]",)),
    }
    fine = [
        annotation(4, 34, [1, 1, 4, 0], area=float("nan")),
        annotation(5, 34, [1, 1, 4, 4], segmentation=[]),
        annotation(6, 34, [1, 1, 4, 4], area=float("nan"), segmentation=[[1, 1, 2, 2], [1, 1, 5, 1, 5, 5]]),
    ]
    content = broken(annotations=[*fine, *(entry for entries, _ in cases.values() for entry in entries)])
    coco = make_coco(tmp_path, content)
    save(image_of(9, 9), tmp_path / "train2017" / "more.jpg")
    content["images"].append({"id": 77, "file_name": "missing\ud800.jpg", "width": 5, "height": 5})
    coco.write_text(json.dumps(content))
    dense = make_dense(tmp_path / "train2017", tmp_path / "dst", coco=coco, max_skip=5)
    reasons = skipped(tmp_path / "dst")
    for number, (_, words) in cases.items():
        assert all(word in reasons[f"{number:012d}.jpg"] for word in words), reasons
    assert "no image entry" in reasons["more.jpg"] and "SRC does not have" in reasons["missing\ud800.jpg"]
    assert len(dense) == 1 and len(dense[0].boxes) == 1 and dense[0].masks.any()
    assert b"NaN" not in (tmp_path / "dst" / "shard-000000.tar").read_bytes()
    printed = capsys.readouterr().out
    assert "1 boxes without an area" in printed and "1 objects without a mask" in printed


def test_boxes_alone_have_no_masks(tmp_path):
    content = coco_content()
    for entry in content["annotations"]:
        entry["segmentation"] = []
    dense = make_dense(tmp_path / "train2017", tmp_path / "dst", coco=make_coco(tmp_path, content))
    assert not dense.has_masks and dense[0].masks is None
    assert sum(len(dense[number].boxes) for number in range(4)) == 4


@pytest.mark.parametrize(
    "options, words",
    [
        (["--masks", "maps"], ("--classes", "--num-classes")),
        (["--masks", "nowhere", "--num-classes", "3"], ("--masks", "nowhere")),
        (["--masks", "empty", "--num-classes", "3"], ("empty", ".png")),
        (["--zero-is-unlabelled"], ("--zero-is-unlabelled", "--masks")),
        (["--coco", "coco.json", "--ignore-label", "3"], ("--ignore-label", "--masks")),
        (["--coco", "coco.json", "--classes", "names.txt"], ("--classes", "categories")),
        (["--coco", "nowhere.json"], ("--coco", "nowhere.json")),
        (["--masks", "src", "--num-classes", "3"], ("--masks", "inside SRC")),
        (["--masks", "maps", "--num-classes", "3", "--arrays"], ("--masks", "--arrays")),
        (["--masks", "maps", "--num-classes", "3", "--labels", "names.txt"], ("--masks", "--labels")),
    ],
)
def test_options_that_do_not_fit_are_one_line(tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    save(image_of(9, 9), Path("src/a.jpg"))
    save(map_of(9, 9, 2), Path("maps/a.png"))
    Path("empty").mkdir()
    Path("names.txt").write_text("a\n")
    Path("coco.json").write_text("{}")
    assert main(["make", "src", "dst", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error
    assert not Path("dst").exists()


def test_two_images_of_one_map_are_refused(tmp_path):
    save(image_of(9, 9), tmp_path / "src" / "a.jpg")
    save(image_of(9, 9), tmp_path / "src" / "a.png")
    save(map_of(9, 9, 2), tmp_path / "maps" / "a.png")
    with refused("a.jpg", "a.png", error=ShardError):
        make_dense(tmp_path / "src", tmp_path / "dst", masks=tmp_path / "maps", num_classes=2)


def test_a_map_may_end_in_large_letters(tmp_path):
    save(image_of(9, 9), tmp_path / "src" / "a.jpg")
    save(map_of(9, 9, 2), tmp_path / "maps" / "a.PNG")
    options = {"masks": tmp_path / "maps", "num_classes": 2}
    assert make_dense(tmp_path / "src", tmp_path / "dst", **options)[0].label_map.shape == (9, 9)
    save(map_of(9, 9, 2), tmp_path / "maps" / "a.png")
    with refused("a.png", "a.PNG", error=ShardError):
        make_dense(tmp_path / "src", tmp_path / "other", **options)
