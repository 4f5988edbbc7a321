"""RUN/features: stored features are reused, changed ones are not, and the folder stays within its limit."""

import os

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from dmae_ds.cli.main import main
from dmae_ds.config.load import read_saved_config
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.evaluate import feature_cache
from dmae_ds.evaluate.feature_cache import GIB, FeatureCache, fingerprint
from dmae_ds.evaluate.features import FeatureOptions, load_student
from tests.evaluate.conftest import make_shards


@pytest.fixture
def embedded(monkeypatch):
    """A list with the title of every pass over the images."""
    passes = []
    extract = feature_cache.extract_features
    monkeypatch.setattr(
        feature_cache,
        "extract_features",
        lambda *args, **options: passes.append(options["title"]) or extract(*args, **options),
    )
    return passes


def embed(run, *, gib=1.0, pool="mean", subset=None, part="val", network=None, **changes):
    data = read_saved_config(run).data.model_copy(update=changes)
    student = load_student(run)
    shard_set = ShardSet.open(getattr(data, part), label="data")
    network = network or read_saved_config(run).student
    return FeatureCache(run, student, network, gib=gib).embed(
        student,
        shard_set,
        FeatureOptions.of(data, pool=pool, batch_size=4),
        processes=Accelerator(),
        title=part,
        subset=subset,
    )


def test_the_second_time_nothing_is_embedded_and_the_rows_are_the_same(run, embedded):
    first, again = embed(run), embed(run)
    assert embedded == ["val"] and torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    (path,) = (run / "features").iterdir()
    assert path.suffix == ".safetensors" and path.stat().st_mode & 0o777 == 0o644
    path.unlink()
    assert torch.equal(embed(run)[0], first[0]) and embedded == ["val", "val"]


def test_the_name_contains_everything_that_the_features_depend_on(run, embedded):
    embed(run)
    for options in (
        {"pool": "cls"},
        {"pool": "patches"},
        {"crop_pct": 0.5},
        {"mean": (0.1, 0.1, 0.1)},
        {"std": (0.3, 0.3, 0.3)},
        {"part": "train"},
        {"network": read_saved_config(run).student.model_copy(update={"num_heads": 3})},
    ):
        before = len(embedded)
        embed(run, **options)
        assert len(embedded) == before + 1
        embed(run, **options)
        assert len(embedded) == before + 1
    assert len(list((run / "features").iterdir())) == 8


def test_another_student_is_embedded_again_and_the_files_of_the_old_one_are_deleted(run, embedded):
    first, _ = embed(run)
    embed(run, part="train")
    (run / "features" / "half.safetensors.tmp").write_bytes(b"left by a killed writer")
    weights = load_file(run / "student.safetensors")
    weights["norm.bias"] += 1
    save_file(weights, run / "student.safetensors")
    again, _ = embed(run)
    assert embedded == ["val", "train", "val"] and not torch.equal(first, again)
    assert len(list((run / "features").iterdir())) == 1


def test_a_subset_is_taken_from_the_whole_or_kept_alone(run, embedded):
    ids = np.array([3, 5, 17])
    alone, labels = embed(run, part="train", subset=ids)
    again, _ = embed(run, part="train", subset=ids)
    assert embedded == ["train"] and torch.equal(alone, again) and labels.tolist() == (ids * 7 % 3).tolist()
    embed(run, part="train", subset=np.array([3, 5, 16]))
    whole, _ = embed(run, part="train")
    assert embedded == ["train"] * 3
    torch.testing.assert_close(whole[ids], alone, rtol=1e-5, atol=1e-6)
    taken, _ = embed(run, part="train", subset=np.array([0, 19]))
    assert embedded == ["train"] * 3 and torch.equal(taken, whole[[0, 19]])


def test_the_longest_unused_file_is_deleted_to_stay_within_the_limit(run, embedded):
    embed(run, part="train")
    embed(run, part="val")
    files = {path.stat().st_size: path for path in (run / "features").iterdir()}
    train, val = files[max(files)], files[min(files)]
    os.utime(train, (1, 1))
    os.utime(val, (2, 2))
    embed(run, part="train")  # used, so now val's is deleted first
    room = (max(files) + min(files) + 200) / GIB
    embed(run, pool="cls", gib=room)
    assert train.exists() and not val.exists() and len(list((run / "features").iterdir())) == 2
    embed(run, part="train", gib=100 / GIB, crop_pct=0.5)
    assert len(list((run / "features").iterdir())) == 2  # larger than the limit: not kept


def test_without_a_cache_nothing_is_read_or_kept(run, embedded):
    embed(run, gib=0)
    assert not (run / "features").exists()
    embed(run)
    embed(run, gib=0)
    assert embedded == ["val"] * 3


def test_a_damaged_file_is_reported_and_made_again(run, embedded, capsys):
    first, _ = embed(run)
    (path,) = (run / "features").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    again, _ = embed(run)
    assert torch.equal(first, again) and embedded == ["val", "val"]
    assert str(path) in capsys.readouterr().err


def test_a_fingerprint_depends_on_names_and_values(run):
    one, other = load_student(run), load_student(run)
    assert fingerprint(one) == fingerprint(other) and len(fingerprint(one)) == 64
    with torch.no_grad():
        other.blocks[0].mlp.fc1.bias[3] += 1e-7
    assert fingerprint(one) != fingerprint(other)


def test_images_without_a_label_are_told(run, tmp_path, capsys):
    val = make_shards(tmp_path / "unlabelled", num=9, seed=3, labels=-1)
    assert main(["eval", "knn", str(run), f"data.val={val}", "--k", "3"]) == 2
    message = capsys.readouterr().err
    assert "data.val" in message and "9 of 9 images" in message
