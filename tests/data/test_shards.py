"""dmae_ds/data/shards.py: what is written can be read by anyone, and what is damaged is refused in one line."""

import hashlib
import json
import os
import tarfile

import numpy as np
import pytest

from dmae_ds.data.reader import SampleReader
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import (
    RECORD,
    ShardError,
    compute_fingerprint,
    list_files,
    write_manifest,
    write_shard,
)


def change_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_set_knows_its_samples(shard_set):
    assert shard_set.num_samples == 23
    assert shard_set.classes == ["ant", "bee", "cat"]
    assert [shard_set.locate(i) for i in (0, 9, 10, 19, 20, 22)] == [
        (0, 0),
        (0, 9),
        (1, 0),
        (1, 9),
        (2, 0),
        (2, 2),
    ]
    for sample_id in (-1, 23):
        with pytest.raises(IndexError):
            shard_set.locate(sample_id)


def test_empty_shard_is_stepped_over(shard_folder, make_picture):
    shards = [
        write_shard(shard_folder, f"shard-{n:06d}.tar", [make_picture(n)] if n == 1 else []) for n in range(3)
    ]
    write_manifest(shard_folder, classes=["ant"], seed=0, shards=shards)
    assert ShardSet.open(shard_folder, label="x").locate(0) == (1, 0)


def test_index_is_plain_numpy(shard_set):
    index = np.load(shard_set.folder / "shard-000000.index.npy", allow_pickle=False)
    assert index.dtype == RECORD
    assert index["number"].tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    sha256 = hashlib.sha256((shard_set.folder / "shard-000000.index.npy").read_bytes()).hexdigest()
    assert sha256 == shard_set.shards[0].index_sha256


def test_tarfile_reads_the_same_bytes_and_labels(shard_set):
    reader, sample_id = SampleReader(shard_set), 0
    for shard in shard_set.shards:
        assert shard.bytes % tarfile.RECORDSIZE == 0  # as tar itself pads
        with tarfile.open(shard_set.folder / shard.name, "r:") as tar:
            members = tar.getmembers()
            assert all((m.mtime, m.uid, m.gid) == (0, 0, 0) for m in members)
            for image, label in zip(members[::2], members[1::2], strict=True):
                sample = reader.read(sample_id)
                assert image.name.split(".")[0] == label.name.split(".")[0] == sample.key
                assert tar.extractfile(image).read() == sample.data
                assert int(tar.extractfile(label).read()) == sample.label
                sample_id += 1
    assert sample_id == shard_set.num_samples


def test_webdataset_reads_the_same_bytes_and_labels(shard_set):
    webdataset = pytest.importorskip("webdataset")
    urls = [str(shard_set.folder / shard.name) for shard in shard_set.shards]
    theirs = [
        (sample["__key__"], sample.get("jpg", sample.get("png")), int(sample["cls"]))
        for sample in webdataset.WebDataset(urls, shardshuffle=False)
    ]
    reader = SampleReader(shard_set)
    ours = [reader.read(sample_id) for sample_id in range(shard_set.num_samples)]
    assert theirs == [(sample.key, sample.data, sample.label) for sample in ours]


def test_equal_samples_give_equal_bytes(shard_folder, tmp_path, make_picture):
    samples = [make_picture(number) for number in (0, 1, 2, 3, 4, 6, 7, 8, 9, 10)]
    write_shard(tmp_path, "shard-000000.tar", samples)
    for name in ("shard-000000.tar", "shard-000000.index.npy"):
        assert (tmp_path / name).read_bytes() == (shard_folder / name).read_bytes()


def test_fingerprint_follows_content(shard_folder, shard_set, make_picture):
    shards = [write_shard(shard_folder, "shard-000000.tar", [make_picture(99)]), *shard_set.shards[1:]]
    assert compute_fingerprint(shard_set.classes, shard_set.shards) == shard_set.fingerprint
    assert compute_fingerprint(shard_set.classes, shards) != shard_set.fingerprint
    assert compute_fingerprint(["dog", "bee", "cat"], shard_set.shards) != shard_set.fingerprint


def test_missing_folder_says_what_to_do(tmp_path):
    with pytest.raises(ShardError) as caught:
        ShardSet.open(tmp_path / "none", label="data.train")
    assert str(caught.value) == (
        f"data.train '{tmp_path}/none' is not a shard folder: no manifest.json there; "
        f"make one with `dmae-shards make SRC {tmp_path}/none`"
    )


