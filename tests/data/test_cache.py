"""dmae_ds/data/cache.py: what is removed when a cache is opened, what stays, and the bytes in use."""

from __future__ import annotations

import os
import time

import pytest

from dmae_ds.data.cache import CHUNK_BYTES, FOLDER, STALE_S, make_cache

OURS, OTHER, THIRD = ("a" * 64, "b" * 64, "c" * 64)


def put(path, num_bytes, *, age_s=0.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(num_bytes))
    set_age(path, age_s)
    return path


def set_age(path, age_s):
    os.utime(path, (time.time() - age_s, time.time() - age_s))


def used(cache):
    with cache.locked() as usage:
        return usage.value


def test_a_temporary_file_is_left_to_its_process_until_it_is_stale(tmp_path):
    """The others write while this process starts; a killed one left its file an hour ago or more."""
    root = tmp_path / FOLDER
    kept = [
        put(root / OURS[:16] / "x.tar" / "0.7.1.tmp", 1),
        put(root / OURS[:16] / "x.tar" / "1.7.2.tmp", 2, age_s=STALE_S - 60),
        put(root / OTHER[:16] / "y.tar" / "0.8.1.tmp", 4),
        put(root / OURS[:16] / "x.tar" / "2", 8, age_s=100 * STALE_S),  # a chunk has no age
        put(root / OTHER[:16] / "y.tar" / "3", 16, age_s=100 * STALE_S),
    ]
    stale = [
        put(root / OURS[:16] / "x.tar" / "4.7.3.tmp", 32, age_s=STALE_S + 60),
        put(root / OTHER[:16] / "y.tar" / "5.8.2.tmp", 64, age_s=STALE_S + 60),
    ]
    outside = put(tmp_path / "theirs.tmp", 128, age_s=100 * STALE_S)
    cache = make_cache(tmp_path, OURS, limit_bytes=10_000)
    assert all(path.exists() for path in (*kept, outside)) and not any(path.exists() for path in stale)
    assert used(cache) == 1 + 2 + 4 + 8 + 16


@pytest.mark.parametrize(
    ("limit", "left"),
    [
        (1000, [OURS, OTHER, THIRD]),  # others have half of the limit or less
        (999, [OURS, THIRD]),  # the one that was used longest ago goes
        (501, [OURS, THIRD]),  # one that fits again stays
        (500, [OURS, THIRD]),
        (499, [OURS]),
        (1, [OURS]),  # one's own chunks stay, whatever the limit
    ],
)
def test_other_data_sets_make_room_in_the_order_of_their_use(tmp_path, limit, left):
    root = tmp_path / FOLDER
    for fingerprint, num_bytes, age_s in ((OURS, 100, 300), (OTHER, 250, 200), (THIRD, 250, 100)):
        put(root / fingerprint[:16] / "x.tar" / "0", num_bytes)
        set_age(root / fingerprint[:16], age_s)
    cache = make_cache(tmp_path, OURS, limit_bytes=limit)
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == [name[:16] for name in left]
    assert used(cache) == 100 + 250 * (len(left) - 1)
    assert time.time() - (root / OURS[:16]).stat().st_mtime < 60  # used now


def test_a_chunk_that_was_cut_goes_and_its_bytes_are_free_again(tmp_path):
    data = os.urandom(2 * CHUNK_BYTES + 5)
    fetched = []

    def fetch(start, count):
        fetched.append((start, count))
        return data[start : start + count]

    cache = make_cache(tmp_path, OURS, limit_bytes=len(data))
    read = {"file_size": len(data), "fetch": fetch}
    assert cache.read("x.tar", 3, len(data) - 3, **read) == data[3:]
    assert fetched == [(0, len(data))] and used(cache) == len(data)
    os.truncate(tmp_path / FOLDER / OURS[:16] / "x.tar" / "1", 700)
    cache = make_cache(tmp_path, OURS, limit_bytes=len(data))
    assert used(cache) == len(data) - CHUNK_BYTES + 700
    assert cache.read("x.tar", CHUNK_BYTES, 9, **read) == data[CHUNK_BYTES : CHUNK_BYTES + 9]
    assert fetched[1:] == [(CHUNK_BYTES, CHUNK_BYTES)]  # that chunk alone
    assert cache.read("x.tar", 0, len(data), **read) == data and len(fetched) == 2
    assert used(cache) == len(data)
    cache.forget("x.tar", CHUNK_BYTES - 1, 2)
    assert used(cache) == 5


def test_a_full_cache_keeps_its_chunks_and_the_rest_is_read_each_time(tmp_path):
    data = os.urandom(3 * CHUNK_BYTES)
    fetched = []

    def fetch(start, count):
        fetched.append(start // CHUNK_BYTES)
        return data[start : start + count]

    cache = make_cache(tmp_path, OURS, limit_bytes=2 * CHUNK_BYTES)
    for _ in range(2):
        for number in range(3):
            start = number * CHUNK_BYTES
            assert cache.read("x.tar", start, 8, file_size=len(data), fetch=fetch) == data[start : start + 8]
    assert fetched == [0, 1, 2, 2] and used(cache) == 2 * CHUNK_BYTES
