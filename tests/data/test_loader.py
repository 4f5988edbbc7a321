"""dmae_ds/data/loader.py: the content of a global batch depends on the seed alone."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dmae_ds.data import loader
from dmae_ds.data.batch import Batch
from dmae_ds.data.loader import eval_batches
from dmae_ds.data.order import block_spans, sample_ids
from dmae_ds.data.shards import ShardError
from dmae_ds.data.storage import LocalFile
from dmae_ds.errors import RunFailed, worker_failure
from tests.data.batches import NUM_STEPS, assert_same, damage, global_batches, train
from tests.messages import refused


@pytest.fixture
def reference(shard_set):
    return global_batches(shard_set, world_size=1)


def evaluate(shard_set, *, rank=0, world_size=1, **changes):
    settings = {"img_size": 16, "crop_pct": 1.0, "batch_size": 4, "num_workers": 0, **changes}
    return eval_batches(shard_set, rank=rank, world_size=world_size, **settings)


def test_batch_has_the_stated_shapes_and_types(shard_set):
    batch = next(train(shard_set))
    assert batch.images.shape == (8, 3, 16, 16) and batch.images.dtype == torch.uint8
    assert batch.noise.shape == (8, 4) and batch.noise.dtype == torch.float32
    assert batch.noise.min() >= 0 and batch.noise.max() < 1
    for field in (batch.labels, batch.sample_ids, batch.epochs):
        assert field.shape == (8,) and field.dtype == torch.int64
    numbers = [id if id < 5 else id + 1 for id in batch.sample_ids.tolist()]
    assert batch.labels.tolist() == [number % 3 for number in numbers]


@pytest.mark.parametrize(
    "world_size, accumulation, num_workers", [(2, 1, 0), (4, 2, 0), (1, 4, 0), (1, 1, 2), (2, 2, 2)]
)
def test_global_batches_do_not_depend_on_ranks_accumulation_or_workers(
    shard_set, reference, world_size, accumulation, num_workers
):
    division = {"world_size": world_size, "accumulation": accumulation, "num_workers": num_workers}
    assert_same(global_batches(shard_set, **division), reference)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_at_a_step_gives_the_remaining_batches(shard_set, reference, num_workers):
    for start_step in (3, NUM_STEPS):
        resumed = global_batches(
            shard_set, world_size=2, accumulation=2, start_step=start_step, num_workers=num_workers
        )
        assert_same(resumed, reference[start_step:])


def test_every_sample_comes_once_an_epoch_with_a_new_crop_and_mask(reference):
    images, noise, _, ids, epochs = (torch.cat(field) for field in zip(*reference, strict=True))
    for epoch in (0, 1):
        assert sorted(ids[epochs == epoch].tolist()) == list(range(23))
    first, second = ((ids == 9).nonzero()[n, 0] for n in (0, 1))
    assert not torch.equal(images[first], images[second])
    assert not torch.equal(noise[first], noise[second])


def test_seed_changes_order_crops_and_masks(shard_set, reference):
    other = global_batches(shard_set, world_size=1, seed=6)
    for field in (0, 1, 3):
        assert not torch.equal(other[0][field], reference[0][field])


def test_global_random_generators_are_neither_used_nor_advanced(shard_set):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    list(train(shard_set, num_workers=2, stop_step=1))
    list(evaluate(shard_set, batch_size=30))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_corrupt_sample_ends_training_and_evaluation_with_one_line(shard_set, num_workers):
    damage(shard_set, 13)
    for batches in (
        train(shard_set, num_workers=num_workers),
        evaluate(shard_set, num_workers=num_workers),
    ):
        with refused("shard-000001.tar", "000000014", "corrupt", error=ShardError):
            list(batches)


@pytest.mark.parametrize(
    "world_size, batch_size, limit, num_workers",
    [(1, 5, None, 0), (2, 5, None, 2), (4, 100, 10, 0), (3, 1, 2, 0), (1, 4, 99, 0)],
)
def test_evaluation_sees_every_sample_once(shard_set, world_size, batch_size, limit, num_workers):
    num_samples = min(limit or 23, 23)
    settings = {"crop_pct": 0.875, "batch_size": batch_size, "num_workers": num_workers, "limit": limit}
    for rank in range(world_size):
        batches = list(evaluate(shard_set, rank=rank, world_size=world_size, **settings))
        ids = [id for batch in batches for id in batch.sample_ids.tolist()]
        assert ids == list(range(rank, num_samples, world_size))
        for batch in batches:
            assert batch.images.shape == (len(batch.labels), 3, 16, 16) and len(batch.labels) <= batch_size
            assert batch.noise is None and batch.epochs.tolist() == [0] * len(batch.labels)


@pytest.mark.parametrize("block", [2, 16])
@pytest.mark.parametrize(
    "world_size, accumulation, num_workers", [(2, 1, 0), (4, 2, 0), (1, 1, 3), (2, 2, 2)]
)
def test_global_batches_of_blocks_do_not_depend_on_ranks_accumulation_or_workers(
    shard_set, block, world_size, accumulation, num_workers
):
    division = {"world_size": world_size, "accumulation": accumulation, "num_workers": num_workers}
    reference = global_batches(shard_set, world_size=1, block=block)
    assert_same(global_batches(shard_set, block=block, **division), reference)
    ids, epochs = (torch.cat([batch[field] for batch in reference]) for field in (3, 4))
    for epoch in (0, 1):
        assert sorted(ids[epochs == epoch].tolist()) == list(range(23))
    assert_same(global_batches(shard_set, block=block, start_step=4, **division), reference[4:])


@pytest.mark.parametrize("block, global_batch", [(1, 4), (2, 23), (4, 4), (4, 23), (16, 23), (64, 4)])
def test_a_local_epoch_reads_every_block_once(shard_set, monkeypatch, block, global_batch):
    """Four epochs: a block that crosses the end of a shard is a read in each; no byte is read twice.

    Only where two epochs overlap in a step and have an equal block, one of its samples may be read alone.
    """
    num_epochs, images, reads = 4, [], []
    for shard in range(3):
        images += [(shard, int(row["offset"]), int(row["size"])) for row in shard_set.open_index(shard)]
    read = LocalFile.read

    def counted(file, offset, size):
        reads.append((int(file.path[-5]), offset, size))  # shard-00000N.tar
        return read(file, offset, size)

    monkeypatch.setattr(LocalFile, "read", counted)
    num_steps = num_epochs * 23 // global_batch
    list(train(shard_set, block=block, global_batch=global_batch, stop_step=num_steps))
    positions = np.arange(num_epochs * 23)
    epochs, ids = sample_ids(positions, num_samples=23, seed=5, block=block)
    spans = block_spans(epochs, ids, num_samples=23, seed=5, block=block)
    # A piece of a block is in one shard, and before or behind the end of the set.
    places = [
        (shard_set.locate(id)[0], id < first) for id, (first, _) in zip(ids.tolist(), spans, strict=True)
    ]
    assert len(reads) == len(set(zip(epochs.tolist(), spans, places, strict=True)))
    assert len(reads) <= num_epochs * (-(-23 // block) + 3)  # three borders
    for image in images:
        inside = [
            image[0] == shard and offset <= image[1] and image[1] + image[2] <= offset + size
            for shard, offset, size in reads
        ]
        assert sum(inside) == num_epochs


def test_blocks_that_do_not_fit_the_buffer_are_refused(shard_set):
    with refused("data.block 4", "GiB", "data.buffer_gib", "1e-06"):
        train(shard_set, block=4, buffer_gib=1e-6)


def test_spawned_workers_read_the_same(shard_set, reference, monkeypatch):
    """The default is not fork on macOS, nor on Linux from Python 3.14."""

    class SpawningLoader(DataLoader):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, multiprocessing_context="spawn", **kwargs)

    monkeypatch.setattr(loader, "DataLoader", SpawningLoader)
    assert_same(global_batches(shard_set, world_size=1, num_workers=1, stop_step=1), reference[:1])


def test_a_batch_moves_to_a_device_without_its_keys(shard_set):
    batch = next(train(shard_set)).to("meta")
    assert isinstance(batch, Batch)
    assert all(tensor.device.type == "meta" for tensor in (*batch.views, batch.noise, batch.labels))
    assert batch.sample_ids.device.type == batch.epochs.device.type == "cpu"  # they key draws on the host


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError()])
def test_a_worker_that_ends_while_it_hands_over_a_batch_is_one_line(monkeypatch, error):
    def items():
        yield "first"
        raise error

    monkeypatch.setattr(loader, "WORKER_ENDS_S", 0.0)
    batches = items()
    assert loader._receive(batches, 1) == ["first"]
    with pytest.raises(RuntimeError) as raised:
        loader._receive(batches, 1)
    failure = worker_failure(raised.value, where="rank 3")
    assert isinstance(failure, RunFailed)
    assert all(word in str(failure) for word in ("rank 3", "data.num_workers", type(error).__name__))
    assert worker_failure(RuntimeError("something else")) is None
