"""`dmae-ds bench knn`: the memory it measures is the memory that the search computes for itself."""

import subprocess
import sys

import pytest

from dmae_ds.bench.knn import SLACK, bench_knn
from dmae_ds.cli.main import main
from dmae_ds.errors import UserError

SIZES = {"num_train": 20_000, "dim": 32, "k": 20, "num_classes": 10}


# In a process of its own: what earlier tests left in the heap would be used again, and no peak would be seen.
MEASURE = f"""
from dmae_ds.bench.knn import measure
from dmae_ds.evaluate.neighbours import Blocks
for queries in (256, 1024):
    measured = measure(Blocks(queries, 20_480), num_queries=1024, **{SIZES})
    print(measured.computed, measured.peak)
"""


def test_the_peak_is_the_computed_one_and_grows_with_the_block():
    lines = subprocess.run(
        [sys.executable, "-c", MEASURE], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    small, large = (tuple(map(int, line.split())) for line in lines)
    assert large[0] > small[0] + SLACK > 2 * SLACK - small[0]
    for computed, peak in (small, large):
        assert 0.6 * computed < peak < computed + SLACK


def test_the_command_prints_both_and_the_whole_problem_s(capsys):
    assert (
        main(
            [
                "bench",
                "knn",
                "--train",
                "5000",
                "--queries",
                "300",
                "--dim",
                "16",
                "--classes",
                "10",
                "--memory-gib",
                "0.5",
            ]
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "300 queries against 5,000 training rows of width 16 (0.00 GiB), k 20, 10 classes, on "
    )
    assert "blocks of 512 x 8,192" in lines[1] and "within --memory-gib 0.5 and 64 MiB: yes" in lines[1]
    assert "comparisons/s" in lines[2] and lines[3].startswith("50,000 queries: blocks of ")


def test_what_cannot_be_measured_is_one_line(capsys):
    with pytest.raises(UserError, match="--memory-gib"):
        bench_knn(num_queries=300, memory_gib=0.001, **SIZES)
    assert main(["bench", "knn", "--train", "5", "--k", "6"]) == 2
    assert "--k 6 is larger than --train 5" in capsys.readouterr().err
