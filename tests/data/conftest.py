"""A tiny shard folder with all kinds of images: JPEG and PNG, colour and grey, wide and tall."""

import io

import numpy as np
import pytest
from PIL import Image

from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import NewSample, write_manifest, write_shard

NUM_SAMPLES = 23


def _make_sample(number: int) -> NewSample:
    rng = np.random.default_rng(number)
    width, height = (int(side) for side in rng.integers(20, 70, 2))
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    extension = "png" if number % 5 == 0 else "jpg"
    file = io.BytesIO()
    (image.convert("L") if number % 7 == 0 else image).save(file, {"png": "PNG", "jpg": "JPEG"}[extension])
    return NewSample(number, extension, file.getvalue(), width, height, number % 3)


@pytest.fixture
def make_sample():
    """Function number -> NewSample, which always gives the same sample."""
    return _make_sample


@pytest.fixture
def shard_folder(tmp_path):
    """Shards of 10, 10 and 3 samples; the numbers have a gap at 5, as after a skipped file."""
    folder = tmp_path / "shards"
    folder.mkdir()
    samples = [_make_sample(number) for number in range(NUM_SAMPLES + 1) if number != 5]
    shards = [
        write_shard(folder, f"shard-{number:06d}.tar", samples[first : first + 10])
        for number, first in enumerate(range(0, NUM_SAMPLES, 10))
    ]
    write_manifest(folder, classes=["ant", "bee", "cat"], seed=0, shards=shards)
    return folder


@pytest.fixture
def shard_set(shard_folder):
    return ShardSet.open(shard_folder, label="data.train")
