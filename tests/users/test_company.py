"""A company with images and a teacher of its own and without labels, from the READMEs' commands alone."""

from __future__ import annotations

import json
import shutil

import onnx
import pytest

from tests.users.conftest import SMALL, TEACHER, json_lines, save_images, save_teacher

pytestmark = pytest.mark.slow
KEYS = """
def to_timm(name):
    return name.removeprefix("encoder.") if name.startswith("encoder.") else None
"""


def test_own_images_an_own_teacher_and_no_labels(shell, digits):
    folder = shell.folder
    save_images(folder / "scans", number=60, channels=4)
    save_images(folder / "later", number=20)
    save_teacher(folder / "teacher.safetensors", prefix="encoder.")
    (folder / "keys.py").write_text(KEYS)

    # A place that training cannot write to is refused before anything is written.
    shell("dmae-ds train digits_dmae run.dir=s3://bucket/run", code=2)
    assert not (folder / "s3:").exists()

    shell("dmae-shards make scans shards/train --unlabelled")
    assert "60" in shell.text and "transparen" in shell.text
    shell("dmae-shards make later shards/val --unlabelled")
    shell("dmae-shards verify shards/train")
    shell("dmae-shards info shards/train --mean-std --sheet sheet.png")
    assert (folder / "sheet.png").exists() and "data.mean" in shell.text

    teacher = ["teacher.weights=teacher.safetensors", "teacher.format=keys:to_timm", *TEACHER]
    data = ["data.train=shards/train", "data.val=shards/val"]
    run = ["run.dir=runs/scans", *teacher, *data, *SMALL, "optim.epochs=4", "eval.loss_every=2"]
    shell("dmae-ds train digits_dmae", *run)
    lines = json_lines(folder / "runs" / "scans" / "metrics.jsonl")
    measured = [line for line in lines if "val/loss" in line]
    assert len(measured) == 2 and {"val/pixel"} < set(measured[-1])

    # Without labels: agreement with the teacher's neighbours. With labels of others: k-NN on their shards.
    shell("dmae-ds eval agreement runs/scans --k 5")
    shell("dmae-ds eval knn runs/scans", code=2)
    others = [f"data.train={digits / 'train'}", f"data.val={digits / 'val'}"]
    shell("dmae-ds eval knn runs/scans", *others)
    (result,) = (folder / "runs" / "scans").glob("on-*/results.jsonl")
    assert json.loads(result.read_text().splitlines()[-1])["num_val"] == 397

    # The run is moved, and evaluated from another folder.
    shutil.move(folder / "runs" / "scans", folder / "archive")
    (folder / "elsewhere").mkdir()
    shell.folder = folder / "elsewhere"
    shell("dmae-ds eval knn ../archive", *others)
    shell("dmae-ds export ../archive --to onnx --license proprietary")
    facts = {
        entry.key: entry.value
        for entry in onnx.load(folder / "archive/export/onnx/model.onnx").metadata_props
    }
    assert {"mean", "std"} <= set(facts), facts
