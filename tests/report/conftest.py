"""Fixtures: a page of two tiny runs, written once."""

import pytest

from dmae_ds.evaluate.results import append_result
from dmae_ds.report import write_report
from tests.evaluate.conftest import Metrics, knn_result, make_run, make_shards, make_teacher

ODD_NAME = "<u>&$x$"


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return make_shards(folder / "train", num=20, seed=1), make_shards(folder / "val", num=11, seed=2)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors")


@pytest.fixture(scope="session")
def reported(tmp_path_factory, shards, teacher):
    """(page, folder) of two runs.

    One is DMAE with a dead term, a collapse and a name to escape; the other is MAE with norm_pix and k-NN.
    """
    folder = tmp_path_factory.mktemp("runs")
    dead = make_run(
        folder / ODD_NAME,
        train=shards[0],
        val=shards[1],
        metrics=Metrics(share=0.02, rank=1.25),
        teacher=teacher,
    )
    plain = make_run(
        folder / "plain",
        train=shards[0],
        val=shards[1],
        objective="mae",
        norm_pix=True,
        metrics=Metrics(knn=40.0),
    )
    append_result(plain, knn_result(71.25))
    out = write_report([dead, plain])
    assert out == dead / "comparison.html" and not list(folder.rglob("*.tmp"))
    return out.read_text(encoding="utf-8"), folder
