"""`dmae-ds distill` and `dmae_ds.distill` to their ends: published sizes, kills, two ranks, the notebook."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import dmae_ds
from dmae_ds.config.load import load_config
from dmae_ds.data.order import num_steps
from dmae_ds.train.checkpoint.folder import CheckpointFolder
from tests.distill.conftest import NAME, SMALL, write_images
from tests.train.conftest import LIMIT_S, REPOSITORY, environment, metrics, run

pytestmark = pytest.mark.slow
DISTILL = [sys.executable, "-m", "dmae_ds", "distill"]


def killed_after_a_save(words: list[str], run_dir: Path, *, cwd: Path) -> int:
    """Start a command, kill it by SIGKILL once a checkpoint is complete; returns that checkpoint's step."""
    process = subprocess.Popen(
        words, cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    limit = time.monotonic() + LIMIT_S
    while CheckpointFolder(run_dir).latest() is None:
        assert process.poll() is None and time.monotonic() < limit, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    newest = CheckpointFolder(run_dir).latest()
    return CheckpointFolder(run_dir).read_state(newest)["step"]


def starts(run_dir: Path) -> list[int]:
    """The step at which each start of a run began."""
    return [json.loads(line)["step"] for line in (run_dir / "starts.jsonl").read_text().splitlines()]


def loads_into_timm(run_dir: Path) -> timm.models.VisionTransformer:
    config = load_config(str(run_dir / "recipe.yaml")).student
    model = timm.create_model(config.name, num_classes=0, **config.overrides())
    model.load_state_dict(load_file(run_dir / "student.safetensors"), strict=True)
    return model


def test_a_vit_b_and_200_images_become_a_vit_s_by_one_command_that_is_killed_and_repeated(tmp_path):
    write_images(tmp_path / "photos", 200, size=240)
    torch.manual_seed(0)
    save_file(timm.create_model("vit_base_patch16_224").state_dict(), tmp_path / "vit_b.safetensors")
    words = [*DISTILL, "photos", "--teacher", "vit_b.safetensors", "--student", "vit_small_patch16_224"]
    run_dir = tmp_path / "runs" / "photos-vit_small_patch16_224"
    step = killed_after_a_save(words, run_dir, cwd=tmp_path)
    recipe = (run_dir / "recipe.yaml").read_bytes()
    done = run(words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (run_dir / "recipe.yaml").read_bytes() == recipe and starts(run_dir)[-1] >= step > 0
    config = load_config(str(run_dir / "recipe.yaml"))
    steps = num_steps(config.optim.epochs, 180, config.optim.global_batch)
    assert metrics(run_dir)[-1]["step"] == len(metrics(run_dir)) == steps
    assert loads_into_timm(run_dir)(torch.zeros(1, 3, 224, 224)).shape == (1, 384)
    assert run(words, cwd=tmp_path).returncode == 0 and len(starts(run_dir)) == 2  # finished: nothing to do

    other = run([*words, "--epochs", "1"], cwd=tmp_path)
    assert other.returncode == 2 and other.stderr.strip().count("\n") == 0 and "--epochs" in other.stderr

    python = dmae_ds.distill(
        images=tmp_path / "photos",
        teacher=tmp_path / "vit_b.safetensors",
        student="vit_small_patch16_224",
        epochs=0.5,
        overrides={"run.dir": tmp_path / "python"},
    )
    model = dmae_ds.load_student(python)
    assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 384)
    exported = dmae_ds.export(python, to="timm")
    assert exported.is_relative_to(python) and any(exported.glob("*.safetensors"))


def test_a_python_program_that_is_killed_continues_and_leaves_nothing_that_trains(
    photos, teacher_file, tmp_path
):
    run_dir = tmp_path / "run"
    overrides = [*SMALL, f"run.dir={run_dir}", "checkpoint.every_steps=2", "checkpoint.every_minutes=null"]
    program = (
        "import dmae_ds\n"
        f"where = {str(photos)!r}, {str(teacher_file)!r}, {NAME!r}\n"
        f"dmae_ds.distill(*where, epochs=40, overrides={overrides!r})\n"
    )
    step = killed_after_a_save([sys.executable, "-c", program], run_dir, cwd=tmp_path)
    done = run(
        [sys.executable, "-c", program], cwd=tmp_path
    )  # refused if the first one still held the folder
    assert done.returncode == 0, done.stderr
    assert starts(run_dir)[-1] >= step > 0
    loads_into_timm(run_dir)


@pytest.mark.parametrize("in_python", [False, True], ids=["command", "python"])
def test_two_ranks_are_started_by_the_launcher(photos, teacher_file, tmp_path, in_python):
    run_dir = tmp_path / "run"
    overrides = [*SMALL, f"run.dir={run_dir}"]
    if in_python:
        assert dmae_ds.distill(photos, teacher_file, NAME, epochs=2, ranks=2, overrides=overrides) == run_dir
    else:
        words = [
            str(photos),
            "--teacher",
            str(teacher_file),
            "--student",
            NAME,
            "--epochs",
            "2",
            "--ranks",
            "2",
        ]
        done = run([*DISTILL, *words, *overrides], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    (start,) = (json.loads(line) for line in (run_dir / "starts.jsonl").read_text().splitlines())
    assert start["environment"]["world_size"] == 2
    loads_into_timm(run_dir)


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((REPOSITORY / "examples" / "distill.ipynb").read_text(encoding="utf-8"))
    values: dict[str, object] = {}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), values)
    assert metrics(values["run"])[-1]["epoch"] >= 3.5
    assert values["folder"].is_dir() and isinstance(values["model"], timm.models.VisionTransformer)
