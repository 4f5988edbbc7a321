"""evaluate/agreement.py: neighbours that student and teacher have in common, compared with a slow loop."""

from __future__ import annotations

import pytest
import torch

from dmae_ds.cli.main import main
from dmae_ds.evaluate.agreement import agreement
from dmae_ds.evaluate.logistic import ALONE
from dmae_ds.evaluate.results import read_results
from tests.evaluate.conftest import make_run, make_teacher
from tests.evaluate.test_neighbours import random_rows


def slow(ours, theirs, k):
    """The share, image by image."""

    def neighbours(features, row):
        cosines = torch.nn.functional.cosine_similarity(features.double(), features[row].double()[None])
        order = sorted(range(len(features)), key=lambda other: -cosines[other])
        return set([other for other in order if other != row][:k])

    shares = [len(neighbours(ours, row) & neighbours(theirs, row)) / k for row in range(len(ours))]
    return sum(shares) / len(shares)


@pytest.mark.parametrize("k", [1, 7])
def test_equals_a_slow_loop(k):
    ours, noise = random_rows(60, 1), random_rows(60, 2)
    theirs = ours + noise
    share = agreement(ours, theirs, k=k, memory_gib=1, processes=ALONE)
    assert share == pytest.approx(slow(ours, theirs, k))
    assert 0.05 < share < 0.9
    assert agreement(ours, 3 * ours, k=k, memory_gib=1, processes=ALONE) == 1


def test_equal_images_are_neighbours_of_each_other():
    ours = random_rows(4, 1).repeat_interleave(3, dim=0)
    assert agreement(ours, ours, k=2, memory_gib=1, processes=ALONE) == 1


def test_the_command_needs_a_teacher_and_no_labels(tmp_path, shards, capsys):
    teacher = make_teacher(tmp_path / "teacher.safetensors")
    run = make_run(tmp_path / "run", train=shards[0], val=shards[1], teacher=teacher)
    assert main(["eval", "agreement", str(run), "--k", "3"]) == 0
    (result,) = read_results(run)
    assert result["metric"] == "agreement" and 0 <= result["scores"]["overlap"] <= 100
    assert (result["settings"]["k"], result["num_val"]) == (3, 11)
    assert main(["eval", "agreement", str(run), "--k", "11"]) == 2
    assert "10" in capsys.readouterr().err
    alone = make_run(tmp_path / "mae", train=shards[0], val=shards[1], objective="mae")
    assert main(["eval", "agreement", str(alone)]) == 2
    assert "teacher" in capsys.readouterr().err
