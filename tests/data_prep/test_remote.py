"""data_prep/{index,verify}.py: tars behind http are indexed and verified like those of a folder."""

from __future__ import annotations

import os
import tarfile

import pytest

from data_prep.verify import verify_shards
from dmae_ds.data.reader import SampleReader
from dmae_ds.data.shards import ShardError
from tests.data.flaky_server import serve
from tests.data_prep.test_index import index, make_image, write_tar
from tests.messages import refused

pytest.importorskip("aiohttp", reason="http:// is read with aiohttp: dmae-ds[remote]")

NAMES = ["train-008.tar", "train-009.tar", "train-010.tar"]


@pytest.fixture
def folder(tmp_path):
    """Three tars of two samples; the second has a link and a long name."""
    (tmp_path / "tars").mkdir()
    for number, name in enumerate(NAMES):
        members = []
        for place in range(2):
            key = ("n" * 120 if number == 1 else "") + f"{number}{place}"
            members += [(f"{key}.jpg", make_image(2 * number + place)), (f"{key}.cls", b"%d" % place)]
        write_tar(tmp_path / "tars" / name, members, form=tarfile.GNU_FORMAT)
    return tmp_path / "tars"


def samples(shard_set):
    reader = SampleReader(shard_set)
    return [(sample.data, sample.label) for sample in map(reader.read, range(shard_set.num_samples))]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_index_of_tars_behind_a_url_is_that_of_the_folder(folder, tmp_path, workers, capsys):
    with serve(folder) as server:
        pattern = f"{server.url}/train-{{008..010}}.tar"
        remote, local = index(pattern, tmp_path / "index", workers=workers), index(folder)
        assert remote.base == server.url and local.base is None
        assert [shard.name for shard in remote.shards] == NAMES
        assert remote.shards == local.shards and remote.fingerprint == local.fingerprint
        assert samples(remote) == samples(local) and len(samples(local)) == 6
        for name in ("sources.txt", "train-009.index.npy"):
            assert (tmp_path / "index" / name).read_bytes() == (folder / name).read_bytes()
        for sample in (1.0, 0.01):
            capsys.readouterr()
            verify_shards(tmp_path / "index", sample=sample, workers=workers)
            assert f"{6 if sample == 1 else 3} of 6 samples in 3 shards" in capsys.readouterr().out


def test_a_name_that_a_url_must_quote(folder, tmp_path):
    name = "train #1 50%.tar"
    os.rename(folder / NAMES[0], folder / name)
    with serve(folder) as server:
        shard_set = index(f"{server.url}/{name}", tmp_path / "index")
        assert [shard.name for shard in shard_set.shards] == [name] and len(samples(shard_set)) == 2
        verify_shards(tmp_path / "index")


@pytest.mark.parametrize("sample", [1.0, 0.9999])
def test_verify_names_what_changed_behind_the_url(folder, tmp_path, sample, capsys):
    with serve(folder) as server:
        shard_set = index(f"{server.url}/train-{{008..010}}.tar", tmp_path / "index")
        row = shard_set.open_index(1)[1]
        with open(folder / NAMES[1], "r+b") as file:
            file.seek(int(row["offset"]) + 40)
            file.write(b"\0\1\2")
        with refused("DST", "1 places", "dmae-shards index", error=ShardError):
            verify_shards(tmp_path / "index", sample=sample)
    out = capsys.readouterr().out
    assert NAMES[1] in out and "crc32" in out and NAMES[0] not in out


def test_a_tar_that_is_missing_cut_or_not_answered_is_one_line(folder, tmp_path):
    with serve(folder) as server:
        with refused(f"{server.url}/train-011.tar", "cannot be read", error=ShardError):
            index(f"{server.url}/train-{{010..011}}.tar", tmp_path / "index")
        with refused(f"TARS '{server.url}'", "cannot be listed", "{000..146}", error=ShardError):
            index(server.url, tmp_path / "index")
        with refused("remote", "dmae-shards index TARS DST", error=ShardError):
            index(f"{server.url}/train-{{008..010}}.tar")
        os.truncate(folder / NAMES[0], 1024)
        with refused(f"{server.url}/{NAMES[0]}", "cut at byte 1024", error=ShardError):
            index(f"{server.url}/{NAMES[0]}", tmp_path / "index")
        server.trouble = 1.0
        with refused(f"{server.url}/{NAMES[2]}", "cannot be read", error=ShardError):
            index(f"{server.url}/{NAMES[2]}", tmp_path / "index")
    assert not (tmp_path / "index" / "manifest.json").exists()


@pytest.mark.parametrize("trouble", ["503", "cut"])
def test_verify_of_a_server_that_fails_is_a_difference_and_no_traceback(
    folder, tmp_path, trouble, monkeypatch, capsys
):
    with serve(folder) as server:
        index(f"{server.url}/train-{{008..010}}.tar", tmp_path / "index")
        opened = []

        def fail_after_the_sizes(self):
            opened.append(self)
            return "well" if len(opened) <= 3 else trouble

        monkeypatch.setattr(type(server), "draw", fail_after_the_sizes)
        with refused("3 places", error=ShardError):
            verify_shards(tmp_path / "index")
    out = capsys.readouterr().out
    assert all(f"{name}: cannot be read" in out for name in NAMES)


def test_maps_and_boxes_are_read_behind_http(scenes):
    from dmae_ds.data.dense import open_dense

    here = open_dense(scenes / "val")
    with serve(scenes / "val") as server:
        there = open_dense(server.url)
        for number in (0, 7):
            for one, other in zip(here[number][1:], there[number][1:], strict=True):
                assert bool((one == other).all())
