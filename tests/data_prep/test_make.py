"""data_prep/make.py: the images of a folder, every one, unchanged, in an order that only the seed decides."""

import json
import signal

import pytest

from data_prep import make as make_module
from data_prep.make import find_images, make_shards
from dmae_ds.data.reader import SampleReader
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import ShardError


def make(src, dst, **changes):
    settings = dict(samples_per_shard=5, num_workers=1, seed=0, max_skip=0, overwrite=False)
    make_shards(src, dst, **(settings | changes))
    return ShardSet.open(dst, label="DST")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sources(folder):
    return [json.loads(line) for line in (folder / "sources.txt").read_text().splitlines()]


def test_every_image_is_there_unchanged_with_its_class(src, tmp_path):
    shard_set = make(src, tmp_path / "dst")
    assert shard_set.classes == ["ant", "bee", "cat"]
    assert [shard.num_samples for shard in shard_set.shards] == [5, 5, 2]
    reader, names = SampleReader(shard_set), sources(tmp_path / "dst")
    assert sorted(names) == sorted(path for path, _ in find_images(src)[1])
    for sample_id, name in enumerate(names):
        sample = reader.read(sample_id)
        assert sample.data == (src / name).read_bytes()
        assert shard_set.classes[sample.label] == name.split("/")[0]


def test_other_entries_are_counted(src):
    classes, images, num_ignored = find_images(src)
    assert (len(classes), len(images), num_ignored) == (3, 12, 5)
    assert images == sorted(images)


def test_extension_and_size_come_from_the_content(src, tmp_path):
    shard_set = make(src, tmp_path / "dst")
    names = sources(tmp_path / "dst")
    row_of = [shard_set.locate(sample_id) for sample_id in range(12)]
    for number, (shard, row) in enumerate(row_of):
        record = shard_set.open_index(shard)[row]
        assert (record["width"], record["height"]) == (30, 20)
        tar = (shard_set.folder / shard_set.shards[shard].name).read_bytes()
        extension = "png" if "png" in names[number] else "jpg"
        header = tar[int(record["offset"]) - 512 :][:13]
        assert header == f"{number:09d}.{extension}".encode()


@pytest.mark.parametrize("max_skip", [0, 2])
def test_result_does_not_depend_on_the_number_of_workers(src, tmp_path, max_skip):
    for name in ("1.jpg", "2.jpg")[:max_skip]:
        (src / "bee" / name).write_bytes(b"no image")
    make(src, tmp_path / "one", samples_per_shard=2, max_skip=max_skip)
    make(src, tmp_path / "three", samples_per_shard=2, max_skip=max_skip, num_workers=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_seed_decides_the_order(src, tmp_path):
    sets = [make(src, tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    assert sets[0].fingerprint != sets[1].fingerprint
    assert sources(tmp_path / "0") != sources(tmp_path / "1")


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
    with pytest.raises(ShardError, match=r"first 'bee/1.jpg' \(not a JPEG or PNG image\).*skipped.jsonl.*--max-skip"):
        make(src, tmp_path / "dst")
    assert not (tmp_path / "dst" / "manifest.json").exists()
    assert "bee/1.jpg" in (tmp_path / "dst" / "skipped.jsonl").read_text()


def test_a_set_of_nothing_but_unreadable_images_is_an_error(src, tmp_path):
    for path, _ in find_images(src)[1]:
        (src / path).write_bytes(b"no image")
    with pytest.raises(ShardError, match="12 unreadable images"):
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


def interrupt_handler(job):
    return signal.getsignal(signal.SIGINT)


def test_workers_leave_interrupts_to_the_main_process(monkeypatch):
    """Else each idle worker prints a traceback at Ctrl-C."""
    monkeypatch.setattr(make_module, "write_job", interrupt_handler)
    assert list(make_module._run([None], 1)) == [signal.SIG_IGN]
