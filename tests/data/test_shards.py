"""dmae_ds/data/shards.py and shard_set.py: any reader can read the shards, and damage is refused."""

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
from tests.messages import refused


def change_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_set_knows_its_samples(shard_set):
    assert shard_set.num_samples == 23
    assert shard_set.classes == ["ant", "bee", "cat"]
    places = {0: (0, 0), 9: (0, 9), 10: (1, 0), 19: (1, 9), 20: (2, 0), 22: (2, 2)}
    assert {sample_id: shard_set.locate(sample_id) for sample_id in places} == places
    for sample_id in (-1, 23):
        with pytest.raises(IndexError):
            shard_set.locate(sample_id)


def test_an_empty_shard_is_skipped(shard_folder, make_sample):
    shards = [
        write_shard(shard_folder, f"shard-{n:06d}.tar", [make_sample(n)] if n == 1 else []) for n in range(3)
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


def test_equal_samples_give_equal_bytes(shard_folder, tmp_path, make_sample):
    samples = [make_sample(number) for number in (0, 1, 2, 3, 4, 6, 7, 8, 9, 10)]
    write_shard(tmp_path, "shard-000000.tar", samples)
    for name in ("shard-000000.tar", "shard-000000.index.npy"):
        assert (tmp_path / name).read_bytes() == (shard_folder / name).read_bytes()


@pytest.mark.parametrize("at_once", [0, 1, 511, 512, 700, 5_000])
def test_a_write_that_the_kernel_cuts_short_is_continued(tmp_path, make_sample, monkeypatch, at_once):
    samples = [make_sample(number) for number in (0, 1, 2)]
    samples[1] = samples[1]._replace(json=b'{"source": "x"}')
    whole = write_shard(tmp_path, "shard-000000.tar", samples)
    write, sizes = os.write, []

    def writev_short(descriptor, buffers):
        sizes.append(write(descriptor, b"".join(buffers)[:at_once]))
        return sizes[-1]

    monkeypatch.setattr(os, "writev", writev_short)
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:900]))
    (tmp_path / "short").mkdir()
    assert write_shard(tmp_path / "short", "shard-000000.tar", samples) == whole
    for name in ("shard-000000.tar", "shard-000000.index.npy"):
        assert (tmp_path / "short" / name).read_bytes() == (tmp_path / name).read_bytes()
    assert sizes == [at_once] * 3 or at_once == 5_000


def test_fingerprint_follows_content(shard_folder, shard_set, make_sample):
    shards = [write_shard(shard_folder, "shard-000000.tar", [make_sample(99)]), *shard_set.shards[1:]]
    assert compute_fingerprint(shard_set.classes, shard_set.shards) == shard_set.fingerprint
    assert compute_fingerprint(shard_set.classes, shards) != shard_set.fingerprint
    assert compute_fingerprint(["dog", "bee", "cat"], shard_set.shards) != shard_set.fingerprint


def test_missing_folder_says_what_to_do(tmp_path):
    words = ("data.train", f"'{tmp_path}/none'", "manifest.json", f"`dmae-shards make SRC {tmp_path}/none`")
    with refused(*words, error=ShardError):
        ShardSet.open(tmp_path / "none", label="data.train")


@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000002.index.npy"])
def test_missing_file_is_named(shard_folder, name):
    os.remove(shard_folder / name)
    with refused("data.train", name, "missing", error=ShardError):
        ShardSet.open(shard_folder, label="data.train")


def test_cut_shard_is_named(shard_folder):
    os.truncate(shard_folder / "shard-000001.tar", 512)
    with refused("shard-000001.tar", "512 bytes", "manifest.json", error=ShardError):
        ShardSet.open(shard_folder, label="data.train")


@pytest.mark.parametrize("text", [b"", b"\xff\xfe{", b"[]", b"null", b'"x"', b"{}", b"[" * 100_000])
def test_garbage_manifest_is_refused(shard_folder, text):
    (shard_folder / "manifest.json").write_bytes(text)
    with refused("data.train", "manifest.json", "dmae-shards make", error=ShardError):
        ShardSet.open(shard_folder, label="data.train")


SHARD = {"name": "shard-000000.tar", "num_samples": 10, "bytes": 1, "index_sha256": ""}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"version": 1}, ("version 1", "expected 2")),
        ({"classes": "ant"}, ("classes", "list")),
        ({"classes": [1]}, ("classes", "list")),
        ({"seed": True}, ("seed", "True")),
        ({"shards": {}}, ("shards", "list")),
        ({"shards": [7]}, ("shard 0", "fields")),
        ({"shards": [SHARD | {"more": 1}]}, ("shard 0", "fields")),
        ({"shards": [SHARD | {"name": "../shard-000000.tar"}]}, ("shard 0", "'../shard-000000.tar'")),
        ({"shards": [SHARD | {"name": "shard-000000.tar\n"}]}, ("shard 0", "NAME.tar")),
        ({"shards": [SHARD | {"name": 3}]}, ("shard 0", "3", "NAME.tar")),
        ({"shards": [SHARD | {"num_samples": -1}]}, ("num_samples", "shard-000000.tar")),
        ({"shards": [SHARD | {"bytes": 1.5}]}, ("bytes", "shard-000000.tar")),
        ({"shards": []}, ("no samples",)),
        ({"num_samples": 24}, ("num_samples", "24", "23")),
        ({"classes": ["dog", "bee", "cat"]}, ("fingerprint",)),
    ],
)
def test_a_wrong_manifest_is_refused(shard_folder, changes, words):
    change_manifest(shard_folder, **changes)
    with refused(*words, error=ShardError):
        ShardSet.open(shard_folder, label="data.train")


def test_a_file_that_is_not_an_index_is_refused(shard_set):
    path = shard_set.folder / "shard-000000.index.npy"
    for wrong in (np.zeros(10), np.zeros(9, RECORD), np.array([object()])):
        np.save(path, wrong)
        with refused("shard-000000.index.npy", error=ShardError):
            shard_set.open_index(0)
    path.write_bytes(b"garbage")
    with refused("shard-000000.index.npy", error=ShardError):
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
def test_the_header_of_an_index_is_compared_every_time(shard_set, change):
    """The checksum is compared only once; a file that changes later must not be mapped as other records."""
    path = shard_set.folder / "shard-000000.index.npy"
    shard_set.open_index(0)
    before = path.read_bytes()
    after = before.replace(*change, 1)
    assert len(after) == len(before) and after != before
    path.write_bytes(after)
    with refused("shard-000000.index.npy", "header", error=ShardError):
        shard_set.open_index(0)
