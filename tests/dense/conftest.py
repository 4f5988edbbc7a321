"""Run folders with random students on scenes of digits, and `dmae-ds eval segment` in this process."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from dmae_ds.dense.segment import evaluate
from tests.evaluate.conftest import make_run, on_the_cpu, shards

__all__ = ["on_the_cpu", "shards"]  # fixtures

# Six steps of four crops of 16 px.
QUICK = [
    "network.img_size=16",
    "short_side=24",
    "optim.global_batch=4",
    "optim.lr=0.01",
    "optim.length=6",
    "optim.evaluate_every=3",
    "optim.save_every=2",
    "optim.warmup_steps=1",
    "data.num_workers=0",
]
SMALL_HEAD = ["head.channels=8", "head.pool_scales=[1,2]", "head.auxiliary_channels=4"]


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread, so that sums do not depend on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def scene_run(tmp_path, scenes):
    """A run whose data are the scenes."""
    return make_run(tmp_path / "run", train=scenes / "train", val=scenes / "val", objective="mae")


def segment(weights, *overrides, recipe="upernet_ade20k", **options):
    """Run `dmae-ds eval segment` in this process. Returns the line of results.jsonl."""
    head = [] if recipe.startswith("linear") else SMALL_HEAD
    return evaluate(str(weights), recipe=recipe, overrides=[*QUICK, *head, *overrides], **options)


def rows(out):
    """The lines of metrics.jsonl without their times."""
    return [
        {name: value for name, value in json.loads(line).items() if name != "seconds"}
        for line in (out / "metrics.jsonl").read_text().splitlines()
    ]


def assert_same_outcome(one, other):
    for name in ("last.safetensors", "best.safetensors"):
        expected, actual = load_file(one / name), load_file(other / name)
        assert expected.keys() == actual.keys(), name
        assert all(torch.equal(expected[key], actual[key]) for key in expected), name
    assert rows(one) == rows(other)
