"""dmae_ds/data/corrupt.py: corrupt samples are replaced and logged, and too many of them end the run."""

import itertools
import json

import pytest
import torch

from dmae_ds.data.corrupt import MAX_TRIES, replacements
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import ShardError, write_manifest, write_shard
from tests.data.batches import NUM_STEPS, assert_same, damage, global_batches, train
from tests.messages import refused


@pytest.mark.parametrize("block", [1, 16])
def test_corrupt_samples_are_replaced_alike_on_every_rank_and_logged_once(shard_set, tmp_path, block, capsys):
    intact = global_batches(shard_set, block=block)
    damage(shard_set, 3, 13)
    log = tmp_path / "run" / "corrupt.jsonl"
    settings = {"block": block, "max_corrupt": 2, "corrupt_log": log}
    reference = global_batches(shard_set, **settings)
    for division in ({"world_size": 2}, {"num_workers": 2}):
        assert_same(global_batches(shard_set, **division, **settings), reference)
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    entries.sort(key=lambda entry: entry["sample_id"])
    fields = [(entry["sample_id"], entry["key"], entry["reason"]) for entry in entries]
    assert fields == [(3, "000000003", "crc32"), (13, "000000014", "crc32")]
    names = [entry["shard"].rpartition("/")[2] for entry in entries]
    assert names == ["shard-000000.tar", "shard-000001.tar"]
    assert capsys.readouterr().err.count("WARNING") == 2
    for step, (before, after) in enumerate(zip(intact, reference, strict=True)):
        # sample ids differ only in the places of corrupt samples, which show another sample and its label
        same = before[3] == after[3]
        assert set(before[3][~same].tolist()) <= {3, 13} and not {3, 13} & set(after[3].tolist()), step
        assert all(torch.equal(x[same], y[same]) for x, y in zip(before, after, strict=True))
        assert torch.equal(before[1], after[1])  # the mask noise belongs to the place
        numbers = [id if id < 5 else id + 1 for id in after[3].tolist()]
        assert after[2].tolist() == [number % 3 for number in numbers]


@pytest.mark.parametrize("num_samples", range(1, 7))
def test_every_other_sample_may_stand_in_for_a_corrupt_one(num_samples):
    for sample_id, epoch in itertools.product(range(num_samples), range(4)):
        found = list(replacements(sample_id, epoch=epoch, num_samples=num_samples, seed=3))
        assert sorted(found) == [other for other in range(num_samples) if other != sample_id]
    many = list(replacements(7, epoch=0, num_samples=10**6, seed=3))
    assert len(set(many)) == len(many) == MAX_TRIES and 7 not in many


@pytest.mark.parametrize("num_workers", [0, 2])
def test_more_corrupt_samples_than_allowed_end_the_run(shard_set, tmp_path, num_workers):
    damage(shard_set, 3, 13, 20)
    log = tmp_path / "corrupt.jsonl"
    with refused("data.max_corrupt", "allows 2", "3 so far", log, error=ShardError):
        list(train(shard_set, max_corrupt=2, corrupt_log=log, num_workers=num_workers))
    assert len(log.read_text().splitlines()) == 3
    # the log is kept over a resume: ranks and restarts add up
    with refused("data.max_corrupt", "allows 2", error=ShardError):
        list(train(shard_set, max_corrupt=2, corrupt_log=log))


def test_an_image_that_cannot_be_decoded_is_replaced_too(shard_folder, make_sample):
    samples = [make_sample(number) for number in range(6)]
    samples[2] = samples[2]._replace(data=b"\xff\xd8 no image")
    shards = [write_shard(shard_folder, "shard-000000.tar", samples)]
    write_manifest(shard_folder, classes=["ant", "bee", "cat"], seed=0, shards=shards)
    batches = train(ShardSet.open(shard_folder, label="data.train"), max_corrupt=1)
    ids = torch.cat([batch.sample_ids for batch in batches])
    assert 2 not in ids and len(ids) == 8 * NUM_STEPS
