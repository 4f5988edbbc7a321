"""dmae_ds/data/reader.py: a sample comes back as it was written, or not at all."""

import os
import pickle

import pytest

from dmae_ds.data import reader as reader_module
from dmae_ds.data.reader import SampleReader
from dmae_ds.data.shards import ShardError


def test_sample_is_what_was_written(shard_set, make_picture):
    reader = SampleReader(shard_set)
    for sample_id, number in ((0, 0), (5, 6), (22, 23)):
        sample, written = reader.read(sample_id), make_picture(number)
        assert (sample.data, sample.label) == (written.data, written.label)
        assert (sample.key, sample.sample_id) == (f"{number:09d}", sample_id)


def test_corrupt_byte_names_shard_and_key(shard_set):
    offset = int(shard_set.open_index(1)[3]["offset"])
    with open(shard_set.folder / "shard-000001.tar", "r+b") as file:
        file.seek(offset + 40)
        byte = file.read(1)[0]
        file.seek(offset + 40)
        file.write(bytes([byte ^ 1]))
    reader = SampleReader(shard_set)
    with pytest.raises(ShardError, match=r"shard-000001.tar: sample 000000014 is corrupt .* line 15 of sources.txt"):
        reader.read(13)
    reader.read(12)


def test_shard_that_vanished_is_named(shard_set):
    os.remove(shard_set.folder / "shard-000002.tar")
    with pytest.raises(ShardError, match="shard-000002.tar cannot be opened"):
        SampleReader(shard_set).read(22)


def count_descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
def test_open_descriptors_are_bounded_and_given_back(shard_set, monkeypatch):
    monkeypatch.setattr(reader_module, "MAX_OPEN_SHARDS", 2)
    before = count_descriptors()
    reader = SampleReader(shard_set)
    for sample_id in (0, 10, 20, 0, 10, 20):
        reader.read(sample_id)
    assert count_descriptors() - before == 4  # tar and index of two shards
    del reader
    assert count_descriptors() == before


def test_reader_works_in_a_forked_child_and_after_pickling(shard_set):
    reader = SampleReader(shard_set)
    expected = [reader.read(sample_id) for sample_id in range(23)]
    child = os.fork()
    if child == 0:
        os._exit(0 if [reader.read(sample_id) for sample_id in range(23)] == expected else 1)
    assert [reader.read(sample_id) for sample_id in range(23)] == expected
    assert os.waitpid(child, 0)[1] == 0
    copy = pickle.loads(pickle.dumps(reader))
    del reader  # and with it its descriptors
    assert copy.read(7) == expected[7]
