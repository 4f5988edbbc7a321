"""`make`, `info` and `verify` with a URL: a bucket gets the files of the folder, also after a kill."""

import os
from types import SimpleNamespace

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry

from data_prep import target
from data_prep.cli import main
from data_prep.make import MakeOptions, make_shards
from dmae_ds.data import storage
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.train.summary import describe_reading
from tests.messages import refused

URL = "s3://bucket/sets/train"


class FolderBucket(LocalFileSystem):
    """A bucket whose objects are files of a folder; `root` is set by the fixture."""

    protocol = ("s3",)
    root = ""
    uploads_left = 10**9

    @classmethod
    def _strip_protocol(cls, path):
        path = str(path)
        return super()._strip_protocol(path.replace("s3://bucket", cls.root) if "://" in path else path)

    def put_file(self, lpath, rpath, **kwargs):
        if not FolderBucket.uploads_left:
            raise PermissionError("no more uploads")
        FolderBucket.uploads_left -= 1
        os.makedirs(os.path.dirname(self._strip_protocol(rpath)), exist_ok=True)
        super().put_file(lpath, self._strip_protocol(rpath), **kwargs)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder behind URL; workers are forked, and so have the file system too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FolderBucket, "root", str(tmp_path / "bucket"))
    monkeypatch.setattr(FolderBucket, "uploads_left", 10**9)
    (tmp_path / "bucket").mkdir()
    known = fsspec.registry.get("s3")
    fsspec.register_implementation("s3", FolderBucket, clobber=True)
    target.open_bucket.cache_clear()
    yield tmp_path / "bucket" / "sets" / "train"
    target.open_bucket.cache_clear()
    if known is None:
        _registry.pop("s3")
    else:
        fsspec.register_implementation("s3", known, clobber=True)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_bucket_gets_the_folder_that_a_path_gets(src, bucket, tmp_path, capsys):
    options = ["--samples-per-shard", "5", "--workers", "2"]
    for place in (URL, str(tmp_path / "local")):
        assert main(["make", str(src), place, *options]) == 0
    assert contents(bucket) == contents(tmp_path / "local")
    assert not list(tmp_path.glob("*.staging"))
    assert main(["make", str(src), URL, *options]) == 0  # already there
    assert main(["make", str(src), URL, "--seed", "1", *options]) == 2
    assert main(["info", URL, "--sheet", "sheet.png"]) == 0 and (tmp_path / "sheet.png").is_file()
    assert main(["verify", URL, "--workers", "1"]) == 0
    data = bytearray((bucket / "shard-000001.tar").read_bytes())
    data[600] ^= 1
    (bucket / "shard-000001.tar").write_bytes(data)
    assert main(["verify", URL, "--workers", "1"]) == 2
    assert "shard-000001.tar" in capsys.readouterr().out
    assert main(["make", str(src), URL, "--seed", "1", "--overwrite", *options]) == 0
    assert main(["verify", URL, "--workers", "1"]) == 0


def test_an_interrupted_upload_continues_and_has_no_manifest_before_its_end(
    src, bucket, tmp_path, monkeypatch
):
    options = MakeOptions(samples_per_shard=2)
    make_shards(src, tmp_path / "local", options)
    for number in (1, 3, 5):
        monkeypatch.setattr(FolderBucket, "uploads_left", number)
        with refused("permission denied", "AWS_ACCESS_KEY_ID"):
            make_shards(src, URL, options, staging=tmp_path / "staging")
        assert not bucket.exists() or "manifest.json" not in contents(bucket)
        assert (tmp_path / "staging" / "journal.jsonl").exists()
    monkeypatch.setattr(FolderBucket, "uploads_left", 10**9)
    make_shards(src, URL, options, staging=tmp_path / "staging")
    assert contents(bucket) == contents(tmp_path / "local")
    assert not (tmp_path / "staging").exists()


def test_shards_of_a_lost_staging_folder_and_places_that_cannot_be_written(src, bucket, tmp_path):
    make_shards(src, URL)
    (bucket / "manifest.json").unlink()
    with refused("shard-000000", "journal.jsonl", "--overwrite"):
        make_shards(src, URL)
    for place, word in (("http://host/x", "s3://"), ("hf://datasets/a/b", "gs://"), ("s3://bucket", "whole")):
        with refused(f"DST '{place}'", word):
            make_shards(src, place)
    with refused("--staging"):
        make_shards(src, tmp_path / "x", staging=tmp_path / "y")


def test_larger_reads_are_proposed_for_a_url_alone(src, bucket, tmp_path):
    make_shards(src, URL)
    make_shards(src, tmp_path / "local")
    for place, block, words in ((URL, 1, "data.block=16"), (URL, 16, ""), (tmp_path / "local", 1, "")):
        shard_set = ShardSet.open(place, label="data.train")
        config = SimpleNamespace(data=SimpleNamespace(block=block, cache_dir=None))
        text = describe_reading(SimpleNamespace(config=config, shards=shard_set))
        assert words in text and bool(text) == bool(words)


class NoCredentialsError(Exception):
    """As botocore's."""


def test_missing_credentials_are_said_at_once(bucket, monkeypatch, capsys):
    tried = []

    def refuse(self, path, **kwargs):
        tried.append(path)
        raise NoCredentialsError("Unable to locate credentials")

    monkeypatch.setattr(FolderBucket, "cat_file", refuse)
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.0)
    assert main(["info", URL]) == 2
    line = capsys.readouterr().err
    assert "AWS_ACCESS_KEY_ID" in line and "AWS_ENDPOINT_URL" in line and line.count("\n") == 1
    assert len(tried) == 1
