"""Fixtures of several rooms: the published numbers, a small real data set as shards, a tiny recipe on it."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def oracles() -> Path:
    """The folder of numbers that the published implementations computed; it is next to the checkout."""
    folder = Path(os.environ.get("DMAE_DS_ORACLES", REPOSITORY.parent / "shared" / "oracles"))
    if folder.is_dir():
        return folder
    message = f"NOT CHECKED AGAINST THE PUBLISHED CODE: folder {folder} not found; set DMAE_DS_ORACLES to it"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """scikit-learn's digits as shards: the folder holds `train` (1,400 images) and `val` (397)."""
    folder = tmp_path_factory.mktemp("digits")
    subprocess.run(
        [sys.executable, REPOSITORY / "launch" / "digits.py", folder / "images"],
        check=True,
        capture_output=True,
    )
    for part in ("train", "val"):
        command = [sys.executable, "-m", "data_prep.cli", "make", folder / "images" / part, folder / part]
        command += ["--samples-per-shard", "500"]
        subprocess.run(command, check=True, capture_output=True, cwd=REPOSITORY)
    return folder


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """Small scenes of digits with maps and boxes: shards in `train` (24) and `val` (8), sources in `src`."""
    from data_prep.dense import DenseOptions
    from data_prep.make import MakeOptions, make_shards

    folder = tmp_path_factory.mktemp("scenes")
    src = folder / "src"
    runpy.run_path(str(REPOSITORY / "launch" / "scenes.py"))["write_scenes"](src, {"train": 24, "val": 8})
    for part, name in (("train", "training"), ("val", "validation")):
        dense = DenseOptions(
            masks=src / "annotations" / name,
            coco=src / f"instances_{name}.json",
            zero_is_unlabelled=True,
        )
        options = MakeOptions(samples_per_shard=10, classes=src / "objectInfo.txt", dense=dense)
        make_shards(src / "images" / name, folder / part, options)
    return folder


@pytest.fixture(scope="session")
def tiny_recipe(digits, tmp_path_factory) -> list[str]:
    """Arguments of `dmae-ds train`: 20 steps of DMAE, batch 16, teacher 48 x 4, student 32 x 4."""
    import torch
    from safetensors.torch import save_file

    from dmae_ds.models.vit import build_student

    weights = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3}
    save_file(
        build_student("vit_tiny_patch16_224", shape, generator=torch.Generator().manual_seed(7)).state_dict(),
        weights,
    )
    return [
        "digits_dmae",
        f"data.train={digits / 'train'}",
        f"data.val={digits / 'val'}",
        f"teacher.weights={weights}",
        "teacher.format=timm",
        "teacher.embed_dim=48",
        "teacher.depth=4",
        "teacher.num_heads=3",
        "student.embed_dim=32",
        "student.num_heads=2",
        "optim.global_batch=16",
        f"optim.epochs={20 * 16 / 1400}",
        "optim.warmup_epochs=0.05",
        "optim.base_lr=1e-2",
        "log.every_steps=5",
        "log.trackers=[]",
    ]


def pytest_configure(config):
    """Keep tests off the GPUs, where two ranks need two, but for `pytest -m gpu` and launch/gpu_check.sh."""
    if config.option.markexpr != "gpu" and "GPU_CHECK" not in os.environ:
        # DeepSpeed's launcher overwrites CUDA_VISIBLE_DEVICES.
        os.environ.update({"DMAE_DS_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"})


def pytest_collection_modifyitems(items):
    import torch

    if not torch.cuda.is_available() and os.environ.get("GPU_CHECK") != "rehearse":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
