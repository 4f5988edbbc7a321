"""From the folders of published data sets, through `dmae-shards make`, to training steps of the recipes."""

from __future__ import annotations

import shutil

from tests.data_prep.dense_sources import make_ade20k, make_dense, make_voc
from tests.dense.conftest import segment
from tests.evaluate.conftest import make_run


def test_ade20k_becomes_a_segmenter(tmp_path, on_the_cpu):
    root = make_ade20k(tmp_path / "ADEChallengeData2016")
    for kind in ("images", "annotations"):
        shutil.copytree(root / kind / "training", root / kind / "validation")
    for name, part in (("train", "training"), ("val", "validation")):
        make_dense(
            root / "images" / part,
            tmp_path / name,
            masks=root / "annotations" / part,
            classes=root / "objectInfo150.txt",
            zero_is_unlabelled=True,
        )
    run = make_run(tmp_path / "run", train=tmp_path / "train", val=tmp_path / "val", objective="mae")
    result = segment(run, "optim.length=2", "optim.evaluate_every=2")
    assert set(result["scores"]) >= {"miou"} and 0 <= result["scores"]["miou"] <= 100


def test_voc_becomes_a_linear_segmenter(tmp_path, on_the_cpu):
    root = make_voc(tmp_path / "VOC2012")
    dense = make_dense(
        root / "JPEGImages",
        tmp_path / "train",
        masks=root / "SegmentationClass",
        only=root / "ImageSets" / "Segmentation" / "train.txt",
        num_classes=21,
    )
    run = make_run(tmp_path / "run", train=tmp_path / "train", val=tmp_path / "train", objective="mae")
    result = segment(run, "optim.length=2", "optim.evaluate_every=2", recipe="linear_segment_ade20k")
    assert result["num_val"] == len(dense) == 2
