"""dmae_ds/data/loader.py: what a global batch holds depends on the seed alone."""

import json
import os

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dmae_ds.data import loader
from dmae_ds.data.batch import Batch
from dmae_ds.data.loader import eval_batches
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import ShardError, write_manifest, write_shard
from dmae_ds.errors import UserError
from tests.data.batches import GLOBAL_BATCH, NUM_STEPS, assert_same, global_batches, join, train


@pytest.fixture
def reference(shard_set):
    return global_batches(shard_set, world_size=1)


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
    ours = global_batches(
        shard_set, world_size=world_size, accumulation=accumulation, num_workers=num_workers
    )
    assert_same(ours, reference)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_at_a_step_gives_the_tail(shard_set, reference, num_workers):
    for start_step in (3, NUM_STEPS):
        tail = global_batches(
            shard_set, world_size=2, accumulation=2, start_step=start_step, num_workers=num_workers
        )
        assert_same(tail, reference[start_step:])


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


def test_global_randomness_is_neither_used_nor_advanced(shard_set):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    list(train(shard_set, num_workers=2, stop_step=1))
    list(
        eval_batches(shard_set, img_size=16, crop_pct=1.0, batch_size=30, rank=0, world_size=1, num_workers=0)
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_batch_sizes_that_do_not_multiply_are_refused(shard_set):
    with pytest.raises(
        UserError, match="global_batch 8 is not micro_batch 3 x accumulation 1 x world_size 2 = 6"
    ):
        train(shard_set, world_size=2, micro_batch=3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_corrupt_sample_ends_training_and_evaluation_with_one_line(shard_set, num_workers):
    offset = int(shard_set.open_index(1)[3]["offset"])
    with open(shard_set.folder / "shard-000001.tar", "r+b") as file:
        file.seek(offset + 40)
        file.write(b"\0\1\2\3\4\5")
    evaluation = eval_batches(
        shard_set, img_size=16, crop_pct=1.0, batch_size=4, rank=0, world_size=1, num_workers=num_workers
    )
    for batches in (train(shard_set, num_workers=num_workers), evaluation):
        with pytest.raises(ShardError, match="shard-000001.tar: sample 000000014 is corrupt") as caught:
            list(batches)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "world_size, batch_size, limit, num_workers",
    [(1, 5, None, 0), (2, 5, None, 2), (4, 100, 10, 0), (3, 1, 2, 0), (1, 4, 99, 0)],
)
def test_evaluation_sees_every_sample_once(shard_set, world_size, batch_size, limit, num_workers):
    num_samples = min(limit or 23, 23)
    for rank in range(world_size):
        batches = list(
            eval_batches(
                shard_set,
                img_size=16,
                crop_pct=0.875,
                batch_size=batch_size,
                rank=rank,
                world_size=world_size,
                num_workers=num_workers,
                limit=limit,
            )
        )
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
    reference = global_batches(shard_set, world_size=1, block=block)
    ours = global_batches(
        shard_set, world_size=world_size, accumulation=accumulation, num_workers=num_workers, block=block
    )
    assert_same(ours, reference)
    ids, epochs = (torch.cat([batch[field] for batch in reference]) for field in (3, 4))
    for epoch in (0, 1):
        assert sorted(ids[epochs == epoch].tolist()) == list(range(23))
    tail = global_batches(
        shard_set,
        world_size=world_size,
        accumulation=accumulation,
        num_workers=num_workers,
        block=block,
        start_step=4,
    )
    assert_same(tail, reference[4:])


def test_blocks_that_do_not_fit_the_buffer_are_refused(shard_set):
    with pytest.raises(
        UserError,
        match=r"data.block 4 needs about .* GiB a rank .* data.buffer_gib is 1e-06; use a smaller block",
    ):
        train(shard_set, block=4, buffer_gib=1e-6)


def damage(shard_set, *ids):
    """One byte of each, somewhere in its picture."""
    for sample_id in ids:
        shard, row = shard_set.locate(sample_id)
        with open(shard_set.folder / shard_set.shards[shard].name, "r+b") as file:
            file.seek(int(shard_set.open_index(shard)[row]["offset"]) + 40)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 255]))


