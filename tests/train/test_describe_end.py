"""What a run says at its end: the Python loads its student, and the last line names what can come next."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import dmae_ds
from dmae_ds.objectives.build import build_objective
from dmae_ds.train.describe_end import describe_done, describe_loading
from tests.objectives import small


@pytest.mark.parametrize(
    "objective, tokens",
    [
        ({"name": "mae", "decoder": small.DECODER}, slice(1, None)),
        ({"name": "mocov3", "hidden_dim": 8, "output_dim": 4}, slice(0, 1)),
    ],
)
def test_the_python_of_the_end_gives_the_feature_of_an_image(tmp_path, objective, tokens):
    config = small.config_for(objective)
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(tmp_path)})})
    student = build_objective(config)[0].student
    save_file(student.state_dict(), tmp_path / "student.safetensors")
    names = {"pixels": torch.randn(2, 3, small.SIZE, small.SIZE)}
    with torch.no_grad():
        exec(describe_loading(config, student).partition("\n")[2], names)
        expected = names["model"].forward_features(names["pixels"])[:, tokens].mean(dim=1)
    assert names["features"].shape == (2, small.DIM) and torch.equal(names["features"], expected)


@pytest.mark.parametrize(
    "val, num_classes, following",
    [("val", 2, "eval knn"), ("val", 1, "export"), ("val", 0, "export"), (None, 2, "export")],
)
def test_the_last_line_names_what_can_come_next(val, num_classes, following):
    preflight = SimpleNamespace(
        run_dir=Path("run"),
        config=SimpleNamespace(data=SimpleNamespace(val=val)),
        shards=SimpleNamespace(classes=["class"] * num_classes),
        members={"": None},
        num_steps=1234,
    )
    line = describe_done(preflight, seconds=61)
    assert f"next: dmae-ds {following} run" in line and "1,234 steps" in line
    assert ("--to timm" in line) == (following == "export")


@pytest.mark.parametrize("is_finished", [False, True])
def test_python_trains_what_is_not_finished_and_gets_the_run_folder(tmp_path, monkeypatch, is_finished):
    preflight, started = SimpleNamespace(is_finished=is_finished, run_dir=tmp_path / "run"), []
    monkeypatch.setattr("dmae_ds.train.preflight.prepare", lambda config, world, *, resume: preflight)
    monkeypatch.setattr("dmae_ds.train.preflight.describe_finished", lambda _: "finished")
    monkeypatch.setattr("dmae_ds.train.apart.run_apart", started.append)
    assert dmae_ds.train("digits_mae", {"run.dir": tmp_path / "run"}) == tmp_path / "run"
    assert len(started) == (not is_finished)
