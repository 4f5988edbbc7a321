"""dmae_ds/data/unindexed.py and stream.py: tars without an index give batches, no exact order, and no surprise."""

import io
import itertools
import tarfile

import numpy as np
import pytest
import torch

from dmae_ds.config.run import DataConfig
from dmae_ds.data import unindexed_stream as stream_module
from dmae_ds.data.open import open_train
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import ShardError
from dmae_ds.data.unindexed import UnindexedShards
from tests.data.batches import train
from tests.data.flaky_server import serve


def write_tar(path, members):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def tars(tmp_path, make_picture):
    """Four tars of 5 samples by somebody else: names with folders and dots, text and pickles beside the pictures."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for shard in range(4):
        members = []
        for number in range(5 * shard, 5 * shard + 5):
            sample = make_picture(number)
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
    assert isinstance(shards, UnindexedShards) and "resuming starts a new shuffle" in shards.order_guarantee
    alone = torch.cat([batch.sample_ids for batch in batches(shards)])
    assert len(set(alone.tolist())) == 20
    seen = [
        set(torch.cat([batch.sample_ids for batch in batches(shards, world_size=2, rank=rank)]).tolist())
        for rank in (0, 1)
    ]
    labels = torch.cat([batch.labels for batch in batches(shards)])
    assert sorted(labels.tolist()) == sorted(number % 3 for number in range(20))
    assert all(len(part) >= 10 for part in seen)
    again = torch.cat([batch.sample_ids for batch in batches(shards, start_step=5)])
    assert again.tolist() != alone.tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_same_tars_by_pattern_over_http_and_from_workers(tars, num_workers):
    pytest.importorskip("aiohttp")
    pattern = "/part-{00..03}.tar"
    with serve(tars) as server:
        for location in (str(tars) + pattern, server.url + pattern):
            found = batches(open_train(data(location), allow_pipe=False), num_workers=num_workers)
            assert len(found) == 5 and all(batch.images.shape == (4, 3, 16, 16) for batch in found)


def test_fewer_tars_than_readers_are_refused(tars):
    with pytest.raises(
        ShardError,
        match="4 tars are too few for 6 readers .* lower data.num_workers, or run `dmae-shards index`",
    ):
        batches(open_train(data(tars), allow_pipe=False), world_size=2, num_workers=3)


def test_without_an_epoch_s_length_tars_are_refused_and_an_indexed_folder_is_not_streamed(tars, shard_folder):
    for location in (f"{tars}/part-{{00..03}}.tar", f"{tars}/part-00.tar"):
        with pytest.raises(
            ShardError, match="names tars; give a folder with manifest.json .`dmae-shards index`"
        ):
            open_train(DataConfig(train=location), allow_pipe=False)
    with pytest.raises(ShardError, match="no manifest.json there"):
        open_train(DataConfig(train=str(tars)), allow_pipe=False)
    with pytest.raises(ShardError, match="has an index .* remove data.num_samples"):
        open_train(data(shard_folder), allow_pipe=False)
    assert isinstance(open_train(DataConfig(train=str(shard_folder)), allow_pipe=False), ShardSet)
    for location, message in (
        (f"{tars}/part-{{00..07}}.tar", r"part-04.tar is not there \(4 of 8 are missing\)"),
        (f"{tars}/part-00.tar.gz{{,}}", "compressed tars are not streamed"),
        (f"{tars}/none", "cannot be read"),
        ("http://127.0.0.1:9/x", "a web server does not list its files"),
    ):
        with pytest.raises(ShardError, match=message):
            open_train(data(location), allow_pipe=False)
    with pytest.raises(ShardError, match="data.block 16 is of no use"):
        open_train(data(tars, block=16), allow_pipe=False)


def test_a_command_runs_only_if_it_is_allowed(tars, tmp_path):
    pipe = f"pipe:touch {tmp_path}/ran; cat {tars}/part-00.tar"
    for settings in ({}, {"num_samples": 20}):
        with pytest.raises(ShardError, match="runs a command of the shell; start with --allow-pipe"):
            open_train(DataConfig(train=pipe, **settings), allow_pipe=False)
    assert not (tmp_path / "ran").exists()
    found = batches(open_train(data(pipe), allow_pipe=True), num_steps=2)
    assert (tmp_path / "ran").exists() and len(found) == 2


@pytest.mark.parametrize("num_bytes, left", [(512 * 8, 15), (700, 15), (-1024, 20)])
def test_a_cut_tar_is_counted_and_not_taken_for_its_end(tars, tmp_path, num_bytes, left):
    path = tars / "part-02.tar"
    data_ = path.read_bytes()
    path.write_bytes(data_[:num_bytes].rstrip(b"\0") if num_bytes < 0 else data_[:num_bytes])
    shards = open_train(data(tars), allow_pipe=False)
    log = tmp_path / "corrupt.jsonl"
    found = batches(shards, num_steps=4, max_corrupt=9, corrupt_log=log)
    assert len(found) == 4 and "part-02.tar" in log.read_text()
    with pytest.raises(
        ShardError, match="part-02.tar: sample the rest of the tar is corrupt .*max_corrupt allows 0"
    ):
        batches(shards, num_steps=9)


def test_a_damaged_header_is_counted(tars, tmp_path):
    path = tars / "part-01.tar"
    content = bytearray(path.read_bytes())
    second = content.index(b"../up/6")
    content[second] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ShardError,
        match="part-01.tar: sample the rest of the tar is corrupt .ReadError: bad checksum at byte",
    ):
        batches(open_train(data(tars), allow_pipe=False), num_steps=9)


def test_tars_without_a_picture_end_in_one_line(tars):
    for path in tars.iterdir():
        write_tar(path, [("a.txt", b"x"), ("b.jpg", b"no picture")])
    with pytest.raises(ShardError, match="hold no image that can be read"):
        batches(open_train(data(tars), allow_pipe=False), max_corrupt=9)


def test_no_member_becomes_a_path_or_an_object(tars, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    names = {
        sample["key"]
        for sample in stream_module._samples_of(open_train(data(tars), allow_pipe=False).tars, 0, [])
    }
    batches(open_train(data(tars), allow_pipe=False))
    assert sorted(tmp_path.rglob("*")) == before and all(name.startswith("../up/") for name in names)


def test_shuffling_is_seeded(tars):
    shards = open_train(data(tars), allow_pipe=False)
    first, second = (torch.cat([batch.sample_ids for batch in batches(shards)]) for _ in range(2))
    assert torch.equal(first, second)
    assert np.array_equal(
        *(np.concatenate([batch.noise for batch in itertools.islice(batches(shards), 3)]) for _ in range(2))
    )