@pytest.mark.parametrize("block", [1, 16])
def test_corrupt_samples_are_replaced_alike_on_every_rank_and_written_down_once(
    shard_set, tmp_path, block, capsys
):
    whole = global_batches(shard_set, world_size=1, block=block)
    damage(shard_set, 3, 13)
    log = tmp_path / "run" / "corrupt.jsonl"
    settings = {"block": block, "max_corrupt": 2, "corrupt_log": log}
    reference = global_batches(shard_set, world_size=1, **settings)
    for world_size, num_workers in ((2, 0), (1, 2)):
        assert_same(
            global_batches(shard_set, world_size=world_size, num_workers=num_workers, **settings), reference
        )
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted((entry["sample_id"], entry["key"], entry["reason"]) for entry in entries) == [
        (3, "000000003", "crc32"),
        (13, "000000014", "crc32"),
    ]
    assert [
        entry["shard"].rpartition("/")[2] for entry in sorted(entries, key=lambda entry: entry["sample_id"])
    ] == ["shard-000000.tar", "shard-000001.tar"]
    assert capsys.readouterr().err.count("WARNING") == 2
    for step, (before, after) in enumerate(zip(whole, reference, strict=True)):
        same = (
            before[3] == after[3]
        )  # sample_ids: only the corrupt ones' places show another sample, with its own label
        assert set(before[3][~same].tolist()) <= {3, 13} and not {3, 13} & set(after[3].tolist()), step
        assert all(torch.equal(x[same], y[same]) for x, y in zip(before, after, strict=True))
        assert torch.equal(before[1], after[1])  # noise: the place's own mask
        numbers = [id if id < 5 else id + 1 for id in after[3].tolist()]
        assert after[2].tolist() == [number % 3 for number in numbers]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_more_corrupt_samples_than_allowed_end_the_run_in_one_line(shard_set, tmp_path, num_workers):
    damage(shard_set, 3, 13, 20)
    log = tmp_path / "corrupt.jsonl"
    with pytest.raises(
        ShardError, match=r"data.max_corrupt allows 2 \(3 so far, all in .*corrupt.jsonl\)"
    ) as caught:
        list(train(shard_set, max_corrupt=2, corrupt_log=log, num_workers=num_workers))
    assert "\n" not in str(caught.value)
    assert len(log.read_text().splitlines()) == 3
    with pytest.raises(
        ShardError, match="data.max_corrupt allows 2"
    ):  # the log outlives a resume: ranks and restarts add up
        list(train(shard_set, max_corrupt=2, corrupt_log=log))


def test_a_picture_that_cannot_be_decoded_is_replaced_too(shard_folder, make_picture):
    samples = [make_picture(number) for number in range(6)]
    samples[2] = samples[2]._replace(data=b"\xff\xd8 no picture")
    shards = [write_shard(shard_folder, "shard-000000.tar", samples)]
    write_manifest(shard_folder, classes=["ant", "bee", "cat"], seed=0, shards=shards)
    ids = torch.cat(
        [batch.sample_ids for batch in train(ShardSet.open(shard_folder, label="x"), max_corrupt=1)]
    )
    assert 2 not in ids and len(ids) == 8 * NUM_STEPS


def test_spawned_workers_read_the_same(shard_set, reference, monkeypatch):
    """fork is not the default everywhere (macOS; Linux from Python 3.14)."""

    class SpawningLoader(DataLoader):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, multiprocessing_context="spawn", **kwargs)

    monkeypatch.setattr(loader, "DataLoader", SpawningLoader)
    assert_same(global_batches(shard_set, world_size=1, num_workers=1, stop_step=1), reference[:1])


def test_batch_moves_as_a_whole(shard_set):
    batch = next(train(shard_set)).to("meta")
    assert isinstance(batch, Batch)
    assert all(tensor.device.type == "meta" for tensor in (*batch.views, batch.noise, batch.labels))
    assert batch.sample_ids.device.type == batch.epochs.device.type == "cpu"  # they key draws on the host


SUBSET = np.array([1, 4, 9, 10, 22])


