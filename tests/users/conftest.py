"""A user's shell: the commands of the READMEs, started in a folder of the user's own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.train.conftest import LIMIT_S, environment

SIZES = ["img_size=32", "patch_size=4", "embed_dim=48", "depth=4", "num_heads=3"]
SMALL = [
    "student.embed_dim=32",
    "student.num_heads=2",
    "optim.global_batch=16",
    "optim.epochs=0.25",
    "optim.warmup_epochs=0.05",
    "log.every_steps=5",
    "log.trackers=[]",
]
TEACHER = [f"teacher.{word}" for word in SIZES[2:]]


class Shell:
    """Runs a command line in a folder; `text` is what the last one printed, `code` its exit code."""

    def __init__(self, folder: Path):
        self.folder, self.text, self.code = folder, "", 0

    def __call__(self, words: str, *more: object, code: int = 0) -> str:
        """Run `words`, split at blanks, and `more` as they are; returns all that was printed."""
        arguments = [*words.split(), *map(str, more)]
        program = {
            "dmae-ds": [sys.executable, "-m", "dmae_ds"],
            "dmae-shards": [sys.executable, "-m", "data_prep.cli"],
        }.get(arguments[0], [arguments[0]])
        done = subprocess.run(
            [*program, *arguments[1:]],
            cwd=self.folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_S,
        )
        self.text, self.code = done.stdout, done.returncode
        assert done.returncode == code, f"{arguments}\n{done.stdout[-4000:]}"
        assert "Traceback" not in done.stdout, done.stdout
        if code == 2:
            assert len(done.stdout.strip().splitlines()) == 1, done.stdout
        return done.stdout


@pytest.fixture
def shell(tmp_path) -> Shell:
    """A shell in an empty folder."""
    return Shell(tmp_path)


def json_lines(path: Path) -> list[dict]:
    """Lines of a file such as metrics.jsonl or results.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def save_teacher(path: Path, *, prefix: str = "") -> None:
    """Write random weights of a ViT of 48 x 4, for images of 32 pixels in patches of 4."""
    import torch
    from safetensors.torch import save_file

    from dmae_ds.models.vit import build_student

    shape = {key: int(value) for key, value in (word.split("=") for word in SIZES)}
    weights = build_student("vit_tiny_patch16_224", shape, generator=torch.Generator().manual_seed(7))
    save_file({prefix + name: tensor for name, tensor in weights.state_dict().items()}, path)


def save_images(folder: Path, *, number: int, channels: int = 3) -> None:
    """Write PNG images of 40 x 40 pixels: stripes whose direction and colour follow from their number."""
    folder.mkdir(parents=True)
    rows, columns = np.mgrid[0:40, 0:40]
    for index in range(number):
        wave = (columns if index % 2 else rows) * (1 + index % 5) * 13 % 256
        planes = [(wave * (plane + 1) + index) % 256 for plane in range(channels)]
        image = Image.fromarray(np.stack(planes, -1).astype(np.uint8))
        image.save(folder / f"scan {index:03}.png")
