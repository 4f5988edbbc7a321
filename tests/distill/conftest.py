"""A few images and a tiny teacher's file, with the overrides that name its numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

NAME = "vit_tiny_patch16_224"
TEACHER = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
STUDENT = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL = [
    f"teacher.name={NAME}",
    *(f"teacher.{key}={value}" for key, value in TEACHER.items() if key != "img_size"),
    *(f"student.{key}={value}" for key, value in STUDENT.items()),
    "log.trackers=[]",
]


def write_images(folder: Path, number: int, *, size: int = 40) -> Path:
    """Write random JPEGs."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name in range(number):
        pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.jpg")
    return folder


@pytest.fixture
def photos(tmp_path) -> Path:
    return write_images(tmp_path / "photos", 30)


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    state = timm.create_model(NAME, num_classes=0, **TEACHER).state_dict()
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save(state, path)
    return path
