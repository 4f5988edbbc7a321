"""The weighted vote compared with scikit-learn's, and what `dmae-ds eval knn` prints, writes and refuses."""

import shutil

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from dmae_ds.cli.main import main
from dmae_ds.evaluate.knn import evaluate_run, knn_predict
from dmae_ds.evaluate.neighbours import TILE, Blocks
from dmae_ds.evaluate.results import read_results
from tests.evaluate.conftest import STEP, make_run, make_shards
from tests.evaluate.test_neighbours import random_rows
from tests.messages import refused


def scikit_learns(train, labels, queries, *, k, temperature):
    """scikit-learn's brute-force weighted vote, in float64."""
    reference = KNeighborsClassifier(
        k, weights=lambda distance: np.exp((1 - distance) / temperature), metric="cosine", algorithm="brute"
    )
    return reference.fit(train.double().numpy(), labels.numpy()).predict(queries.double().numpy())


def random_labels(num, *, num_classes=7):
    return torch.from_numpy(np.random.default_rng(9).integers(0, num_classes, num))


@pytest.mark.parametrize("temperature", [0.07, 0.5, 1.0])
def test_equals_scikit_learns_weighted_vote_for_every_k_at_once(temperature):
    train, labels, queries = random_rows(300, 1), random_labels(300), random_rows(101, 2)
    predicted = knn_predict(
        train, labels, queries, ks=[1, 5, 20, 300], temperature=temperature, num_classes=7, blocks=TILE
    )
    for k, classes in predicted.items():
        expected = scikit_learns(train, labels, queries, k=k, temperature=temperature)
        assert classes[:, 0].tolist() == expected.tolist()
        assert len(set(expected.tolist())) > 1


@pytest.fixture(scope="module")
def digits_features():
    """scikit-learn's digits: pixels, features of an untrained student (with cosines near 1), and labels."""
    digits, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(digits).float()
    torch.manual_seed(0)
    student = timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=0,
        in_chans=1,
        img_size=8,
        patch_size=2,
        embed_dim=48,
        depth=2,
        num_heads=2,
    ).eval()
    with torch.inference_mode():
        features = student.forward_features(pixels.view(-1, 1, 8, 8) / 16)[:, 1:].mean(dim=1)
    return {"pixels": pixels, "features": features.clone()}, torch.from_numpy(labels)


@pytest.mark.parametrize("what", ["pixels", "features"])
def test_equals_scikit_learns_on_the_digits_exactly(digits_features, what):
    rows, labels = digits_features[0][what], digits_features[1]
    predicted = knn_predict(
        rows[:1400],
        labels[:1400],
        rows[1400:],
        ks=[1, 10, 20, 100],
        temperature=0.07,
        num_classes=10,
        blocks=TILE,
    )
    for k, classes in predicted.items():
        assert (
            classes[:, 0].tolist()
            == scikit_learns(rows[:1400], labels[:1400], rows[1400:], k=k, temperature=0.07).tolist()
        )


def test_one_k_is_the_same_alone_and_among_others_and_in_any_blocks():
    train, labels, queries = random_rows(9000, 3), random_labels(9000), random_rows(600, 4)
    options = {"temperature": 0.07, "num_classes": 7}
    alone = knn_predict(train, labels, queries, ks=[9], blocks=Blocks(256, 4096), **options)
    among = knn_predict(train, labels, queries, ks=[3, 9, 50], blocks=Blocks(768, 12288), **options)
    assert torch.equal(alone[9], among[9]) and not torch.equal(among[3], among[50])


@pytest.mark.parametrize("temperature", [1e-4, 1e-9])
def test_with_a_very_low_temperature_only_the_nearest_counts(temperature):
    train, labels, queries = random_rows(90, 5), random_labels(90), random_rows(40, 6)
    predicted, nearest = (
        knn_predict(train, labels, queries, ks=[k], temperature=t, num_classes=7, blocks=TILE)[k]
        for k, t in ((20, temperature), (1, 1.0))
    )
    assert torch.equal(predicted[:, 0], nearest[:, 0])


