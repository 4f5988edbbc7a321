"""What is read: 8-bit RGB; `info --mean-std`; images of other kinds and the line that converts them."""

import shlex
import subprocess
import sys

import numpy as np
from PIL import Image

from data_prep.cli import main
from data_prep.find import find_images
from data_prep.info import print_info
from data_prep.make import MakeOptions, make_shards
from data_prep.mean_std import mean_and_std
from data_prep.verify import verify_shards
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
    src = tmp_path / "Bob's $(touch scans)"
    write(src / "a", [values, values.T.copy()], ".tif")
    (src / "a" / "1.tif").rename(src / "a" / "1.TIF")
    with refused("2 .tif files lie there", "8-bit RGB", ".jpg, .jpeg", error=ShardError) as raised:
        find_images(src)
    Image.new("RGB", (4, 4)).save(src / "a" / "0.png")  # another image
    before = (src / "a" / "0.png").read_bytes()
    program = str(raised.value).partition("convert them: python ")[2]
    python = shlex.quote(sys.executable)
    assert subprocess.run(f"{python} {program}", shell=True, cwd=tmp_path).returncode == 0
    listing = find_images(src)
    assert len(listing) == 3 and not listing.notes and listing.ignored == {".tif with a .png": 2}
    assert (src / "a" / "0.png").read_bytes() == before and not (tmp_path / "scans").exists()
    assert np.array_equal(np.asarray(Image.open(src / "a" / "0.tif.png"))[..., 0], values >> 8)


def test_arrays_become_a_set_of_one_kind_whose_mean_and_std_a_recipe_takes(tmp_path, capsys):
    rng = np.random.default_rng(0)
    folder = tmp_path / "src" / "a"
    folder.mkdir(parents=True)
    images = rng.integers(0, 65536, (6, 12, 10, 5)).astype(np.uint16)
    for number, image in enumerate(images):
        np.save(folder / f"{number}.npy", image)
    (folder / "notes.jpg").write_bytes(b"ignored: no array")
    make_shards(tmp_path / "src", tmp_path / "dst", MakeOptions(arrays=True, verify="full", json=True))
    verify_shards(tmp_path / "dst", sample=1.0, workers=1)
    shard_set = ShardSet.open(tmp_path / "dst", label="DST")
    assert shard_set.images == "arrays of 5 channels, 16 bits" and shard_set.num_samples == 6
    print_info(tmp_path / "dst", mean_std=True, sheet=tmp_path / "sheet.png")
    words = shlex.split(capsys.readouterr().out.partition("mean, std")[2].splitlines()[0])[:2]
    config = load_config("digits_mae", [*words, "student.in_chans=5", "data.bits=16"])
    values = images.reshape(6, -1, 5) / 65535
    assert np.allclose(config.data.mean, values.mean(axis=(0, 1)), atol=1e-4)
    with refused("student.in_chans", 3, "data.mean", 5):
        load_config("digits_mae", words)
    np.save(folder / "other.npy", np.zeros((4, 4, 3), np.uint8))
    for options, word in (
        (MakeOptions(arrays=True), "3 channels"),
        (MakeOptions(arrays=True, resize=8), "--resize"),
    ):
        with refused(word, error=ShardError):
            make_shards(tmp_path / "src", tmp_path / "mixed", options)
        assert not (tmp_path / "mixed" / "manifest.json").exists()
