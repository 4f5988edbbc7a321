"""Mistakes that need no torch are found before it is imported: half a second instead of five."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from data_prep.make import make_shards

SMALL = ["network.name=vit_small_patch16_224"]
DISTILL = ["distill.teacher=no.pth", "distill.method=features"]
# (words of the command, words of the message). OUT exists, SMALL.safetensors has width 384 and 2 blocks, VAL
# other classes than TRAIN.
CASES = {
    "slice: output": (["teacher", "slice", "SMALL", "OUT"], ["OUT", "exists"]),
    "slice: no file": (["teacher", "slice", "no.pth", "new"], ["no.pth"]),
    "slice: width": (["teacher", "slice", "SMALL", "new", "--name", "vit_base_patch16_224"], ["384", "768"]),
    "slice: format": (["teacher", "slice", "SMALL", "new", "--format", "mea"], ["mea", "mae"]),
    "slice: key": (["teacher", "slice", "SMALL", "new", "embed_dmi=3"], ["embed_dmi", "embed_dim"]),
    "slice: stages": (["teacher", "slice", "SMALL", "new", "--stages", "9"], ["9", "2 blocks"]),
    "slice: block": (
        ["teacher", "slice", "SMALL", "new", "--last-block", "9"],
        ["--last-block 9", "2 blocks"],
    ),
    "inspect: width": (["teacher", "inspect", "SMALL", "embed_dim=9", "--name", "vit_x"], ["384", "9"]),
    "stats: suffix": (["teacher", "stats", "digits_dmae", "--out", "a.pt"], ["a.pt", ".safetensors"]),
    "stats: output": (["teacher", "stats", "digits_dmae", "--out", "SMALL"], ["SMALL", "--out"]),
    "finetune: no run": (["eval", "finetune", "norun"], ["norun"]),
    "finetune: classes": (
        ["eval", "finetune", "SMALL", "TRAIN", "VAL", "run.dir=new", *SMALL],
        ["'b'", "'c'"],
    ),
    "finetune: output": (["eval", "finetune", "SMALL", "TRAIN", "SAME", "run.dir=OUT", *SMALL], ["OUT"]),
    "finetune: key": (
        ["eval", "linear", "SMALL", "TRAIN", "SAME", "run.dir=new", "optim.epcohs=2"],
        ["epochs"],
    ),
    "finetune: width": (
        ["eval", "linear", "SMALL", "TRAIN", "SAME", "run.dir=new", "network.name=vit_base_patch16_224"],
        ["network.name", "384", "768"],
    ),
    "finetune: teacher": (
        ["eval", "finetune", "SMALL", "TRAIN", "SAME", "run.dir=new", *SMALL, *DISTILL],
        ["distill.teacher", "no.pth"],
    ),
    "finetune: batch": (
        ["eval", "linear", "SMALL", "TRAIN", "SAME", "run.dir=new", *SMALL, "optim.micro_batch=5"],
        ["optim.micro_batch 5"],
    ),
    "knn: classes": (["eval", "knn", "SMALL", "TRAIN", "VAL", "run.dir=new", *SMALL], ["'b'", "'c'"]),
    "probe: key": (
        ["eval", "probe", "SMALL", "TRAIN", "SAME", "run.dir=new", "network.nmae=x"],
        ["network.name"],
    ),
    "agreement: no run": (["eval", "agreement", "norun"], ["norun"]),
    "convert: no run": (["checkpoint", "convert", "norun", "new"], ["norun"]),
    "report: no run": (["report", "norun"], ["norun"]),
    "report: suffix": (["report", "norun", "--out", "a.pdf"], ["a.pdf", ".html"]),
    "train: student": (["train", "digits_mae", "TRAIN", "SAME", "student.weights=no.pth"], ["no.pth"]),
    "train: width": (
        ["train", "digits_mae", "TRAIN", "SAME", "student.weights=SMALL"],
        ["384", "student.name"],
    ),
}
PROGRAM = """
import contextlib, io, json, sys
from dmae_ds.cli.main import main
for command in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(command)
    print(json.dumps([code, err.getvalue(), "torch" in sys.modules]))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, tuple[int, str, bool]]:
    """{case: (exit code, stderr, whether torch was imported)} of one process that runs all cases."""
    folder = tmp_path_factory.mktemp("early")
    for split, classes in (("TRAIN", "ab"), ("VAL", "ac")):
        for name in classes:
            (folder / "images" / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / "images" / split / name / "1.png")
        make_shards(folder / "images" / split, folder / split)
    (folder / "OUT").mkdir()
    (folder / "OUT" / "config.yaml").write_text("{}")
    tensors = {f"blocks.{number}.norm1.weight": np.zeros(384, np.float32) for number in range(2)}
    save_file({"cls_token": np.zeros((1, 1, 384), np.float32), **tensors}, folder / "SMALL.safetensors")
    names = {
        "TRAIN": "data.train=TRAIN",
        "VAL": "data.val=VAL",
        "SAME": "data.val=TRAIN",
        "SMALL": "SMALL.safetensors",
        "student.weights=SMALL": "student.weights=SMALL.safetensors",
    }
    commands = [[names.get(word, word) for word in words] for words, _ in CASES.values()]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(commands),
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not (folder / "new").exists()
    return dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_found_before_torch_is_imported(answers, case):
    code, err, has_torch = answers[case]
    assert code == 2 and err.startswith("dmae-ds: error: ") and "Traceback" not in err
    assert [word for word in CASES[case][1] if word not in err] == []
    assert not has_torch