def test_a_subset_is_the_whole_data_of_its_epochs(shard_set):
    fields = join(train(shard_set, stop_step=5, subset=SUBSET))  # 40 samples: eight epochs of five
    ids, epochs = fields[3], fields[4]
    assert all(sorted(ids[epochs == epoch].tolist()) == SUBSET.tolist() for epoch in range(8))
    assert len({tuple(ids[epochs == epoch].tolist()) for epoch in range(8)}) > 3
    for changes in (
        {"world_size": 2},
        {"accumulation": 2},
        {"num_workers": 2},
        {"world_size": 2, "num_workers": 1},
    ):
        again = global_batches(shard_set, **{"world_size": 1, **changes}, stop_step=5, subset=SUBSET)
        assert_same(again, global_batches(shard_set, world_size=1, stop_step=5, subset=SUBSET))


def test_a_subsets_corrupt_sample_is_replaced_by_one_of_the_subset(shard_folder):
    shard_set = ShardSet.open(shard_folder, label="data.train")
    shard, row = shard_set.locate(4)
    record = shard_set.open_index(shard)[row]
    tar = shard_folder / shard_set.shards[shard].name
    data = bytearray(tar.read_bytes())
    data[int(record["offset"]) + 5] ^= 255
    tar.write_bytes(data)
    ids = join(
        train(ShardSet.open(shard_folder, label="data.train"), stop_step=5, subset=SUBSET, max_corrupt=1)
    )[3]
    assert 4 not in ids and set(ids.tolist()) == set(SUBSET.tolist()) - {4}


def test_a_subset_is_not_read_in_blocks(shard_set):
    with pytest.raises(UserError, match="data.block=1"):
        train(shard_set, subset=SUBSET, block=2)


def test_an_augmentation_gets_each_view_and_the_samples_own_draws(shard_set):
    def augment(view, rng):
        assert view.shape == (3, 16, 16) and view.dtype == np.uint8
        return np.full_like(view, rng.integers(256))

    plain, one, two = (
        join(train(shard_set, augment=function, num_workers=workers))
        for function, workers in ((None, 0), (augment, 0), (augment, 2))
    )
    assert torch.equal(one[0], two[0]) and all(
        torch.equal(a, b) for a, b in zip(one[1:], plain[1:], strict=True)
    )
    colours = one[0][:, 0, 0, 0]
    assert (one[0] == colours[:, None, None, None]).all() and len(colours.unique()) > 20


@pytest.mark.parametrize(
    "block, world_size, accumulation, num_workers", [(1, 1, 1, 0), (1, 2, 1, 2), (1, 1, 2, 0), (2, 2, 1, 2)]
)
def test_repeated_views_stand_together_and_differ(shard_set, block, world_size, accumulation, num_workers):
    """Two views a picture: the pictures are those of half the batch, and the first views are those without repeating."""
    pictures = global_batches(
        shard_set, world_size=1, global_batch=GLOBAL_BATCH // 2, micro_batch=GLOBAL_BATCH // 2, block=block
    )
    found = global_batches(
        shard_set,
        world_size=world_size,
        accumulation=accumulation,
        num_workers=num_workers,
        repeat=2,
        block=block,
    )
    assert len(found) == NUM_STEPS
    for (images, noise, labels, ids, epochs), (images_1, noise_1, labels_1, ids_1, epochs_1) in zip(
        found, pictures, strict=True
    ):
        first, second = slice(0, None, 2), slice(1, None, 2)
        order = np.lexsort((ids_1.numpy(), epochs_1.numpy()))
        own = np.lexsort((ids[first].numpy(), epochs[first].numpy()))
        for tensor, expected in (
            (images, images_1),
            (noise, noise_1),
            (labels, labels_1),
            (ids, ids_1),
            (epochs, epochs_1),
        ):
            assert torch.equal(tensor[first][own], expected[order])
        assert torch.equal(ids[first], ids[second]) and torch.equal(epochs[first], epochs[second])
        assert (
            not (images[first] == images[second]).flatten(1).all(1).any()
            and not (noise[first] == noise[second]).any()
        )


def test_views_that_do_not_fill_a_micro_batch_are_refused(shard_set):
    with pytest.raises(UserError, match="data.repeat 3 does not divide the micro-batch of 4 images"):
        train(shard_set, world_size=2, repeat=3)
