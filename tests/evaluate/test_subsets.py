"""Draws of few labels are balanced, nested, the same on every machine, and kept in a file."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import Shard
from dmae_ds.evaluate.subsets import (
    check_labels,
    draw_subset,
    first_difference,
    open_subset,
    warn_of_same_images,
)
from tests.evaluate.conftest import make_shards
from tests.messages import refused


def made_up(labels, *, fingerprint="f", num_classes=None):
    """A shard set of three shards with these labels; keys have gaps, like those that skipped files leave."""
    labels = np.asarray(labels)
    by_shard = np.array_split(labels, 3)
    shards = [Shard(f"shard-{number:06d}.tar", len(part), 0, "") for number, part in enumerate(by_shard)]
    indexes = [
        {
            "label": part.astype(np.int32),
            "number": (10_000 * number + 3 * np.arange(len(part))).astype(np.uint64),
        }
        for number, part in enumerate(by_shard)
    ]
    classes = [f"class {number}" for number in range(num_classes or labels.max() + 1)]
    ends = np.cumsum([len(part) for part in by_shard]).tolist()
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
        ("1%", [10, 3, 1, 1]),  # 2.5 of 250 is rounded up; a class gives at least one
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
def test_draws_of_one_seed_are_nested_and_draws_of_two_seeds_differ(seed):
    drawn = [
        set(draw_subset(made_up(SKEWED), labels, seed).tolist())
        for labels in ("1%", "2%", "10%", "50%", "99%")
    ]
    assert all(small <= large for small, large in itertools.pairwise(drawn))
    assert set(draw_subset(made_up(SKEWED), "1-shot", seed).tolist()) <= set(
        draw_subset(made_up(SKEWED), "3-shot", seed).tolist()
    )
    others = [set(draw_subset(made_up(SKEWED), "10%", other).tolist()) for other in range(5) if other != seed]
    assert drawn[2] not in others


def test_a_draw_depends_on_the_fingerprint_and_never_changes():
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


def test_a_draw_is_uniform_within_a_class():
    labels = np.zeros(40, dtype=np.int64)
    counts = sum(
        np.bincount(draw_subset(made_up(labels, num_classes=1), "25%", seed), minlength=40)
        for seed in range(400)
    )
    assert counts.sum() == 4000 and counts.min() > 60 and counts.max() < 145  # 100 +- 8.7 each


def test_unlabelled_samples_and_empty_classes_give_none():
    labels = np.array([-1, 2, 0, -1, 0, 2, -1, 2, 0])
    assert set(labels[draw_subset(made_up(labels, num_classes=4), "50%", 0)].tolist()) == {0, 2}


def test_a_class_with_too_few_samples_is_named():
    with refused("5-shot", "class 3", "folder", "3-shot"):
        draw_subset(made_up(SKEWED), "5-shot", 0)


@pytest.mark.parametrize("labels", ["", "10", "10 %", "0%", "100%", "-1%", "0-shot", "5shot", "few", "1e1%"])
def test_other_forms_of_labels_are_refused(labels):
    with refused(f"'{labels}'", "all", "10%", "5-shot"):
        check_labels(labels, None)


def test_the_seed_is_none_with_all_labels_and_zero_by_default():
    assert check_labels("all", None) is None
    assert check_labels("1%", None) == 0 and check_labels("5-shot", 7) == 7
    with refused("seed 7", "labels is all", "10%"):
        check_labels("all", 7)
    with refused("seed -1", "at least 0"):
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
    with refused(path, "labels 1%", "seed 0"):
        open_subset(tmp_path, made_up(SKEWED, fingerprint="g"), labels="1%", seed=0, write=True)
    open_subset(tmp_path, data, labels="10%", seed=3, write=False)
    open_subset(tmp_path, data, labels="all", seed=None, write=True)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_draw_of_real_shards_has_the_labels_of_its_images(tmp_path):
    folder = make_shards(tmp_path / "train", num=20, seed=1)
    shards = ShardSet.open(folder, label="data.train")
    ids = open_subset(tmp_path, shards, labels="2-shot", seed=1, write=True)
    assert sorted(ids * 7 % 3) == [0, 0, 1, 1, 2, 2]  # as make_shards assigns them
    keys = (tmp_path / "subsets" / "2-shot-seed1.txt").read_text().splitlines()[1:]
    assert keys == [f"shard-00000{int(number >= 7)}.tar/{number:09d}" for number in ids]


@pytest.mark.parametrize(
    "train, val, words",
    [
        (
            ["ant", "bee", "cat"],
            ["ant", "cat"],
            ("label 1 is 'bee'", "'cat' in data.val", "data.val has no 'bee'"),
        ),
        (["ant", "bee"], ["ant", "bee", "cow"], ("label 2 is no class", "data.train has no 'cow'")),
        (["bee", "ant"], ["ant", "bee"], ("label 0 is 'bee'", "'ant' in data.val")),
        (["Cat"], ["cat"], ("label 0 is 'Cat'", "'cat'")),
        (["L\u00f6we"], ["Lo\u0308we"], (r"'L\xf6we'", r"'Lo\u0308we'")),
        (["0"], ["n01440764"], ("'0'", "'n01440764'")),
    ],
)
def test_the_first_class_that_differs_is_named(train, val, words):
    text = first_difference(train, val)
    assert all(word in text for word in words), text


@pytest.mark.parametrize("val, rank, num_lines", [("f", "0", 1), ("g", "0", 0), ("f", "1", 0)])
def test_validation_on_the_training_images_is_a_warning_of_one_rank(
    monkeypatch, capsys, val, rank, num_lines
):
    monkeypatch.setenv("RANK", rank)
    warn_of_same_images(made_up(SKEWED), made_up(SKEWED, fingerprint=val))
    assert capsys.readouterr().err.count("data.train") == num_lines * 2
