"""dmae_ds/data/storage.py and cache.py: a URL gives the same samples as a folder, also over a bad network."""

import os
import resource
from contextlib import contextmanager

import fsspec
import pytest
import torch

from dmae_ds.data import storage as storage_module
from dmae_ds.data.cache import CHUNK_BYTES, FOLDER, make_cache
from dmae_ds.data.reader import SampleReader
from dmae_ds.data.refusals import describe_refusal
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import ShardError
from dmae_ds.data.storage import Access
from tests.data.batches import train
from tests.data.flaky_server import serve
from tests.messages import refused
from tests.train.conftest import free_port

pytest.importorskip("aiohttp", reason="http:// is read with aiohttp: dmae-ds[remote]")

QUICK = Access(retries=12, timeout_s=2.0)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(storage_module, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(storage_module, "LONGEST_WAIT_S", 0.05)


def batches(shard_set, *, num_steps, **settings):
    return list(train(shard_set, stop_step=num_steps, **settings))


def cached_bytes(folder):
    return sum(
        path.stat().st_size
        for path in (folder / FOLDER).rglob("*")
        if path.is_file() and path.name != "usage"
    )


@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_from_a_url_are_those_of_the_folder(shard_folder, shard_set, block, num_workers):
    with serve(shard_folder) as server:
        remote = ShardSet.open(server.url, label="data.train", access=QUICK)
        assert remote.fingerprint == shard_set.fingerprint
        ours, theirs = (
            batches(each, num_steps=3, block=block, num_workers=num_workers) for each in (remote, shard_set)
        )
    for a, b in zip(ours, theirs, strict=True):
        assert a.more_views == b.more_views == ()
        assert all(
            torch.equal(getattr(a, name), getattr(b, name))
            for name in ("images", "noise", "labels", "sample_ids", "epochs")
        )


@pytest.mark.parametrize("block, cached", [(1, False), (16, True)])
def test_three_epochs_over_a_bad_network(shard_folder, tmp_path, block, cached):
    """If a quarter of the requests fail, every sample comes once an epoch; memory and cache are bounded."""
    limit = 60_000  # about half of the tars
    access = Access(
        retries=12, timeout_s=0.5, cache_dir=tmp_path / "cache" if cached else None, cache_gib=limit / 2**30
    )
    with serve(shard_folder, seed=1, trouble=0.25, stall_s=1.0) as server:
        shard_set = ShardSet.open(server.url, label="data.train", access=access)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # 72 places: three epochs of 23, and 3 of the fourth
        read = batches(shard_set, num_steps=9, block=block)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10  # KiB
        assert sum(server.count[kind] for kind in ("503", "drop", "cut", "stall")) > 3
    seen = sorted(
        (epoch, sample_id)
        for batch in read
        for epoch, sample_id in zip(batch.epochs.tolist(), batch.sample_ids.tolist(), strict=True)
    )
    assert [pair for pair in seen if pair[0] < 3] == [
        (epoch, sample_id) for epoch in range(3) for sample_id in range(23)
    ]
    if cached:
        assert 0 < cached_bytes(tmp_path / "cache") <= limit
        assert not list((tmp_path / "cache").rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block", [1, 16])
def test_three_epochs_over_a_worse_network_with_workers_and_ranks(shard_folder, tmp_path, seed, block):
    access = Access(retries=20, timeout_s=0.5, cache_dir=tmp_path / "cache", cache_gib=60_000 / 2**30)
    seen = []
    with serve(shard_folder, seed=seed, trouble=0.3, stall_s=1.0) as server:
        shard_set = ShardSet.open(server.url, label="data.train", access=access)
        for rank in range(2):
            for batch in batches(shard_set, num_steps=9, block=block, num_workers=2, world_size=2, rank=rank):
                seen += zip(batch.epochs.tolist(), batch.sample_ids.tolist(), strict=True)
    assert sorted(pair for pair in seen if pair[0] < 3) == [
        (epoch, sample_id) for epoch in range(3) for sample_id in range(23)
    ]
    assert cached_bytes(tmp_path / "cache") <= 60_000


def test_a_second_epoch_comes_from_the_cache(shard_folder, tmp_path):
    access = Access(retries=0, timeout_s=5, cache_dir=tmp_path, cache_gib=1)
    with serve(shard_folder) as server:
        first = batches(ShardSet.open(server.url, label="data.train", access=access), num_steps=6)
        requests = server.count["requests"]
        again = batches(ShardSet.open(server.url, label="data.train", access=access), num_steps=6)
        assert server.count["requests"] - requests <= 1 + 6 + 3  # manifest, six sizes, three indexes; no tar
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, again, strict=True))


def test_a_damaged_chunk_of_the_cache_is_fetched_again(shard_folder, tmp_path):
    access = Access(retries=0, timeout_s=5, cache_dir=tmp_path, cache_gib=1)
    with serve(shard_folder) as server:
        shard_set = ShardSet.open(server.url, label="data.train", access=access)
        expected = SampleReader(shard_set).read(3).data
        (chunk,) = [path for path in (tmp_path / FOLDER).rglob("0") if path.is_file()]
        chunk.write_bytes(bytes(chunk.stat().st_size))
        assert SampleReader(shard_set).read(3).data == expected
        chunk.write_bytes(b"cut")
        assert SampleReader(shard_set).read(3).data == expected


