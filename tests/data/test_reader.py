"""dmae_ds/data/reader.py: a sample is read as it was written, or refused."""

import hashlib
import os
import pickle
import subprocess
import sys
import zlib

import numpy as np
import pytest

from dmae_ds.data import reader as reader_module
from dmae_ds.data.reader import SampleReader
from dmae_ds.data.shards import RECORD, Shard, ShardError, index_name, write_manifest
from dmae_ds.data.storage import LocalFile
from tests.data.batches import damage
from tests.messages import refused


def test_sample_is_what_was_written(shard_set, make_sample):
    reader = SampleReader(shard_set)
    for sample_id, number in ((0, 0), (5, 6), (22, 23)):
        sample, written = reader.read(sample_id), make_sample(number)
        assert (sample.data, sample.label) == (written.data, written.label)
        assert (sample.key, sample.sample_id) == (f"{number:09d}", sample_id)


def test_corrupt_byte_names_shard_and_key(shard_set):
    damage(shard_set, 13)
    reader = SampleReader(shard_set)
    with refused("shard-000001.tar", "000000014", "corrupt", "line 15 of sources.txt", error=ShardError):
        reader.read(13)
    reader.read(12)


def test_shard_that_vanished_is_named(shard_set):
    os.remove(shard_set.folder / "shard-000002.tar")
    with refused("shard-000002.tar", "cannot be opened", error=ShardError):
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


def test_blocks_give_the_same_samples_in_fewer_reads(shard_set, monkeypatch):
    """Blocks may cross the end of a shard and of the set; the memory for unused samples is bounded."""
    expected = [SampleReader(shard_set).read(sample_id) for sample_id in range(23)]
    reads = []
    read = LocalFile.read
    monkeypatch.setattr(
        LocalFile, "read", lambda self, offset, size: reads.append(size) or read(self, offset, size)
    )
    reader = SampleReader(shard_set, block=8)
    spans = [(5, 8), (13, 8), (21, 7)]  # 5-12, 13-20, 21-22 and 0-4
    reader.fetch(spans)
    assert len(reads) == 2 + 2 + 2
    for first, length in spans:
        for sample_id in ((first + number) % 23 for number in range(length)):
            assert reader.read(sample_id, span=(first, length)) == expected[sample_id]
    assert len(reads) == 6 and reader._held == 0 and not reader._blocks
    small = SampleReader(shard_set, block=8, buffer_bytes=1)
    small.fetch(spans[:1])
    small.fetch(spans[1:])
    assert spans[0] not in small._blocks
    assert small.read(7, span=spans[0]) == expected[7]  # read again, alone


@pytest.mark.slow
@pytest.mark.parametrize(
    "num_samples, block", [(14_000_000, 1), (14_000_000, 64), (400_000_000, 1), (400_000_000, 64)]
)
def test_reading_starts_anywhere_in_10_000_shards_with_little_memory(tmp_path, num_samples, block):
    """Tars are sparse, with zeros for the first sample only; time and memory are printed."""
    per_shard = num_samples // 10_000
    records = np.zeros(per_shard, RECORD)
    records["size"], records["crc32"] = 1000, zlib.crc32(bytes(1000))
    records["offset"] = 512 + 2048 * np.arange(per_shard)
    np.save(tmp_path / "index.npy", records)
    digest, shards = hashlib.sha256((tmp_path / "index.npy").read_bytes()).hexdigest(), []
    for number in range(10_000):
        name, size = f"shard-{number:06d}.tar", 2048 * (per_shard + 1)
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)
        os.link(tmp_path / "index.npy", tmp_path / index_name(name))
        shards.append(Shard(name, per_shard, size, digest))
    write_manifest(tmp_path, classes=["a", "b"], seed=0, shards=shards)
    code = f"""
import re, time
from pathlib import Path
from dmae_ds.data.order import batch_positions, sample_ids
from dmae_ds.data.reader import SampleReader
from dmae_ds.data.shard_set import ShardSet
wall, cpu = time.perf_counter(), time.process_time()
shard_set = ShardSet.open({str(tmp_path)!r}, label="data.train")
order = {{"num_samples": {num_samples}, "block": {block}}}
share = {{"global_batch": 4096, "rank": 3, "world_size": 8, "micro_batch": 512, "accumulation_step": 0}}
positions = batch_positions(777_777, **share, **order)
epochs, ids = sample_ids(positions, seed=1, **order)
assert len(SampleReader(shard_set, block={block}).read(int(ids[0])).data) == 1000
print(f"{{time.perf_counter() - wall:.2f}} s, CPU {{time.process_time() - cpu:.2f}} s,")
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""  # VmHWM, because ru_maxrss is kept over exec: it would be that of this process
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    print(num_samples, block, output, "MiB")
    assert int(output.split()[-1]) < 1024
