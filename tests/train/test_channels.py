"""Arrays of 4 channels and 16 bits, end to end: a teacher of its own, DMAE, k-NN, exports."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data_prep.cli import main as shards_main
from dmae_ds.cli.main import main
from dmae_ds.config.load import load_config
from dmae_ds.train.run_identity import _section
from tests.train.conftest import command, run

PLANES = np.array([0.2, 0.4, 0.6, 0.8])
TEACHER = ["teacher.weights=mae", "teacher.embed_dim=64", "teacher.depth=4", "teacher.num_heads=4"]


def test_a_run_from_before_the_key_existed_is_the_same_run():
    student = load_config("mae_vit_base", []).student
    for channels in (None, 3):
        section = _section(student.model_copy(update={"in_chans": channels}), {"weights"})
        assert "in_chans" not in section and section["name"] == student.name
    assert _section(student.model_copy(update={"in_chans": 4}), set())["in_chans"] == 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Stripes that lie or stand, in two classes; SHARDS/train and SHARDS/val."""
    folder, rng = tmp_path_factory.mktemp("channels"), np.random.default_rng(0)
    rows, columns = np.mgrid[:36, :40]
    for split, count in (("train", 24), ("val", 12)):
        for name, places in (("lying", rows), ("standing", columns)):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                stripes = (np.sin(places / 3 + number) / 2 + 0.5)[:, :, None] * PLANES
                values = stripes * 40_000 + rng.integers(0, 2000, (36, 40, 4))
                np.save(folder / split / name / f"{number}.npy", values.astype(np.uint16))
        assert shards_main(["make", str(folder / split), str(folder / "shards" / split), "--arrays"]) == 0
    return folder


@pytest.mark.slow
def test_four_channels_of_16_bits_from_arrays_to_onnx(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    words = ["data.train=shards/train", "data.val=shards/val", "data.bits=16", "student.in_chans=4"]
    words += ["data.mean=[.076,.137,.198,.259]", "data.std=[.044,.087,.130,.173]", "data.num_workers=0"]
    words += ["optim.global_batch=16", "optim.epochs=4", "optim.warmup_epochs=1"]
    measured = ["eval.loss_every=4", "eval.knn_every=4", "eval.knn_k=3", "teacher.in_chans=4"]
    for arguments in (["digits_mae", "run.dir=mae"], ["digits_dmae", "run.dir=dmae", *TEACHER, *measured]):
        done = run(command(["train", *arguments, *words], ranks=1), cwd=folder)
        assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (folder / "dmae" / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([line["loss"] for line in lines]).all() and lines[-1]["loss"] < lines[0]["loss"]
    assert main(["eval", "knn", "dmae", "--k", "3"]) == 0
    assert "top-1 100.0%" in capsys.readouterr().out  # lying from standing; chance is 50%
    for form in ("onnx", "timm"):
        assert main(["export", "dmae", "--to", form]) == 0
    assert main(["report", "mae", "dmae"]) == 0