def test_votes_equal_those_computed_by_hand():
    train = torch.tensor([[1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    options = {"temperature": 0.07, "num_classes": 6, "blocks": TILE}
    # One near neighbour outvotes two far ones; classes without votes are not among the best five.
    assert knn_predict(train, torch.tensor([2, 1, 1]), torch.tensor([[1.0, 0.0]]), ks=[3], **options)[
        3
    ].tolist() == [[2, 1, -1, -1, -1]]
    # Equal votes go to the lowest class.
    assert knn_predict(torch.ones(2, 2), torch.tensor([4, 1]), torch.ones(1, 2), ks=[2], **options)[
        2
    ].tolist() == [[1, 4, -1, -1, -1]]
    assert knn_predict(train, torch.tensor([2, 1, 1]), torch.empty(0, 2), ks=[2], **options)[2].shape == (
        0,
        5,
    )


def test_a_line_is_printed_and_written_for_every_k(run, capsys):
    results = evaluate_run(run, ks=[7, 3], batch_size=4)
    # Even a random student separates red, green and blue.
    assert capsys.readouterr().out == "".join(
        f"knn top-1 100.0% (k {k}, T 0.07, mean pool, 20 train, 11 val; 95%: 74.1 to 100.0)\n" for k in (3, 7)
    )
    assert results == read_results(run) and [result["settings"]["k"] for result in results] == [3, 7]
    assert results[0]["settings"] == {"k": 3, "temperature": 0.07, "pool": "mean", "precision": "fp32"}
    expected = {
        "metric": "knn",
        "scores": {"top1": 100.0},
        "labels": "all",
        "subset_seed": None,
        "step": STEP,
        "num_train": 20,
        "num_val": 11,
    }
    assert {name: results[0][name] for name in expected} == expected
    assert results[0]["device"] == "cpu" and results[0]["world_size"] == 1
    evaluate_run(run, ks=[4], pool="cls", temperature=0.5)
    settings = {"k": 4, "temperature": 0.5, "pool": "cls", "precision": "fp32"}
    assert read_results(run)[-1]["settings"] == settings and len(read_results(run)) == 3
    assert not list(run.rglob("*.tmp"))


def test_only_the_drawn_labels_vote_and_their_keys_are_kept(run, capsys):
    (result,) = evaluate_run(run, ks=[2], labels="2-shot", subset_seed=1)
    line = capsys.readouterr().out
    assert line.startswith(f"knn top-1 {result['scores']['top1']:.1f}% (k 2, ") and line.count("\n") == 1
    assert "6 train, 11 val, 2-shot of the labels, seed 1; 95%: " in line
    assert (result["labels"], result["subset_seed"], result["num_train"]) == ("2-shot", 1, 6)
    assert len((run / "subsets" / "2-shot-seed1.txt").read_text().splitlines()) == 7
    with refused(7, "2-shot", 6):
        evaluate_run(run, ks=[7], labels="2-shot", subset_seed=1)


def test_top1_and_top5_are_percentages_of_right_answers(tmp_path):
    classes = ["red", "green", "blue", "black", "white", "grey"]
    train, val = (
        make_shards(tmp_path / "train", num=19, seed=7, classes=classes),
        make_shards(tmp_path / "val", num=9, seed=8, classes=classes),
    )
    run = make_run(tmp_path / "run", train=train, val=val)
    # At T = 1e6 all 19 have the same weight: red, the most frequent with 7, always wins, and 3 of the 9 are
    # red.
    (result,) = evaluate_run(run, ks=[19], temperature=1e6)
    assert result["scores"] == {"top1": pytest.approx(100 / 3), "top5": 100}
    # One neighbour names one class.
    first, second = (evaluate_run(run, ks=[1], temperature=t)[0]["scores"] for t in (1e6, 0.07))
    assert first["top5"] == second["top1"]


def test_runs_and_numbers_that_allow_no_vote_are_refused(tmp_path, shards):
    train, val = shards
    alone = make_shards(tmp_path / "alone", num=9, seed=3, classes=["all"], labels=0)
    other = make_shards(tmp_path / "other", num=9, seed=3, classes=["red", "green", "brown"])
    for name, folders, options, words in (
        ("null", (train, None), {}, ("data.val", "null")),
        ("large", (train, val), {"ks": [1, 21]}, ("--k", 21, 20)),
        ("unlabelled", (alone, alone), {"ks": [1]}, ("data.train", alone, "1 class")),
        ("others", (train, other), {"ks": [1]}, ("data.train", "data.val", "classes")),
        ("zero", (train, val), {"ks": [0, 3]}, ("k 0 3", "above 0")),
        ("cold", (train, val), {"temperature": 0.0}, ("temperature 0", "above 0")),
        ("pool", (train, val), {"pool": "max"}, ("pool", "max", "mean", "cls")),
        ("patches", (train, val), {"pool": "patches"}, ("pool", "patches", "mean", "cls")),
        ("batch", (train, val), {"batch_size": 0}, ("batch size 0", 1)),
        ("small", (train, val), {"memory_gib": 1e-3}, ("--memory-gib", 0.001, "GiB")),
        ("labels", (train, val), {"labels": "some"}, ("labels", "some", "10%", "5-shot")),
    ):
        run = make_run(tmp_path / name, train=folders[0], val=folders[1])
        with refused(*words):
            evaluate_run(run, **{"ks": [3], **options})
        assert not (run / "results.jsonl").exists()
    with refused(tmp_path, "run folder"):
        evaluate_run(tmp_path, ks=[1])


def test_features_that_are_not_finite_are_refused(run):
    weights = load_file(run / "student.safetensors")
    weights["norm.weight"][:] = float("nan")
    save_file(weights, run / "student.safetensors")
    with refused("features", "finite"):
        evaluate_run(run, ks=[1])


def test_one_command_takes_several_runs_and_shares(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        shutil.copytree(run, name)
    calls = []
    monkeypatch.setattr(
        "dmae_ds.evaluate.knn.evaluate_run",
        lambda source, *, labels, subset_seed, **options: calls.append(
            (source.run.name, labels, subset_seed)
        ),
    )
    assert main(["eval", "knn", "a", "b", "--labels", "all", "10%", "--subset-seed", "3"]) == 0
    assert calls == [("a", "all", None), ("a", "10%", 3), ("b", "all", None), ("b", "10%", 3)]
    assert capsys.readouterr().out == "a:\nb:\n"
    calls.clear()
    assert main(["eval", "knn", "a", "--subset-seed", "3"]) == 2  # nothing is drawn
    assert not calls
