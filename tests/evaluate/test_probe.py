"""The probe compared with scikit-learn's, its choice of l2, and the output of `dmae-ds eval probe`."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from dmae_ds.evaluate import logistic, probe
from dmae_ds.evaluate.logistic import fit_probe
from dmae_ds.evaluate.probe import GRID, accuracy, evaluate_run, hold_out
from dmae_ds.evaluate.results import read_results
from tests.messages import refused


@pytest.fixture(scope="module")
def digits_rows():
    """scikit-learn's digits after a random layer with offsets and scales, and labels."""
    pixels, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    rows = (
        np.maximum(pixels @ rng.normal(size=(64, 96)) / 16, 0) * rng.uniform(0.01, 50, 96)
        + rng.normal(size=96) * 20
    )
    rows[:, 7] = 3.25  # a constant feature
    return torch.from_numpy(rows).float(), torch.from_numpy(labels)


def scikit_learns(rows, labels, *, l2):
    scaler = StandardScaler().fit(rows.double().numpy())
    model = LogisticRegression(C=1 / (l2 * len(rows)), tol=1e-9, max_iter=5000).fit(
        scaler.transform(rows.double().numpy()), labels.numpy()
    )
    return model, lambda queries: model.predict_proba(scaler.transform(queries.double().numpy()))


@pytest.mark.parametrize("l2", [0.1, 1e-2, 1e-3])
def test_equals_scikit_learns_logistic_regression(digits_rows, l2):
    rows, labels = digits_rows
    fitted = fit_probe(rows[:1400], labels[:1400], l2=l2, num_classes=10)
    model, predict = scikit_learns(rows[:1400], labels[:1400], l2=l2)
    assert fitted.converged and fitted.gradient < 1e-4
    np.testing.assert_allclose(fitted.weight.numpy(), model.coef_, atol=2e-3)
    np.testing.assert_allclose(
        fitted.scores(rows[1400:]).softmax(dim=1).numpy(), predict(rows[1400:]), atol=2e-3
    )
    top1, top5 = accuracy(fitted, rows[1400:], labels[1400:])
    expected = 100 * (predict(rows[1400:]).argmax(axis=1) == labels[1400:].numpy()).mean()
    assert abs(top1 - expected) < 0.2 and 80 < top1 < top5 <= 100


def test_blocks_of_rows_and_float32_change_almost_nothing(digits_rows, monkeypatch):
    rows, labels = digits_rows
    whole = fit_probe(rows[:500], labels[:500], l2=1e-2, num_classes=10)
    for name, value in (("BLOCK", 64), ("MANY_PRODUCTS", 0)):
        with monkeypatch.context() as patch:
            patch.setattr(logistic, name, value)
            other = fit_probe(rows[:500], labels[:500], l2=1e-2, num_classes=10)
        torch.testing.assert_close(other.weight, whole.weight, atol=1e-3, rtol=0)


def test_processes_share_the_rows_and_fit_the_same(digits_rows):
    rows, labels = digits_rows[0][:501], digits_rows[1][:501]
    alone = fit_probe(rows, labels, l2=1e-2, num_classes=10)
    barrier, sums, probes = threading.Barrier(2, timeout=60), [None, None], [None, None]

    class Process:
        num_processes = 2

        def __init__(self, index):
            self.process_index = index

        def reduce(self, tensor):
            sums[self.process_index] = tensor
            barrier.wait()
            total = sums[0] + sums[1]
            barrier.wait()
            return total

    def work(index):
        probes[index] = fit_probe(rows, labels, l2=1e-2, num_classes=10, processes=Process(index))

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(probes[0].weight, probes[1].weight)
    torch.testing.assert_close(probes[0].weight, alone.weight, atol=1e-3, rtol=0)


def test_a_fit_that_used_all_its_iterations_has_not_converged(digits_rows):
    assert not fit_probe(digits_rows[0], digits_rows[1], l2=1e-4, num_classes=10, max_iterations=5).converged


