"""dmae_ds/data/open.py, unindexed.py and unindexed_stream.py: batches of tars without an index."""

import gzip
import io
import tarfile

import pytest
import torch

from dmae_ds.config.data import DataConfig
from dmae_ds.data import unindexed_stream as stream_module
from dmae_ds.data.open import open_train
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import ShardError
from dmae_ds.data.unindexed import UnindexedShards
from tests.data.batches import join, train
from tests.data.flaky_server import serve
from tests.messages import refused


def write_tar(path, members):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def tars(tmp_path, make_sample):
    """Four unindexed tars of 5 samples: names with folders and dots, text and pickles next to the images."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for shard in range(4):
        members = []
        for number in range(5 * shard, 5 * shard + 5):
            sample = make_sample(number)
            members += [
                (f"../up/{number}.{sample.extension.upper()}", sample.data),
                (f"../up/{number}.cls", b"%d\n" % sample.label),
                (f"../up/{number}.pkl", b"cos\nsystem\n"),
            ]
        write_tar(folder / f"part-{shard:02d}.tar", members)
    return folder


def data(location, **settings):
    return DataConfig(train=str(location), num_samples=20, **settings)


def batches(shards, *, num_steps=5, start_step=0, **settings):
    """Micro-batches of four samples."""
    settings = {"seed": 0, "micro_batch": 4, "global_batch": 4 * settings.get("world_size", 1), **settings}
    return list(train(shards, start_step=start_step, stop_step=start_step + num_steps, **settings))


def test_every_sample_comes_once_a_pass_and_ranks_share_the_tars(tars):
    shards = open_train(data(tars), allow_pipe=False)
    assert isinstance(shards, UnindexedShards) and "dmae-shards index" in shards.order_guarantee
    alone = torch.cat([batch.sample_ids for batch in batches(shards)])
    assert len(set(alone.tolist())) == 20
    by_rank = [
        set(torch.cat([batch.sample_ids for batch in batches(shards, world_size=2, rank=rank)]).tolist())
        for rank in (0, 1)
    ]
    labels = torch.cat([batch.labels for batch in batches(shards)])
    assert sorted(labels.tolist()) == sorted(number % 3 for number in range(20))
    assert all(len(ids) >= 10 for ids in by_rank)
    again = torch.cat([batch.sample_ids for batch in batches(shards, start_step=5)])
    assert again.tolist() != alone.tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_tars_are_read_by_pattern_over_http_and_by_workers(tars, num_workers):
    pytest.importorskip("aiohttp")
    pattern = "/part-{00..03}.tar"
    with serve(tars) as server:
        for location in (str(tars) + pattern, server.url + pattern):
            read = batches(open_train(data(location), allow_pipe=False), num_workers=num_workers)
            assert len(read) == 5 and all(batch.images.shape == (4, 3, 16, 16) for batch in read)


def test_fewer_tars_than_readers_are_refused(tars):
    with refused("4 tars", "6 readers", "data.num_workers", "`dmae-shards index`", error=ShardError):
        batches(open_train(data(tars), allow_pipe=False), world_size=2, num_workers=3)


def test_tars_without_the_length_of_an_epoch_are_refused(tars):
    for location in (f"{tars}/part-{{00..03}}.tar", f"{tars}/part-00.tar"):
        with refused(location, "manifest.json", "`dmae-shards index`", "data.num_samples", error=ShardError):
            open_train(DataConfig(train=location), allow_pipe=False)
    with refused(tars, "manifest.json", error=ShardError):
        open_train(DataConfig(train=str(tars)), allow_pipe=False)


def test_an_indexed_folder_is_not_streamed(shard_folder):
    with refused("data.train", "manifest.json", "data.num_samples", error=ShardError):
        open_train(data(shard_folder), allow_pipe=False)
    assert isinstance(open_train(DataConfig(train=str(shard_folder)), allow_pipe=False), ShardSet)


def test_locations_and_settings_that_cannot_be_streamed_are_refused(tars, tmp_path):
    for location, words in (
        (f"{tars}/part-{{00..07}}.tar", ("part-04.tar", "4 of 8")),
        (f"{tars}/part-00.tar.gz{{,}}", ("part-00.tar.gz", "compressed")),
        (f"{tars}/none", ("cannot be read",)),
        ("http://127.0.0.1:9/x", ("a web server", "http://127.0.0.1:9/x/shard-")),
    ):
        with refused("data.train", location, *words, error=ShardError):
            open_train(data(location), allow_pipe=False)
    with refused("data.block 16", "requires an index", error=ShardError):
        open_train(data(tars, block=16), allow_pipe=False)


def test_a_cache_of_a_local_folder_is_refused(shard_folder, tmp_path):
    with refused("data.cache_dir", str(tmp_path), str(shard_folder), error=ShardError):
        open_train(DataConfig(train=str(shard_folder), cache_dir=str(tmp_path)), allow_pipe=False)


def test_a_command_runs_only_if_it_is_allowed(tars, tmp_path):
    pipe = f"pipe:touch {tmp_path}/ran; cat {tars}/part-00.tar"
    for settings in ({}, {"num_samples": 20}):
        with refused("data.train", "shell command", "--allow-pipe", error=ShardError):
            open_train(DataConfig(train=pipe, **settings), allow_pipe=False)
    assert not (tmp_path / "ran").exists()
    read = batches(open_train(data(pipe), allow_pipe=True), num_steps=2)
    assert (tmp_path / "ran").exists() and len(read) == 2


@pytest.mark.parametrize("num_bytes", [512 * 8, 700, -1024])
def test_a_cut_tar_is_counted_as_corrupt(tars, tmp_path, num_bytes):
    path = tars / "part-02.tar"
    content = path.read_bytes()[:num_bytes]
    path.write_bytes(content.rstrip(b"\0") if num_bytes < 0 else content)
    shards = open_train(data(tars), allow_pipe=False)
    log = tmp_path / "corrupt.jsonl"
    assert len(batches(shards, num_steps=4, max_corrupt=9, corrupt_log=log)) == 4
    assert "part-02.tar" in log.read_text()
    with refused("part-02.tar", "the rest of the tar", "max_corrupt allows 0", error=ShardError):
        batches(shards, num_steps=9)


def test_a_damaged_header_is_counted_as_corrupt(tars):
    path = tars / "part-01.tar"
    content = bytearray(path.read_bytes())
    content[content.index(b"../up/6")] ^= 1
    path.write_bytes(content)
    with refused("part-01.tar", "the rest of the tar", "ReadError", "at byte", error=ShardError):
        batches(open_train(data(tars), allow_pipe=False), num_steps=9)


@pytest.mark.parametrize(
    "kind, word", [("link", "a link to"), ("apart", "without an image"), ("two", "several")]
)
def test_what_streaming_cannot_read_is_counted(tars, kind, word):
    path = tars / "part-01.tar"
    if kind == "two":
        path.write_bytes(path.read_bytes() * 2)
    else:
        with tarfile.open(path, "a", format=tarfile.USTAR_FORMAT) as tar:
            info = tarfile.TarInfo("../up/5.jpg" if kind == "link" else "../up/5.cls")
            info.type, info.linkname = (tarfile.LNKTYPE, "../up/6.jpg") if kind == "link" else (b"0", "")
            tar.addfile(info)
    with refused("part-01.tar", word, "`dmae-shards index`", error=ShardError):
        batches(open_train(data(tars), allow_pipe=False), num_steps=9)


def test_a_compressed_tar_named_tar_is_called_so(tars):
    path = tars / "part-01.tar"
    path.write_bytes(gzip.compress(path.read_bytes()))
    with refused("part-01.tar", "gunzip", error=ShardError):
        batches(open_train(data(tars), allow_pipe=False), num_steps=9)


def test_tars_without_an_image_are_refused(tars):
    for path in tars.iterdir():
        write_tar(path, [("a.txt", b"x"), ("b.jpg", b"no image")])
    with refused("no readable image", "not a JPEG or PNG image", error=ShardError):
        batches(open_train(data(tars), allow_pipe=False), max_corrupt=9)


def test_no_member_becomes_a_path_or_an_object(tars, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    shards = open_train(data(tars), allow_pipe=False)
    names = {sample["key"] for sample in stream_module._samples_of(shards.tars, 0, [])}
    batches(shards)
    assert sorted(tmp_path.rglob("*")) == before and all(name.startswith("../up/") for name in names)


def test_shuffling_is_seeded(tars):
    shards = open_train(data(tars), allow_pipe=False)
    first, second = (join(batches(shards)) for _ in range(2))
    assert torch.equal(first[3], second[3]) and torch.equal(first[1], second[1])
