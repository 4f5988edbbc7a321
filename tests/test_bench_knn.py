"""`dmae-ds bench knn`: the memory it measures is the memory that the search computes for itself."""

import pytest

from dmae_ds.bench.knn import SLACK, bench_knn, measure
from dmae_ds.cli import main
from dmae_ds.errors import UserError
from dmae_ds.evaluate.neighbours import Blocks

SIZES = {"num_train": 20_000, "dim": 32, "k": 20, "num_classes": 10}


def test_the_peak_is_the_computed_one_and_grows_with_the_block():
    small, large = (measure(Blocks(queries, 20_480), num_queries=1024, **SIZES) for queries in (256, 1024))
    assert large.computed > small.computed + SLACK > 2 * SLACK - small.computed
    for measured in (small, large):
        assert 0.6 * measured.computed < measured.peak < measured.computed + SLACK


def test_the_command_prints_both_and_the_whole_problem_s(capsys):
    assert main(["bench", "knn", "--train", "5000", "--queries", "300", "--dim", "16", "--classes", "10", "--memory-gib", "0.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("300 queries against 5,000 training rows of width 16 (0.00 GiB), k 20, 10 classes, on ")
    assert "blocks of 512 x 8,192" in lines[1] and "within --memory-gib 0.5 and 64 MiB: yes" in lines[1]
    assert "comparisons/s" in lines[2] and lines[3].startswith("50,000 queries: blocks of ")


def test_what_cannot_be_measured_is_one_line(capsys):
    with pytest.raises(UserError, match="need at least"):
        bench_knn(num_queries=300, memory_gib=0.001, **SIZES)
    assert main(["bench", "knn", "--train", "5", "--k", "6"]) == 2
    assert "--k 6 is larger than --train 5" in capsys.readouterr().err