def test_the_cache_keeps_what_it_has_and_other_data_sets_make_room(tmp_path):
    limit = 4 * CHUNK_BYTES
    data = os.urandom(8 * CHUNK_BYTES + 5)
    for fingerprint in ("a" * 64, "b" * 64):
        cache = make_cache(tmp_path, fingerprint, limit_bytes=limit)
        for offset, size in ((0, 10), (CHUNK_BYTES - 3, 7), (0, len(data)), (len(data) - 2, 2)):
            got = cache.read(
                "x.tar",
                offset,
                size,
                file_size=len(data),
                fetch=lambda start, count: data[start : start + count],
            )
            assert got == data[offset : offset + size]
        assert 0 < cached_bytes(tmp_path) <= limit
    assert [path.name for path in (tmp_path / FOLDER).iterdir() if path.is_dir()] == ["b" * 16]
    (tmp_path / "other").mkdir()
    make_cache(tmp_path, "c" * 64, limit_bytes=1)
    assert (tmp_path / "other").is_dir()  # other folders stay


@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000002.index.npy"])
def test_a_missing_or_cut_shard_behind_a_url_is_found_at_the_start(shard_folder, name):
    with serve(shard_folder) as server:
        os.rename(shard_folder / name, shard_folder / "away")
        with refused("data.train", name, "missing", error=ShardError):
            ShardSet.open(server.url, label="data.train", access=QUICK)
        os.rename(shard_folder / "away", shard_folder / name)
        os.truncate(shard_folder / "shard-000000.tar", 512)
        with refused("shard-000000.tar", "512 bytes", "manifest.json", error=ShardError):
            ShardSet.open(server.url, label="data.train", access=QUICK)


def test_a_server_that_does_not_answer_is_one_line(shard_folder):
    access = Access(retries=2, timeout_s=0.2)
    with serve(shard_folder, stall_s=1.0) as server:
        shard_set = ShardSet.open(server.url, label="data.train", access=access)
        with refused("data.train", "/nowhere", "manifest.json", error=ShardError):
            ShardSet.open(server.url + "/nowhere", label="data.train", access=access)
        server.trouble = 1.0
        with refused("3 tries", "data.retries", "data.timeout_s", error=ShardError):
            SampleReader(shard_set).read(0)
    with refused("data.train 'ftp://x'", "ftp://", "http, https, s3, gs, hf", error=ShardError):
        ShardSet.open("ftp://x", label="data.train")


def test_an_index_with_another_checksum_is_refused(shard_folder):
    path = shard_folder / "shard-000000.index.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # a label
    path.write_bytes(data)
    with serve(shard_folder) as server:
        for location in (server.url, shard_folder):
            with refused("shard-000000.index.npy", "sha256", error=ShardError):
                SampleReader(ShardSet.open(location, label="data.train", access=QUICK)).read(0)


@contextmanager
def s3_server(monkeypatch):
    """Serve a bucket over S3; yields (its URL, fsspec's file system)."""
    pytest.importorskip("s3fs", reason="s3:// is read with s3fs: dmae-ds[remote]")
    moto = pytest.importorskip(
        "moto.server", reason="the S3 server of these tests: pip install 'moto[server]'"
    )
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        system = fsspec.filesystem("s3", skip_instance_cache=True)
        system.mkdir("images")
        yield "s3://images", system
    finally:
        server.stop()


@contextmanager
def gs_server(monkeypatch):
    """Serve a bucket over Google's protocol; yields (its URL, fsspec's file system)."""
    pytest.importorskip("gcsfs", reason="gs:// is read with gcsfs: dmae-ds[remote]")
    emulator = pytest.importorskip(
        "gcp_storage_emulator.server", reason="the server of these tests: pip install gcp-storage-emulator"
    )
    port = free_port()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    # otherwise gcsfs uses gRPC, which the emulator does not support
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="images")
    server.start()
    try:
        yield "gs://images", fsspec.filesystem("gs", skip_instance_cache=True)
    finally:
        server.stop()


@pytest.mark.parametrize("serve_bucket", [s3_server, gs_server])
def test_buckets_give_the_batches_of_the_folder(serve_bucket, shard_folder, shard_set, monkeypatch):
    with serve_bucket(monkeypatch) as (bucket, system):
        url = f"{bucket}/digits/train"
        for path in shard_folder.iterdir():
            system.pipe_file(f"{url}/{path.name}", path.read_bytes())
        remote = ShardSet.open(url, label="data.train", access=Access(retries=3, timeout_s=10))
        for block, num_workers in ((1, 0), (16, 2)):
            ours, theirs = (
                batches(each, num_steps=3, block=block, num_workers=num_workers)
                for each in (remote, shard_set)
            )
            assert all(torch.equal(a.images, b.images) for a, b in zip(ours, theirs, strict=True))
        system.rm(f"{url}/shard-000001.tar")
        once = Access(retries=1, timeout_s=10)
        with refused("shard-000001.tar", "missing", "`dmae-shards make SRC DST`", error=ShardError):
            ShardSet.open(url, label="data.train", access=once)
        with refused("data.train", "manifest.json", error=ShardError):
            ShardSet.open(f"{bucket}/none", label="data.train", access=once)


@pytest.mark.parametrize(
    "status, is_final, asks_for_keys",
    [(400, True, False), (401, True, True), (403, True, True), (404, True, False), (503, False, False)],
)
def test_an_answer_that_stays_is_final_and_a_refused_one_asks_for_keys(status, is_final, asks_for_keys):
    error = OSError("the server's words")
    error.status = status
    text = describe_refusal(error, "s3")
    assert (text is not None) == is_final and ("AWS_ACCESS_KEY_ID" in (text or "")) == asks_for_keys
