"""COCO's layout goes through `dmae-shards make` to training steps with the shipped recipes, but for sizes."""

from __future__ import annotations

import math

import pytest

from dmae_ds.dense.detect import evaluate
from tests.data_prep.dense_sources import make_coco, make_dense
from tests.dense.conftest import rows
from tests.dense.detectors import make_student

SIZES = [
    "detector.channels=8",
    "detector.proposals=20",
    "detector.rois=8",
    "data.num_workers=0",
    "optim.warmup_steps=0",
    "optim.global_batch=2",
    "optim.length=1",
]


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Shards of made-up COCO files: a crowd alone, a grey image, one without annotations, odd sizes."""
    root = tmp_path_factory.mktemp("coco")
    instances = make_coco(root)
    dense = make_dense(root / "train2017", root / "shards", coco=instances)
    samples = [dense[number] for number in range(len(dense))]
    assert sorted(len(sample.boxes) for sample in samples) == [0, 1, 1, 2]
    assert [bool(sample.crowd.all()) for sample in samples if len(sample.boxes)].count(True) == 1
    return root / "shards"


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return make_student(tmp_path_factory.mktemp("student") / "student.safetensors", patch_size=16, depth=4)


def train(student, coco, out, recipe, *sizes):
    data = [f"data.train={coco}", f"data.val={coco}", f"run.dir={out}"]
    return evaluate(str(student), recipe=recipe, overrides=[*data, *SIZES, *sizes])


@pytest.mark.parametrize("recipe", ["vitdet_coco", "maskrcnn_1x_coco", "g2sd_detect_coco_small"])
def test_the_shipped_recipes_train_on_it(student, coco, tmp_path, recipe):
    sizes = ["resize=[48, 80]"] if recipe.startswith("maskrcnn") else ["network.img_size=64"]
    if recipe.startswith("g2sd"):
        train(student, coco, tmp_path / "teacher", "vitdet_coco", *sizes)
        sizes.append(f"distill.teacher={tmp_path / 'teacher' / 'best.safetensors'}")
    result = train(student, coco, tmp_path / "out", recipe, *sizes)
    (row,) = rows(tmp_path / "out")
    assert row["step"] == 2 and math.isfinite(row["loss"])
    assert ("pyramid" in row) == recipe.startswith("g2sd")
    assert result["num_train"] == 4 and 0 <= result["scores"]["box_ap"] <= 100
