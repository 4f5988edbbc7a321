"""The weighted vote against scikit-learn's, and what `dmae-ds eval knn` says, writes and refuses."""

import json

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from dmae_ds.errors import UserError
from dmae_ds.evaluate.knn import evaluate_run, knn_predict
from tests.evaluate.conftest import STEP, make_run, make_shards


def _random(num, seed, dim=12, num_classes=7):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(num, dim)).astype(np.float32) * rng.uniform(0.1, 9, (num, 1)).astype(np.float32), rng.integers(0, num_classes, num)


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (5, 1.0), (20, 0.07), (20, 0.5), (300, 0.2)])
def test_equals_scikit_learns_weighted_vote(k, temperature):
    (train, labels), (test, _) = _random(300, seed=1), _random(101, seed=2)
    reference = KNeighborsClassifier(k, weights=lambda distance: np.exp((1 - distance) / temperature), metric="cosine", algorithm="brute")
    expected = reference.fit(train, labels).predict(test)
    found = knn_predict(torch.from_numpy(train), torch.from_numpy(labels), torch.from_numpy(test), k=k, temperature=temperature, num_classes=7, block=32)
    assert found.tolist() == expected.tolist()
    assert len(set(expected.tolist())) > 1


def test_the_block_changes_nothing():
    (train, labels), (test, _) = _random(90, seed=3), _random(40, seed=4)
    one, all_at_once = (
        knn_predict(torch.from_numpy(train), torch.from_numpy(labels), torch.from_numpy(test), k=9, temperature=0.07, num_classes=7, block=block)
        for block in (1, 1000)
    )
    assert torch.equal(one, all_at_once)


@pytest.mark.parametrize("temperature", [1e-4, 1e-9])
def test_a_very_low_temperature_asks_the_nearest_alone(temperature):
    (train, labels), (test, _) = (tuple(map(torch.from_numpy, _random(num, seed))) for num, seed in ((90, 5), (40, 6)))
    found, nearest = (knn_predict(train, labels, test, k=k, temperature=t, num_classes=7) for k, t in ((20, temperature), (1, 1.0)))
    assert torch.equal(found, nearest)


def test_one_near_neighbour_outvotes_two_far_ones_and_equal_votes_go_to_the_lowest_class():
    train = torch.tensor([[1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    vote = {"k": 3, "temperature": 0.07, "num_classes": 3}
    assert knn_predict(train, torch.tensor([2, 1, 1]), torch.tensor([[1.0, 0.0]]), **vote).tolist() == [2]
    assert knn_predict(torch.ones(2, 2), torch.tensor([2, 1]), torch.ones(1, 2), **{**vote, "k": 2}).tolist() == [1]


def test_says_one_line_and_writes_it_down(run, capsys):
    result = evaluate_run(run, k=3, batch_size=4)
    # Even a random student tells red from green from blue.
    assert capsys.readouterr().out == "knn top-1 100.0% (k 3, T 0.07, mean pool, 20 train, 11 val)\n"
    expected = {"top1": 100.0, "k": 3, "temperature": 0.07, "pool": "mean", "num_train": 20, "num_val": 11, "step": STEP}
    assert result == json.loads((run / "knn.json").read_text()) == expected
    evaluate_run(run, k=4, pool="cls", temperature=0.5)
    assert json.loads((run / "knn.json").read_text()) == {**expected, "k": 4, "pool": "cls", "temperature": 0.5}
    assert not list(run.glob("*.tmp"))


def test_top1_is_the_percentage_of_right_answers(tmp_path):
    train, val = make_shards(tmp_path / "train", num=19, seed=7), make_shards(tmp_path / "val", num=9, seed=8)
    run = make_run(tmp_path / "run", train=train, val=val)
    # At T = 1e6 all 19 vote alike: red, with 7 pictures the most frequent, always wins, and 3 of the 9 are red.
    assert evaluate_run(run, k=19, temperature=1e6)["top1"] == pytest.approx(100 / 3)


def test_what_makes_no_vote_is_refused_in_one_line(tmp_path, shards):
    train, val = shards
    alone = make_shards(tmp_path / "alone", num=9, seed=3, classes=["all"], labels=0)
    other = make_shards(tmp_path / "other", num=9, seed=3, classes=["red", "green", "brown"])
    for name, folders, options, message in (
        ("null", (train, None), {}, "data.val is null"),
        ("large", (train, val), {"k": 21}, "k 21 is larger than the training set of 20"),
        ("unlabelled", (alone, alone), {"k": 1}, "data.train .* has 1 class"),
        ("others", (train, other), {"k": 1}, "different classes"),
        ("zero", (train, val), {"k": 0}, "above 0"),
        ("cold", (train, val), {"temperature": 0.0}, "above 0"),
        ("pool", (train, val), {"pool": "max"}, "one of mean, cls"),
    ):
        run = make_run(tmp_path / name, train=folders[0], val=folders[1])
        with pytest.raises(UserError, match=message) as error:
            evaluate_run(run, **{"k": 3, **options})
        assert "\n" not in str(error.value) and not (run / "knn.json").exists()
    with pytest.raises(UserError, match="not a run folder"):
        evaluate_run(tmp_path)
