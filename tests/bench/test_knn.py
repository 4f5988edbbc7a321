"""`dmae-ds bench knn`: the measured memory is what the search computes in advance."""

import inspect
import subprocess
import sys

from dmae_ds.bench.knn import SLACK, bench_knn
from dmae_ds.cli.main import build_parser, main
from dmae_ds.evaluate.knn import evaluate_run
from dmae_ds.report.published import NUM_IMAGENET
from tests.messages import refused

SIZES = {"num_train": 20_000, "dim": 32, "k": 20, "num_classes": 10}


# In its own process: memory that earlier tests freed would be used again, and no peak would be measured.
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


def test_the_command_prints_both_and_the_size_of_the_whole_problem(capsys):
    sizes = {"train": 5000, "queries": 300, "dim": 300, "classes": 10, "memory-gib": 0.5}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    assert main(["bench", "knn", *options]) == 0
    problem, memory, rate, whole = capsys.readouterr().out.splitlines()
    for words in ("300 queries", "5,000 training rows", "width 300 (0.01 GiB)", "k 20", "10 classes"):
        assert words in problem
    assert "512 x 8,192" in memory and "--memory-gib 0.5" in memory and memory.endswith("yes")
    assert "comparisons/s" in rate and whole.startswith("50,000 queries")


def test_the_defaults_are_imagenet_s_size_and_the_library_s_are_those_of_the_command_line():
    args = build_parser().parse_args(["bench", "knn"])
    assert (args.train, args.classes, args.k) == (NUM_IMAGENET, 1000, 20)
    args = build_parser().parse_args(["eval", "knn", "run"])
    defaults = {name: one.default for name, one in inspect.signature(evaluate_run).parameters.items()}
    shared = ("temperature", "pool", "batch_size", "memory_gib", "cache_gib")
    assert {name: getattr(args, name) for name in shared} == {name: defaults[name] for name in shared}


def test_what_can_not_be_measured_is_one_line(capsys):
    with refused("0.001"):
        bench_knn(num_queries=300, memory_gib=0.001, **SIZES)
    assert main(["bench", "knn", "--train", "5", "--k", "6"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--k 6" in line and "--train 5" in line
