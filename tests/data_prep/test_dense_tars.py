"""index, verify, info, interruptions: what holds for labelled shards holds for maps and annotations."""

from __future__ import annotations

import io
import json
import random
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.cli import main
from data_prep.make import MakeOptions, make_shards
from data_prep.verify import verify_shards
from dmae_ds.data.dense import open_dense
from dmae_ds.data.shards import ShardError
from tests.data_prep.dense_sources import annotation, coco_content, image_of, make_dense, map_of, save
from tests.data_prep.test_resume import contents, kill_and_resume
from tests.messages import refused


def differ(one, other) -> bool:
    pairs = zip(one[1:], other[1:], strict=True)
    return any((a is None) != (b is None) or (a is not None and not bool((a == b).all())) for a, b in pairs)


@pytest.fixture
def names(scenes, tmp_path) -> list[str]:
    """Options of `index` for the scenes' classes."""
    (tmp_path / "maps.txt").write_bytes((scenes / "src" / "objectInfo.txt").read_bytes())
    (tmp_path / "boxes.txt").write_text("\n".join(open_dense(scenes / "val").box_classes))
    return ["--map-classes", str(tmp_path / "maps.txt"), "--box-classes", str(tmp_path / "boxes.txt")]


def test_tars_of_others_are_indexed_with_maps_and_annotations(scenes, tmp_path, names):
    tars = tmp_path / "tars"
    tars.mkdir()
    shutil.copy(scenes / "val" / "shard-000000.tar", tars)
    assert main(["index", str(tars), *names]) == 0
    ours, theirs = open_dense(scenes / "val"), open_dense(tars)
    assert theirs.info == ours.info and len(theirs) == len(ours)
    assert not any(differ(ours[number], theirs[number]) for number in range(len(ours)))
    for sample in ("100%", "50%"):
        assert main(["verify", str(tars), "--sample", sample]) == 0
    assert main(["index", str(tars), "--overwrite"]) == 0  # without the options as before: images alone
    with refused("label maps", error=ShardError):
        open_dense(tars)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def data_of(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def ann(*boxes: list, **changes) -> bytes:
    entries = [annotation(number, 1, box, label=1) | changes for number, box in enumerate(boxes)]
    return json.dumps({"annotations": entries}).encode()


def test_members_in_any_order_and_bad_ones_are_told(tmp_path, capsys):
    image, label_map = data_of(image_of(12, 9), "JPEG"), data_of(map_of(12, 9, 2))
    whole = {"seg.png": label_map, "ann.json": ann([1, 2, 3, 4]), "jpg": image, "cls": b"7"}
    cases = {
        "good": ({}, None),
        "size": ({"seg.png": data_of(map_of(9, 12, 2))}, "9 x 12"),
        "class": ({"seg.png": data_of(map_of(12, 9, 9))}, "its label map has class"),
        "outside": ({"ann.json": ann([1, 2, 30, 4])}, "outside"),
        "label": ({"ann.json": ann([1, 2, 3, 4], label=5)}, "label 5"),
        "text": ({"ann.json": b"{"}, "not JSON"),
        "void": ({"seg.png": b""}, ".seg.png is empty"),
    }
    members = {}
    for key, (changes, _) in cases.items():
        members |= {f"{key}.{extension}": data for extension, data in (whole | changes).items()}
    members |= {"lonely.jpg": image, "lonely.cls": b"1", "lonely.seg.png": label_map}
    write_tar(tmp_path / "tars" / "a.tar", members)
    (tmp_path / "names.txt").write_text("sky\nsea\n")
    options = ["--map-classes", str(tmp_path / "names.txt"), "--box-classes", str(tmp_path / "names.txt")]
    assert main(["index", str(tmp_path / "tars"), *options]) == 2
    assert f"--max-skip {len(cases)}" in capsys.readouterr().err
    assert main(["index", str(tmp_path / "tars"), *options, "--max-skip", str(len(cases))]) == 0
    dense = open_dense(tmp_path / "tars")
    assert len(dense) == 1 and dense[0].boxes.tolist() == [[1, 2, 4, 6]] and dense.has_masks
    assert dense.shard_set.open_index(0)["label"].tolist() == [7]
    lines = (tmp_path / "tars" / "skipped.jsonl").read_text().splitlines()
    reasons = {entry["source"].partition("/")[2]: entry["reason"] for entry in map(json.loads, lines)}
    expected = {key: word for key, (_, word) in cases.items() if word} | {"lonely": "no .ann.json"}
    assert set(reasons) == set(expected)
    assert all(expected[key] in reason for key, reason in reasons.items()), reasons
    verify_shards(tmp_path / "tars")


def test_masks_of_some_objects_alone_are_refused(tmp_path):
    members = {"a.jpg": data_of(image_of(12, 9), "JPEG"), "a.ann.json": ann([1, 2, 3, 4])}
    members |= {"b.jpg": members["a.jpg"], "b.ann.json": ann([1, 2, 3, 4], segmentation=None)}
    write_tar(tmp_path / "tars" / "a.tar", members)
    (tmp_path / "names.txt").write_text("sky\nsea\n")
    from data_prep.index import index_tars

    options = {"dst": None, "image": None, "label": None, "classes": None}
    options |= {"workers": 1, "max_skip": 0, "overwrite": False}
    with refused("1 of 2 objects", error=ShardError):
        index_tars(str(tmp_path / "tars"), box_classes=tmp_path / "names.txt", **options)
    assert not (tmp_path / "tars" / "manifest.json").exists()


@pytest.mark.parametrize("extension", ["seg.png", "ann.json"])
def test_changed_bytes_of_a_member_are_found(scenes, tmp_path, extension):
    folder = tmp_path / "val"
    shutil.copytree(scenes / "val", folder)
    tar = folder / "shard-000000.tar"
    with tarfile.open(tar) as file:
        member = file.getmember(f"000000003.{extension}")
    data = bytearray(tar.read_bytes())
    data[member.offset_data + member.size // 2] ^= 16
    tar.write_bytes(data)
    for sample in (1.0, 0.99):
        with refused("differs", "1 places", error=ShardError):
            verify_shards(folder, sample=sample)


def test_info_shows_classes_and_a_sheet_with_maps_and_boxes(scenes, tmp_path, capsys, monkeypatch):
    sheet = tmp_path / "sheet.png"
    assert main(["info", str(scenes / "train"), "--sheet", str(sheet)]) == 0
    printed = capsys.readouterr().out
    assert "label maps (5 classes), boxes with masks (10 classes)" in printed
    pixels = np.asarray(Image.open(sheet).convert("HSV"))
    assert (pixels[..., 1] > 100).mean() > 0.1  # scenes are dark; the colours of classes are not
    coco = coco_content()
    for entry in coco["images"]:
        picture = Image.new("RGB", (entry["width"], entry["height"]), "black")
        save(picture, tmp_path / "src" / entry["file_name"])
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    make_dense(tmp_path / "src", tmp_path / "boxes", coco=tmp_path / "coco.json")
    assert main(["info", str(tmp_path / "boxes"), "--sheet", str(sheet)]) == 0
    pixels = np.asarray(Image.open(sheet).convert("HSV"))
    coloured = (pixels[..., 1] > 100) & (pixels[..., 2] > 60)
    assert 0 < coloured.mean() < 0.1
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    capsys.readouterr()
    assert main(["info", str(tmp_path / "boxes"), "--sheet", str(sheet)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "dmae-ds[dense]" in error


DENSE = ["--masks", "maps", "--num-classes", "6", "--coco", "coco.json", "--resize", "20"]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Sources of 400 small images with maps and boxes, three of them unusable, and their conversion."""
    folder = tmp_path_factory.mktemp("many")
    content = coco_content() | {"images": [], "annotations": []}
    for number in range(400):
        save(image_of(32, 24, number), folder / "src" / f"{number}.jpg")
        save(map_of(32, 24, 6, number), folder / "maps" / f"{number}.png")
        name = {"file_name": f"{number}.jpg", "width": 32, "height": 24}
        content["images"].append({"id": number, **name})
        content["annotations"] += [annotation(number, number, [number % 20, 3, 9, 11])] * (number % 3 > 0)
    (folder / "maps" / "150.png").write_bytes(b"")
    (folder / "maps" / "151.png").unlink()
    content["annotations"][2]["bbox"] = [50, 3, 9, 11]
    (folder / "coco.json").write_text(json.dumps(content))
    options = {"masks": folder / "maps", "coco": folder / "coco.json", "num_classes": 6, "resize": 20}
    make_dense(folder / "src", folder / "whole", max_skip=9, samples_per_shard=4, **options)
    return folder


def absolute(folder: Path) -> list[str]:
    return [str(folder / word) if word in ("maps", "coco.json") else word for word in DENSE]


def test_a_killed_run_gives_the_shards_of_an_uninterrupted_one(many, tmp_path):
    """With other numbers of workers, too: kill_and_resume draws them."""
    rng, reached = random.Random(2), None
    for number in range(3):  # until a kill came in the middle
        dst = tmp_path / str(number)
        reached = kill_and_resume(many, dst, rng, *absolute(many))
        if reached is not None and 0 < reached < 100:
            break
    assert 0 < reached < 100
    verify_shards(dst)
    assert not list(dst.glob("annotations*"))


@pytest.mark.slow
def test_a_hundred_killed_runs_give_the_shards_of_uninterrupted_ones(many, tmp_path):
    rng, reached = random.Random(3), []
    for _ in range(100):
        reached.append(kill_and_resume(many, tmp_path / "dst", rng, *absolute(many)))
        verify_shards(tmp_path / "dst")
        shutil.rmtree(tmp_path / "dst")
    print(sorted(-1 if number is None else number for number in reached))
    assert sum(0 < (number or 0) < 100 for number in reached) > 50


def test_changed_maps_annotations_and_options_are_refused(many, tmp_path):
    for name in ("src", "maps"):
        shutil.copytree(many / name, tmp_path / name)
    coco = json.loads((many / "coco.json").read_text())
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    options = {"masks": tmp_path / "maps", "coco": tmp_path / "coco.json", "num_classes": 6}
    options |= {"max_skip": 9, "samples_per_shard": 100}
    dst = tmp_path / "dst"
    make_dense(tmp_path / "src", dst, **options)
    before = contents(dst)
    for changes, words in (
        ({"num_classes": 7}, ("dense",)),
        ({"exif": "stored"}, ("exif", "None", "'stored'")),
        ({"ignore_label": 5}, ("ignore_label", "5")),
        ({"masks": None, "num_classes": None}, ("dense",)),
    ):
        with refused("DST", "finished", *words, "--overwrite", error=ShardError):
            make_dense(tmp_path / "src", dst, **(options | changes))
    (tmp_path / "coco.json").write_text(json.dumps(coco, indent=1))
    with refused("coco_sha256", "--overwrite", error=ShardError):
        make_dense(tmp_path / "src", dst, **options)
    assert contents(dst) == before
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    with refused("dense", "--overwrite", error=ShardError):
        make_shards(tmp_path / "src", dst, MakeOptions(samples_per_shard=100, unlabelled=True), max_skip=9)
    assert contents(dst) == before
    make_dense(tmp_path / "src", dst, **options)  # finished: nothing to do
    assert contents(dst) == before


def test_a_changed_map_of_an_unfinished_set_is_refused(many, tmp_path):
    for name in ("src", "maps"):
        shutil.copytree(many / name, tmp_path / name)
    shutil.copy(many / "coco.json", tmp_path)
    options = {"masks": tmp_path / "maps", "coco": tmp_path / "coco.json", "num_classes": 6}
    with refused("--max-skip", error=ShardError):  # unfinished, with all shards in its journal
        make_dense(tmp_path / "src", tmp_path / "dst", samples_per_shard=100, **options)
    save(map_of(32, 24, 2, 9), tmp_path / "maps" / "7.png")
    with refused("changed", "--overwrite", error=ShardError):
        make_dense(tmp_path / "src", tmp_path / "dst", samples_per_shard=100, max_skip=9, **options)
    assert not (tmp_path / "dst" / "manifest.json").exists()