@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000002.index.npy"])
def test_missing_file_is_named(shard_folder, name):
    os.remove(shard_folder / name)
    with pytest.raises(ShardError, match=f"data.train .*{name} is missing"):
        ShardSet.open(shard_folder, label="data.train")


def test_cut_shard_is_named(shard_folder):
    os.truncate(shard_folder / "shard-000001.tar", 512)
    with pytest.raises(ShardError, match="shard-000001.tar has 512 bytes, manifest.json says"):
        ShardSet.open(shard_folder, label="data.train")


@pytest.mark.parametrize("text", [b"", b"\xff\xfe{", b"[]", b"null", b'"x"', b"{}", b"[" * 100_000])
def test_garbage_manifest_is_refused(shard_folder, text):
    (shard_folder / "manifest.json").write_bytes(text)
    with pytest.raises(ShardError, match="manifest.json is unusable: "):
        ShardSet.open(shard_folder, label="data.train")


SHARD = {"name": "shard-000000.tar", "num_samples": 10, "bytes": 1, "index_sha256": ""}


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"version": 1}, "found format version 1, expected 2"),
        ({"classes": "ant"}, "classes is not a list"),
        ({"classes": [1]}, "classes is not a list"),
        ({"seed": True}, "seed is True"),
        ({"shards": {}}, "shards is not a list"),
        ({"shards": [7]}, "shard 0 has not the fields"),
        ({"shards": [SHARD | {"more": 1}]}, "shard 0 has not the fields"),
        ({"shards": [SHARD | {"name": "../shard-000000.tar"}]}, "shard 0 is named '../shard-000000.tar'"),
        ({"shards": [SHARD | {"name": "shard-000000.tar\n"}]}, "shard 0 is named"),
        ({"shards": [SHARD | {"name": 3}]}, "shard 0 is named 3"),
        ({"shards": [SHARD | {"num_samples": -1}]}, "num_samples or bytes of shard-000000.tar"),
        ({"shards": [SHARD | {"bytes": 1.5}]}, "num_samples or bytes of shard-000000.tar"),
        ({"shards": []}, "it lists no samples"),
        ({"num_samples": 24}, "num_samples is 24, its shards hold 23"),
        ({"classes": ["dog", "bee", "cat"]}, "does not match its own fingerprint"),
    ],
)
def test_wrong_manifest_is_refused(shard_folder, changes, reason):
    change_manifest(shard_folder, **changes)
    with pytest.raises(ShardError) as caught:
        ShardSet.open(shard_folder, label="data.train")
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_foreign_index_is_refused(shard_set):
    path = shard_set.folder / "shard-000000.index.npy"
    for wrong in (np.zeros(10), np.zeros(9, RECORD), np.array([object()])):
        np.save(path, wrong)
        with pytest.raises(ShardError, match="shard-000000.index.npy"):
            shard_set.open_index(0)
    path.write_bytes(b"garbage")
    with pytest.raises(ShardError, match="shard-000000.index.npy"):
        shard_set.open_index(0)


def test_only_names_of_the_format_are_listed(shard_folder):
    for name in (
        "shard-1.tar",
        "notes.txt",
        "my-shard-000000.tar",
        "shard-000000.tar.bak",
        "shard-000009.tar.tmp",
    ):
        (shard_folder / name).touch()
    (shard_folder / "skipped.jsonl").mkdir()
    names = [path.name for path in list_files(shard_folder)]
    assert names[0] == "manifest.json"
    assert sorted(names[1:]) == sorted(
        [f"shard-00000{n}.{kind}" for n in range(3) for kind in ("tar", "index.npy")]
        + ["shard-000009.tar.tmp"]
    )


@pytest.mark.parametrize(
    "change",
    [
        (b"(10,)", b"(11,)"),
        (b"'<u8'", b"'|O8'"),
        (b"False", b"True "),
        (b"\x93NUMPY\x01", b"\x93NUMPY\x02"),
        (b"'crc32'", b"'crc33'"),
    ],
)
def test_an_index_s_header_is_compared_every_time(shard_set, change):
    """Its checksum is taken the first time only; a file that changes afterwards must not be mapped as something else."""
    path = shard_set.folder / "shard-000000.index.npy"
    shard_set.open_index(0)
    before = path.read_bytes()
    after = before.replace(*change, 1)
    assert len(after) == len(before) and after != before
    path.write_bytes(after)
    with pytest.raises(ShardError, match="the index cannot be read .*expected the .npy header"):
        shard_set.open_index(0)
