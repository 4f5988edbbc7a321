"""data_prep/make.py: all images of a folder, unchanged, in an order that depends on the seed alone."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from data_prep import make as make_module
from data_prep.find import Listing, find_images
from data_prep.make import MakeOptions, make_shards
from dmae_ds.data.reader import SampleReader
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import ShardError
from tests.messages import refused


def make(src, dst, *, num_workers=1, max_skip=0, overwrite=False, samples_per_shard=5, **options):
    options = MakeOptions(samples_per_shard=samples_per_shard, **options)
    make_shards(src, dst, options, num_workers=num_workers, max_skip=max_skip, overwrite=overwrite)
    return ShardSet.open(dst, label="DST")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sources(folder):
    return [json.loads(line) for line in (folder / "sources.txt").read_text().splitlines()]


def test_every_image_is_in_the_shards_unchanged_with_its_class(src, tmp_path):
    shard_set = make(src, tmp_path / "dst")
    assert shard_set.classes == ["ant", "bee", "cat"]
    assert [shard.num_samples for shard in shard_set.shards] == [5, 5, 2]
    reader, names = SampleReader(shard_set), sources(tmp_path / "dst")
    assert len(set(names)) == 12
    for sample_id, name in enumerate(names):
        sample = reader.read(sample_id)
        assert sample.data == (src / name).read_bytes()
        assert shard_set.classes[sample.label] == name.split("/")[0]


def test_extension_and_size_come_from_the_content(src, tmp_path):
    shard_set = make(src, tmp_path / "dst")
    names = sources(tmp_path / "dst")
    places = [shard_set.locate(sample_id) for sample_id in range(12)]
    for number, (shard, row) in enumerate(places):
        record = shard_set.open_index(shard)[row]
        assert (record["width"], record["height"]) == (30, 20)
        tar = (shard_set.folder / shard_set.shards[shard].name).read_bytes()
        extension = "png" if "png" in names[number] else "jpg"
        header = tar[int(record["offset"]) - 512 :][:13]
        assert header == f"{number:09d}.{extension}".encode()


def test_more_shards_than_a_name_has_digits_are_refused(src, tmp_path, monkeypatch):
    monkeypatch.setattr(make_module, "MAX_SHARDS", 12)
    assert len(make(src, tmp_path / "all", samples_per_shard=1).shards) == 12
    monkeypatch.setattr(make_module, "MAX_SHARDS", 11)
    with refused("12 images", "11 shards", "--samples-per-shard", error=ShardError):
        make(src, tmp_path / "none", samples_per_shard=1)
    assert not (tmp_path / "none").exists()
    assert len(make(src, tmp_path / "two", samples_per_shard=2).shards) == 6


@pytest.mark.parametrize("max_skip", [0, 2])
def test_result_does_not_depend_on_the_number_of_workers(src, tmp_path, max_skip):
    for name in ("1.jpg", "2.jpg")[:max_skip]:
        (src / "bee" / name).write_bytes(b"no image")
    make(src, tmp_path / "one", samples_per_shard=2, max_skip=max_skip)
    make(src, tmp_path / "three", samples_per_shard=2, max_skip=max_skip, num_workers=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_the_order_depends_on_the_seed(src, tmp_path):
    sets = [make(src, tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    assert sets[0].fingerprint != sets[1].fingerprint
    assert sources(tmp_path / "0") != sources(tmp_path / "1")


def test_two_parts_are_the_whole_set_and_keep_its_classes(src, tmp_path):
    whole = sources(make(src, tmp_path / "all").folder)
    parts = {part: make(src, tmp_path / part, part=part) for part in ("train", "val")}
    held_out = sources(parts["val"].folder)
    assert len(held_out) == 1 and sorted([*held_out, *sources(parts["train"].folder)]) == sorted(whole)
    assert parts["train"].classes == parts["val"].classes == ["ant", "bee", "cat"]
    assert sources(make(src, tmp_path / "other", part="val", seed=1).folder) != held_out
    with refused("part", "'val'", "'train'", error=ShardError):
        make(src, tmp_path / "val", part="train")
    listing = Listing()
    for number in range(20_000):
        listing.add(b"%d" % number, -1)
    assert [len(listing.part(name, 0, src)) for name in ("train", "val")] == [19_000, 1000]
    with refused("1 image", "--part", error=ShardError):
        (lonely := Listing()).add(b"x", -1)
        lonely.part("val", 0, src)


def test_names_of_one_file_are_in_one_part(src, tmp_path):
    (src / "dog").symlink_to(src / "bee")
    for number in range(4):
        (src / "cat" / f"{number}.jpg").symlink_to(f"../ant/{number}.JPEG")
    (src / "ant" / "gone.jpg").symlink_to("nowhere")
    listing = find_images(src)
    for seed in range(20):
        parts = [listing.part(name, seed, src) for name in ("train", "val")]
        names = [[os.fsdecode(part.path(number)) for number in range(len(part))] for part in parts]
        assert len(names[0]) + len(names[1]) == len(listing) == 23
        files = [{(src / name).resolve() for name in part} for part in names]
        assert not files[0] & files[1] and names[1]
    chosen = tmp_path / "chosen.txt"
    chosen.write_text("".join(f"{name}\n" for name in sorted(names[0] + names[1])))
    assert len(listing.only(chosen).part("val", seed, src)) == len(names[1])
    with refused("2 images", "--part", error=ShardError):
        chosen.write_text("bee/0.jpg\ndog/0.jpg\n")
        listing.only(chosen).part("train", 0, src)


def test_unreadable_images_are_left_out_and_listed(src, tmp_path):
    dst = tmp_path / "dst"
    (src / "bee" / "1.jpg").write_bytes(b"")
    (src / "ant" / "2.JPEG").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(30))
    shard_set = make(src, dst, max_skip=2)
    assert shard_set.num_samples == 10
    skipped = [json.loads(line) for line in (dst / "skipped.jsonl").read_text().splitlines()]
    assert sorted(entry["source"] for entry in skipped) == ["ant/2.JPEG", "bee/1.jpg"]
    names, reader = sources(dst), SampleReader(shard_set)
    assert all(names[entry["number"]] == entry["source"] for entry in skipped)
    kept = [reader.read(sample_id) for sample_id in range(10)]  # a key stays the line of its source
    assert all(sample.data == (src / names[int(sample.key)]).read_bytes() for sample in kept)


def test_too_many_unreadable_images_leave_no_manifest(src, tmp_path):
    (src / "bee" / "1.jpg").write_bytes(b"no image")
    with refused("'bee/1.jpg'", "skipped.jsonl", "--max-skip", error=ShardError):
        make(src, tmp_path / "dst")
    assert not (tmp_path / "dst" / "manifest.json").exists()
    assert "bee/1.jpg" in (tmp_path / "dst" / "skipped.jsonl").read_text()


def test_a_set_of_nothing_but_unreadable_images_is_an_error(src, tmp_path):
    listing = find_images(src)
    for number in range(len(listing)):
        (src / listing.path(number).decode()).write_bytes(b"no image")
    with refused("12 files", "skipped.jsonl", error=ShardError):
        make(src, tmp_path / "dst", max_skip=100)


def test_clean_set_has_no_skipped_list(src, tmp_path):
    make(src, tmp_path / "dst")
    assert not (tmp_path / "dst" / "skipped.jsonl").exists()


def test_overwriting_removes_the_old_set_and_nothing_else(src, tmp_path):
    dst = tmp_path / "dst"
    make(src, dst, samples_per_shard=1)
    (dst / "notes.txt").write_text("mine")
    shard_set = make(src, dst, samples_per_shard=6, overwrite=True)
    expected = {"manifest.json", "sources.txt", "notes.txt"}
    expected |= {f"shard-00000{n}.{kind}" for n in range(2) for kind in ("tar", "index.npy")}
    assert set(contents(dst)) == expected
    assert shard_set.num_samples == 12


def test_file_names_cannot_leave_the_tar_or_the_line(src, tmp_path):
    odd = src / "bee" / "a\nb\udcff.jpg"
    (src / "bee" / "1.jpg").rename(odd)
    make(src, tmp_path / "dst")
    assert "bee/a\nb\udcff.jpg" in sources(tmp_path / "dst")
    assert len(sources(tmp_path / "dst")) == 12


def test_unusual_files_are_kept_or_skipped_by_the_stated_rules(src, tmp_path):
    good = (src / "bee" / "0.jpg").read_bytes()
    bee, far = src / "bee", tmp_path / "far.jpg"
    far.write_bytes(good)
    (bee / "linked.jpg").symlink_to(far)  # kept, like the next six
    (bee / "sub").mkdir()
    (bee / "sub" / "0.jpg").write_bytes(good)
    (bee / ("ü" * 120 + ".jpg")).write_bytes(good)
    (bee / "behind.jpg").write_bytes(good + bytes(100))
    pixels = np.zeros((9, 7, 4), np.uint8)
    Image.fromarray(pixels, "CMYK").save(bee / "cmyk.jpg", "JPEG")
    Image.fromarray(pixels[..., 0]).save(bee / "grey.jpg", "JPEG", progressive=True)
    (bee / "turned.JPE").write_bytes(good)
    bad = {
        "empty.jpg": (b"", "empty"),
        "cut.jpg": (good[:-30], "truncated"),
        "text.jpg": (b"no image", "not a JPEG or PNG image"),
        "bomb.jpg": (
            good[:163] + good[163:].replace(b"\0\x14\0\x1e\x03", b"\x86\xa0\x86\xa0\x03", 1),
            "34464x34464 pixels",
        ),
        "cut.png": ((src / "ant" / "x.png").read_bytes()[:-20], "truncated"),
    }
    for name, (data, _) in bad.items():
        (bee / name).write_bytes(data)
    (bee / "dangling.jpg").symlink_to(tmp_path / "none")
    (src / "cow").symlink_to(tmp_path / "unmounted")
    (bee / "more").symlink_to(tmp_path / "unmounted")
    (bee / "gone.txt").symlink_to(tmp_path / "unmounted")
    (bee / "self.jpg").symlink_to(bee / "self.jpg")
    os.mkfifo(bee / "pipe.jpg")
    (bee / "loop").symlink_to(bee)
    (src / "loose.jpg").write_bytes(good)
    with refused("12 files", "--max-skip 12 (now 1)", error=ShardError):
        make(src, tmp_path / "dst", max_skip=1)
    shard_set = make(src, tmp_path / "dst", max_skip=12)
    items = [json.loads(line) for line in (tmp_path / "dst" / "skipped.jsonl").open()]
    reasons = {item["source"]: item["reason"] for item in items}
    numbers = [item["number"] for item in items]
    numbered = [number for number in numbers if number is not None]
    assert numbered and numbers == sorted(numbered) + [None] * (len(numbers) - len(numbered))
    expected = {f"bee/{name}": reason for name, (_, reason) in bad.items()}
    expected |= {
        "bee/dangling.jpg": "No such file",
        "bee/self.jpg": "Too many levels",
        "bee/pipe.jpg": "not a regular file",
        "cow": "a link to nothing",
        "bee/more": "a link to nothing",
    }
    expected |= {"bee/loop": "a link to a folder", "loose.jpg": "outside of the class folders"}
    assert set(reasons) == set(expected)
    assert all(reasons[name].startswith(reason) for name, reason in expected.items()), reasons
    assert shard_set.num_samples == 12 + 7
    assert {"bee/linked.jpg", "bee/sub/0.jpg", "bee/" + "ü" * 120 + ".jpg"} <= set(sources(tmp_path / "dst"))


def test_full_verification_skips_what_cannot_be_decoded(src, tmp_path):
    path = src / "ant" / "x.png"
    data = path.read_bytes()
    path.write_bytes(data[:60] + bytes(8) + data[68:])  # in the compressed pixels: header and end are intact
    assert make(src, tmp_path / "header").num_samples == 12
    assert make(src, tmp_path / "full", verify="full", max_skip=1).num_samples == 11
    assert "ant/x.png" in (tmp_path / "full" / "skipped.jsonl").read_text()


def test_resized_images_are_small_and_upright(tmp_path):
    folder = tmp_path / "src" / "a"
    folder.mkdir(parents=True)
    ramp = np.zeros((60, 90, 3), np.uint8)
    ramp[:, :, 0] = np.arange(90) * 2  # red grows to the right
    exif = Image.Exif()
    exif[0x0112] = 6  # requires a rotation by 90 degrees clockwise
    Image.fromarray(ramp).save(folder / "0.jpg", quality=95, exif=exif)
    Image.fromarray(ramp[:20, :30]).save(folder / "1.jpg")
    shard_set = make(tmp_path / "src", tmp_path / "dst", resize=30)
    assert shard_set.images == "short side 30, JPEG quality 95"
    names, reader = sources(tmp_path / "dst"), SampleReader(shard_set)
    data = {name: reader.read(sample_id).data for sample_id, name in enumerate(names)}
    assert data["a/1.jpg"] == (folder / "1.jpg").read_bytes()
    rotated = Image.open(io.BytesIO(data["a/0.jpg"]))
    assert rotated.size == (30, 45) and 0x0112 not in rotated.getexif()
    red = np.asarray(rotated)[..., 0].astype(int)
    assert (np.diff(red.mean(axis=1)) > 0).mean() > 0.9  # now it grows downwards


def test_json_members_hold_the_source_of_a_sample(src, tmp_path):
    shard_set = make(src, tmp_path / "dst", json=True)
    with tarfile.open(shard_set.folder / "shard-000000.tar") as tar:
        members = tar.getmembers()
        assert [m.name.split(".")[1] for m in members[:3]][1:] == ["cls", "json"]
        meta = json.load(tar.extractfile(members[2]))
    assert meta["source"] == sources(shard_set.folder)[0] and meta["class"] == meta["source"].split("/")[0]
    assert (meta["width"], meta["height"]) == (30, 20)


def test_unlabelled_images_have_label_minus_one(src, tmp_path):
    shard_set = make(src / "ant", tmp_path / "dst", unlabelled=True)
    assert shard_set.classes == [] and shard_set.num_samples == 6
    assert shard_set.open_index(0)["label"].tolist() == [-1] * 5
