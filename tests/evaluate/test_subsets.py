"""Draws of few labels: balanced, nested, the same everywhere, and kept."""

from types import SimpleNamespace

import numpy as np
import pytest

from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import Shard
from dmae_ds.errors import UserError
from dmae_ds.evaluate.subsets import check_labels, draw_subset, open_subset
from tests.evaluate.conftest import make_shards


def made_up(labels, *, fingerprint="f", num_classes=None):
    """A shard set of three shards with these labels; keys have gaps, as skipped files leave them."""
    labels = np.asarray(labels)
    parts = np.array_split(labels, 3)
    shards = [Shard(f"shard-{number:06d}.tar", len(part), 0, "") for number, part in enumerate(parts)]
    indexes = [
        {
            "label": part.astype(np.int32),
            "number": (10_000 * number + 3 * np.arange(len(part))).astype(np.uint64),
        }
        for number, part in enumerate(parts)
    ]
    classes = [f"class {number}" for number in range(num_classes or labels.max() + 1)]
    ends = np.cumsum([len(part) for part in parts]).tolist()
    return SimpleNamespace(
        shards=shards,
        ends=ends,
        num_samples=len(labels),
        classes=classes,
        fingerprint=fingerprint,
        folder="folder",
        open_index=indexes.__getitem__,
    )


SKEWED = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [1000, 250, 14, 3]))


@pytest.mark.parametrize(
    "labels, expected",
    [
        ("1%", [10, 3, 1, 1]),  # 2.5 of 250 rounds up; a class always has one
        ("10%", [100, 25, 1, 1]),
        ("12.5%", [125, 31, 2, 1]),
        ("99.9%", [999, 250, 14, 3]),
        ("1-shot", [1, 1, 1, 1]),
        ("3-shot", [3, 3, 3, 3]),
    ],
)
def test_every_class_gives_its_share(labels, expected):
    ids = draw_subset(made_up(SKEWED), labels, 0)
    assert ids.dtype == np.int64 and (np.diff(ids) > 0).all()
    assert np.bincount(SKEWED[ids], minlength=4).tolist() == expected


def test_all_is_every_sample():
    assert draw_subset(made_up(SKEWED), "all", 0).tolist() == list(range(len(SKEWED)))


@pytest.mark.parametrize("seed", range(5))
def test_draws_of_a_seed_are_nested_and_of_two_seeds_differ(seed):
    drawn = [
        set(draw_subset(made_up(SKEWED), labels, seed).tolist())
        for labels in ("1%", "2%", "10%", "50%", "99%")
    ]
    assert all(small <= large for small, large in zip(drawn, drawn[1:]))
    assert set(draw_subset(made_up(SKEWED), "1-shot", seed).tolist()) <= set(
        draw_subset(made_up(SKEWED), "3-shot", seed).tolist()
    )
    others = [set(draw_subset(made_up(SKEWED), "10%", other).tolist()) for other in range(5) if other != seed]
    assert drawn[2] not in others


def test_a_draw_is_of_the_fingerprint_and_never_changes():
    assert draw_subset(made_up(np.arange(1000) % 4), "1%", 0).tolist() == [
        292,
        367,
        469,
        470,
        481,
        503,
        528,
        529,
        550,
        567,
        584,
        858,
    ]
    assert (
        draw_subset(made_up(SKEWED, fingerprint="g"), "1%", 0).tolist()
        != draw_subset(made_up(SKEWED), "1%", 0).tolist()
    )


def test_a_draw_is_uniform_in_a_class():
    labels = np.zeros(40, dtype=np.int64)
    counts = sum(
        np.bincount(draw_subset(made_up(labels, num_classes=1), "25%", seed), minlength=40)
        for seed in range(400)
    )
    assert counts.sum() == 4000 and counts.min() > 60 and counts.max() < 145  # 100 +- 8.7 each


def test_unlabelled_samples_and_empty_classes_give_none():
    labels = np.array([-1, 2, 0, -1, 0, 2, -1, 2, 0])
    assert set(labels[draw_subset(made_up(labels, num_classes=4), "50%", 0)].tolist()) == {0, 2}


def test_a_class_with_too_few_is_named():
    with pytest.raises(
        UserError, match="5-shot: class 'class 3' of 'folder' has 3 samples; ask for at most 3-shot"
    ):
        draw_subset(made_up(SKEWED), "5-shot", 0)


@pytest.mark.parametrize("labels", ["", "10", "10 %", "0%", "100%", "-1%", "0-shot", "5shot", "few", "1e1%"])
def test_words_that_mean_nothing_are_refused(labels):
    with pytest.raises(UserError, match="expected all, a share"):
        check_labels(labels, None)


def test_the_seed_of_no_draw_is_none_and_of_a_draw_zero():
    assert (
        check_labels("all", None) is None and check_labels("1%", None) == 0 and check_labels("5-shot", 7) == 7
    )
    with pytest.raises(UserError, match="seed 7 is of no use with labels all"):
        check_labels("all", 7)
    with pytest.raises(UserError, match="at least 0"):
        check_labels("1%", -1)


def test_the_drawn_keys_are_kept_and_another_draw_under_their_name_is_refused(tmp_path):
    data = made_up(SKEWED)
    ids = open_subset(tmp_path, data, labels="1%", seed=None, write=True)
    path = tmp_path / "subsets" / "1%-seed0.txt"
    head, *keys = path.read_text().splitlines()
    assert head == f"# labels 1%, seed 0: 15 of {len(SKEWED)} samples of data with fingerprint f"
    assert len(keys) == 15 and keys[0] == f"shard-000000.tar/{3 * ids[0]:09d}"
    assert (
        keys[-1] == f"shard-000002.tar/{20_000 + 3 * (ids[-1] - data.ends[1]):09d}" and len(set(keys)) == 15
    )
    assert open_subset(tmp_path, data, labels="1%", seed=0, write=True).tolist() == ids.tolist()
    with pytest.raises(UserError, match="holds another draw"):
        open_subset(tmp_path, made_up(SKEWED, fingerprint="g"), labels="1%", seed=0, write=True)
    open_subset(tmp_path, data, labels="10%", seed=3, write=False)
    open_subset(tmp_path, data, labels="all", seed=None, write=True)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_of_real_shards_the_labels_are_the_pictures_own(tmp_path):
    folder = make_shards(tmp_path / "train", num=20, seed=1)
    shards = ShardSet.open(folder, label="data.train")
    ids = open_subset(tmp_path, shards, labels="2-shot", seed=1, write=True)
    assert sorted(ids * 7 % 3) == [0, 0, 1, 1, 2, 2]  # as make_shards deals them out
    keys = (tmp_path / "subsets" / "2-shot-seed1.txt").read_text().splitlines()[1:]
    assert keys == [f"shard-00000{int(number >= 7)}.tar/{number:09d}" for number in ids]
