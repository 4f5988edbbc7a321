"""Runs in this process, on its GPU, and the same runs on the CPU, trained by another process meanwhile.

With GPU_CHECK=rehearse everything runs on the CPU: fewer steps, fewer recipes, the same code.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train.conftest import LIMIT_S, REPOSITORY, losses
from tests.train.test_objectives import BATCH, OBJECTIVES, recipes

__all__ = ["recipes"]  # a fixture

REHEARSAL = os.environ.get("GPU_CHECK") == "rehearse"
NUM_STEPS = 4 if REHEARSAL else 20
NUM_EPOCHS = NUM_STEPS * BATCH / 1400
EPOCHS = [f"optim.epochs={NUM_EPOCHS}", f"optim.warmup_epochs={NUM_EPOCHS / 5}"]
NAMES = ["mae", "dmae", *OBJECTIVES]
# What timm draws on the device comes from another generator than the CPU's.
PLAIN = [f"objective.augment.{key}" for key in ("rand_augment=null", "erase=0", "mixup=0", "cutmix=0")]
SHORT = [
    f"objective.teacher_temperature_warmup_epochs={NUM_EPOCHS / 2}",
    f"objective.freeze_last_layer_epochs={NUM_EPOCHS / 4}",
]
MORE = {"g2sd_specific": PLAIN, "dino": SHORT, "dino_dmae": SHORT}


@pytest.fixture(scope="session")
def arguments(tiny_recipe, recipes) -> dict[str, list[str]]:
    """Arguments of `dmae-ds train` for every objective: a student of 32 x 4 blocks on digits."""
    common = ["log.every_steps=1", "checkpoint.every_minutes=null", "checkpoint.every_steps=1000", *EPOCHS]
    named = {
        "dmae": tiny_recipe,
        "mae": ["digits_mae", *(key for key in tiny_recipe[1:] if not key.startswith("teacher."))],
    }
    named |= {name: [str(path)] for name, path in recipes.items()}
    return {name: [*named[name], *common, *MORE.get(name, []), "data.num_workers=0"] for name in NAMES}


@pytest.fixture(scope="session")
def reference(arguments, tmp_path_factory):
    """A function from an objective's name to its run folder, trained in fp32 on the CPU."""
    folder = tmp_path_factory.mktemp("cpu")
    runs = [[*arguments[name], f"run.dir={folder / name}"] for name in NAMES]
    driver = [sys.executable, str(REPOSITORY / "tests" / "train" / "driver.py"), json.dumps(runs)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(driver, cwd=folder, env=environment, stdout=log, stderr=log)

    def run_folder(name: str) -> Path:
        end = time.monotonic() + LIMIT_S
        while not (folder / name / "student.safetensors").exists() and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.1)
        assert process.poll() in (None, 0), (folder / "log").read_text()[-3000:]
        return folder / name

    yield run_folder
    process.kill()
    process.wait()


@pytest.fixture(scope="session")
def device():
    """This process's device, in a process group of one."""
    from dmae_ds.distributed import process_group
    from dmae_ds.distributed.world import World

    yield process_group.start(World())
    process_group.stop()


@pytest.fixture
def train(device, arguments, tmp_path):
    """Train an objective's recipe into tmp_path/NAME with changed keys; returns its losses.

    resume: the name of another run of the test and the step from which to continue it
    """
    from dmae_ds.config.load import load_config
    from dmae_ds.distributed.world import World
    from dmae_ds.train.preflight import prepare
    from dmae_ds.train.run import train_recipe

    def run(objective: str, *changes: str, name: str = "run", resume: tuple[str, int] | None = None):
        run_dir = tmp_path / name
        if resume is not None:
            other, step = resume
            checkpoints = tmp_path / other / "checkpoints"
            (run_dir / "checkpoints").mkdir(parents=True)
            shutil.copytree(checkpoints / f"step-{step:08d}", run_dir / "checkpoints" / f"step-{step:08d}")
            shutil.copy(tmp_path / other / "config.yaml", run_dir)
            (run_dir / "checkpoints" / "latest").write_text(f"step-{step:08d}")
        recipe, *overrides = [*arguments[objective], *changes, f"run.dir={run_dir}"]
        train_recipe(prepare(load_config(recipe, overrides), World(), resume="auto"), device)
        return losses(run_dir)

    return run
