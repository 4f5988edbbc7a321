"""The section of a page that shows what a run's detectors found."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from dmae_ds.data.dense import DenseSample, open_dense
from dmae_ds.dense.detector import Detector
from dmae_ds.report import write_report
from dmae_ds.report.dense_boards import add_dense_boards
from dmae_ds.report.detections import NUM_SHOWN, find_detectors, show_detections
from dmae_ds.report.views import Views
from tests.dense.detectors import QUICK, evaluate
from tests.evaluate.conftest import make_run, on_the_cpu

__all__ = ["on_the_cpu"]  # a fixture


@pytest.fixture
def own_scenes(scenes, tmp_path):
    return shutil.copytree(scenes, tmp_path / "scenes")


@pytest.fixture
def run(tmp_path, shards, own_scenes):
    """A run whose folder holds a detector."""
    run = make_run(tmp_path / "run", train=shards[0], val=shards[1], objective="mae")
    data = [f"data.train={own_scenes / 'train'}", f"data.val={own_scenes / 'val'}"]
    short = ["optim.length=0.3", "optim.warmup_steps=0"]
    evaluate(str(run), recipe="vitdet_coco", overrides=[*QUICK, *data, *short])
    return run


def test_the_page_shows_annotated_and_found_objects(run, own_scenes, monkeypatch):
    (folder,) = find_detectors(run)
    assert folder == run / "vitdet_coco"
    val = open_dense(own_scenes / "val")
    chosen = [val[i] for i in range(len(val)) if len(val[i].boxes)][:NUM_SHOWN]
    board = show_detections([folder])
    assert board.labels == ["image", "annotated", "found"]
    assert all(len(images) == len(chosen) for _, images in board.rows)
    (_, plain), (_, annotated), _ = board.rows
    height, width = chosen[0].image.shape[1:]
    factor = plain[0].shape[0] // max(height, width)
    corner = plain[0][: height * factor : factor, : width * factor : factor]
    assert np.array_equal(corner, chosen[0].image.permute(1, 2, 0).numpy())
    assert (annotated[0] != plain[0]).any()

    def find(score):
        """Let the detector find what is annotated, with a score."""

        def forward(self, images):
            sample = next(one for one in chosen if one.image.shape == images[0].shape)
            return [{**as_found(sample), "scores": torch.full((len(sample.boxes),), score)}]

        monkeypatch.setattr(Detector, "forward", forward)

    find(0.9)
    found = dict(show_detections([folder, folder]).rows)[f"found, {folder.name}"]
    for sample, one, other in zip(chosen, found, annotated, strict=True):
        assert np.array_equal(one, other) or sample.crowd.any()
    find(0.4)
    unsure = dict(show_detections([folder]).rows)["found"]
    assert all(np.array_equal(one, other) for one, other in zip(unsure, plain, strict=True))


def as_found(sample: DenseSample) -> dict[str, torch.Tensor]:
    return {"boxes": sample.boxes, "labels": sample.labels + 1, "masks": sample.masks[:, None].float()}


def test_a_page_has_the_section(run):
    page = write_report([run]).read_text()
    assert "<h2>Detections</h2>" in page and 'alt="found, 1"' in page
    assert (run / "figures" / "detections-run.png").is_file()


def test_what_a_run_lacks_is_said_where_another_run_has_it(run, own_scenes):
    other = run.with_name("other")
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("vitdet_coco"))
    assert add_dense_boards({"other": other}, {}) == []  # no section at all
    shutil.move(own_scenes / "val", own_scenes / "moved")
    views = {"run": Views(), "other": Views()}
    assert add_dense_boards({"run": run, "other": other}, views) == ["detections"]
    assert "data.val" in views["run"].missing["detections"] and not views["run"].boards
    assert "eval detect" in views["other"].missing["detections"]
