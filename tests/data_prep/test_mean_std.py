"""What is read: 8-bit RGB; `info --mean-std`; images of other kinds and the line that converts them."""

import subprocess
import sys

import numpy as np
from PIL import Image

from data_prep.cli import main
from data_prep.find import find_images
from data_prep.make import make_shards
from data_prep.mean_std import mean_and_std
from dmae_ds.config.load import load_config
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import ShardError
from tests.messages import refused


def write(folder, images, suffix=".png"):
    folder.mkdir(parents=True)
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{number}{suffix}")


def test_mean_and_std_are_those_of_the_pixels_each_image_counting_the_same(tmp_path, capsys):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (size, 2 * size, 3), dtype=np.uint8) for size in (4, 8, 12, 16)]
    write(tmp_path / "src" / "a", images)
    make_shards(tmp_path / "src", tmp_path / "dst")
    shard_set = ShardSet.open(tmp_path / "dst", label="DST")
    mean, std, count = mean_and_std(shard_set, num_images=100)
    expected = np.mean([image.mean(axis=(0, 1)) / 255 for image in images], axis=0)
    squares = np.mean([((image / 255) ** 2).mean(axis=(0, 1)) for image in images], axis=0)
    assert count == 4 and np.allclose(mean, expected)
    assert np.allclose(std, np.sqrt(squares - expected**2))
    assert mean_and_std(shard_set, num_images=2)[2] == 2
    assert main(["info", str(tmp_path / "dst"), "--mean-std"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "data.mean" in line)
    words = [word.replace("'", "") for word in line.replace(", ", ",").split() if word.startswith("data.")]
    data = load_config("digits_dmae", words).data
    assert np.allclose(data.mean, mean, atol=1e-4) and np.allclose(data.std, std, atol=1e-4)


def test_equal_pixels_have_no_std(tmp_path):
    write(tmp_path / "src" / "a", [np.full((8, 8, 3), 7, np.uint8)])
    make_shards(tmp_path / "src", tmp_path / "dst")
    with refused("standard deviation", error=ShardError):
        mean_and_std(ShardSet.open(tmp_path / "dst", label="DST"), num_images=9)


def test_the_line_for_tiffs_converts_them_by_the_rule_of_training(tmp_path):
    values = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    write(tmp_path / "src" / "a", [values, values.T.copy()], ".tif")
    with refused("2 .tif files lie there", "8-bit RGB", ".jpg, .jpeg", error=ShardError) as raised:
        find_images(tmp_path / "src")
    program = str(raised.value).split('python -c "')[1].rsplit('"', 1)[0]
    subprocess.run([sys.executable, "-c", program], check=True)
    listing = find_images(tmp_path / "src")
    assert len(listing) == 2 and any("2 .tif" in note for note in listing.notes)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "src" / "a" / "0.png"))[..., 0], values >> 8)


def test_channels_are_not_an_option():
    with refused("student.in_chans", "8-bit RGB"):
        load_config("digits_dmae", ["student.in_chans=4"])