def test_a_start_is_converted_to_the_statistics_of_the_new_rows(digits_rows):
    rows, labels = digits_rows[0][:900], digits_rows[1][:900]
    fitted = fit_probe(rows, labels, l2=1e-2, num_classes=10)
    moved = replace(
        fitted,
        mean=fitted.mean + 5,
        std=fitted.std * 2,
        weight=fitted.weight * 2,
        bias=fitted.bias + fitted.weight @ (5 / fitted.std),
    )
    torch.testing.assert_close(moved.scores(rows), fitted.scores(rows), atol=1e-3, rtol=0)
    again = fit_probe(rows, labels, l2=1e-2, num_classes=10, start=moved)
    assert again.iterations < 10 < fitted.iterations
    torch.testing.assert_close(again.weight, fitted.weight, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "scores, expected", [([50, 60, 70, 80, 90, 91], 1e-5), ([50, 90, 90, 90, 20, 10], 0.1), ([0] * 6, 1.0)]
)
def test_the_chosen_l2_is_the_best_on_held_out_rows_and_the_strongest_among_equals(
    monkeypatch, scores, expected
):
    rows, labels = torch.arange(40.0)[:, None], torch.arange(40) % 4
    held_out, starts = rows[torch.from_numpy(hold_out(labels.numpy(), 0.1))], []

    def fit(features, classes, *, l2, start, **options):
        assert not set(features.flatten().tolist()) & set(held_out.flatten().tolist()) and len(
            features
        ) == 36 == len(classes)
        starts.append(start)
        return f"probe of {l2}"

    def score(fitted, features, classes):
        assert torch.equal(features, held_out) and len(classes) == 4
        return scores[GRID.index(float(fitted.removeprefix("probe of ")))], None

    monkeypatch.setattr(probe, "fit_probe", fit)
    monkeypatch.setattr(probe, "accuracy", score)
    assert probe.choose_l2(rows, labels, num_classes=4, max_iterations=9) == (
        expected,
        f"probe of {expected}",
    )
    assert starts == [None, *(f"probe of {l2}" for l2 in GRID[:-1])]


@pytest.mark.parametrize("counts", [[10, 10], [2, 30, 7], [1, 5, 1], [1000, 4]])
def test_a_tenth_of_each_class_is_held_out_but_never_all_of_it(counts):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    held_out = hold_out(labels, 0.1)
    expected = [min(max(1, round(count / 10)), count - 1) for count in counts]
    assert np.bincount(labels[held_out], minlength=len(counts)).tolist() == expected
    assert np.array_equal(held_out, hold_out(labels, 0.1))


def test_a_line_is_printed_and_written(run, capsys):
    result = evaluate_run(run, l2=0.1)
    expected = "probe top-1 100.0% (l2 0.1 given, mean pool, 20 train, 11 val; 95%: 74.1 to 100.0)\n"
    assert capsys.readouterr().out == expected
    assert read_results(run) == [result] and result["metric"] == "probe" and set(result["scores"]) == {"top1"}
    assert result["settings"] == {"l2": 0.1, "pool": "mean", "precision": "fp32"}
    result = evaluate_run(run, labels="3-shot", pool="cls")
    line = capsys.readouterr().out
    assert "held out, cls pool" in line and "9 train, 11 val, 3-shot of the labels, seed 0; 95%: " in line
    assert result["settings"]["l2"] == "held-out" and len(read_results(run)) == 2
    assert (result["num_train"], result["labels"]) == (9, "3-shot")


def test_numbers_and_labels_that_allow_no_fit_are_refused(run):
    for options, words in (
        ({"l2": 0.0}, ("l2 0", "above 0")),
        ({"max_iterations": 0}, ("iterations 0", "above 0")),
        ({"labels": "1-shot"}, ("--l2", "second")),
        ({"pool": "max"}, ("pool", "max", "mean", "cls")),
        ({"pool": "patches"}, ("pool", "patches", "mean", "cls")),
    ):
        with refused(*words):
            evaluate_run(run, **options)
        assert not (run / "results.jsonl").exists()
