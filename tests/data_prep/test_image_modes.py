"""Transparent and 16-bit images are counted, and every command shows them as training sees them."""

import io
import json
import re
import warnings

import numpy as np
import pytest
from PIL import Image

from data_prep.info import TILE, print_info
from data_prep.make import MakeOptions, make_shards
from data_prep.verify import verify_shards
from dmae_ds.data import pixels
from dmae_ds.data.decode import decode_bytes
from dmae_ds.data.reader import SampleReader
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import ShardError
from tests.messages import refused


def drawing():
    """A black square on nothing, in a palette: PIL warns where it becomes RGB."""
    image = Image.new("P", (64, 64))
    image.paste(1, (16, 16, 48, 48))
    return image, {"transparency": bytes([0, 255])}


def ramp():
    return Image.fromarray(np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)), {}


@pytest.fixture
def drawings(tmp_path):
    """Two classes of drawings, X-rays and plain images."""
    folder = tmp_path / "drawings"
    images = {"drawing": drawing(), "x-ray": ramp(), "plain": (Image.new("RGB", (64, 64), (9, 9, 9)), {})}
    for name, (image, options) in images.items():
        for part in "ab":
            (folder / part).mkdir(parents=True, exist_ok=True)
            image.save(folder / part / f"{name}.png", **options)
    return folder


def make(src, dst, *, max_skip=0, **options):
    make_shards(src, dst, MakeOptions(**options), max_skip=max_skip)
    shard_set, reader = ShardSet.open(dst, label="DST"), None
    reader = SampleReader(shard_set)
    names = [json.loads(line) for line in (dst / "sources.txt").read_text().splitlines()]
    return {names[reader.read(number).number]: reader.read(number) for number in range(shard_set.num_samples)}


def test_they_are_counted_and_kept(drawings, tmp_path, capsys):
    samples = make(drawings, tmp_path / "dst")
    out = capsys.readouterr().out
    assert "2 images have an alpha channel" in out and "2 images have 16-bit grey" in out and "white" in out
    assert samples["a/x-ray.png"].data == (drawings / "a" / "x-ray.png").read_bytes()
    made = json.loads((tmp_path / "dst" / "manifest.json").read_text())["made"]
    assert made["modes"] == {"alpha": 2, "grey16": 2}


def test_tiny_blank_and_repeated_images_are_counted_once(drawings, tmp_path, capsys):
    Image.new("RGB", (300, 15), "red").save(drawings / "a" / "rule.jpg")
    Image.new("LA", (64, 64), (0, 0)).save(drawings / "a" / "nothing.png")
    (drawings / "b" / "link.jpg").symlink_to("../a/rule.jpg")
    make_shards(drawings, tmp_path / "dst", MakeOptions(verify="full", samples_per_shard=2))
    made = json.loads((tmp_path / "dst" / "manifest.json").read_text())["made"]
    assert made["modes"] == {"alpha": 3, "grey16": 2, "tiny": 2, "blank": 5}
    lines = capsys.readouterr().out.splitlines()
    for start in ("2 images are less", "5 images are blank", "4 images have the bytes"):
        assert len([line for line in lines if line.startswith(start)]) == 1, lines
    repeated = next(line for line in lines if line.startswith("4 "))
    first, other = re.findall(r"'(\w/[\w.-]+)'", repeated)
    assert (drawings / first).read_bytes() == (drawings / other).read_bytes() and first != other


def test_smaller_images_and_the_sheet_show_what_training_sees(drawings, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = make(drawings, tmp_path / "small", resize=32)
        whole = make(drawings, tmp_path / "whole")
        print_info(tmp_path / "whole", sheet=tmp_path / "sheet.png")
    for name in ("a/drawing.png", "b/x-ray.png", "a/plain.png"):
        seen = decode_bytes(whole[name].data).astype(int)
        stored = np.asarray(Image.open(io.BytesIO(small[name].data)).resize((64, 64))).astype(int)
        assert np.abs(stored - seen).mean() < 8, name
    assert decode_bytes(whole["a/drawing.png"].data)[0, 0].tolist() == [255, 255, 255]
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))[:TILE, : 6 * TILE]
    assert {tuple(pixel) for pixel in sheet[TILE // 2 - 28, TILE // 2 :: TILE].tolist()} >= {
        (255,) * 3,
        (9,) * 3,
    }


def test_one_limit_for_make_verify_and_training(drawings, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (70, 70), (90, 120, 60)).save(drawings / "a" / "scan.jpg")
    make(drawings, tmp_path / "before")
    monkeypatch.setattr(pixels, "MAX_PIXELS", 64 * 64)
    with refused("1 files", "a/scan.jpg", "70x70 pixels", "--resize", error=ShardError):
        make(drawings, tmp_path / "none")
    samples = make(drawings, tmp_path / "skipped", max_skip=1)
    assert len(samples) == 6 and all(decode_bytes(sample.data).size for sample in samples.values())
    assert len(make(drawings, tmp_path / "small", resize=40)) == 7  # its source may be larger
    with refused("1 files", "a/scan.jpg", "70x70 pixels", error=ShardError):  # nothing to shrink
        make(drawings, tmp_path / "same", resize=70)
    capsys.readouterr()
    with refused("1 places", error=ShardError):
        verify_shards(tmp_path / "before")
    assert "70x70 pixels" in capsys.readouterr().out


@pytest.mark.parametrize("samples_per_shard", [1, 100])
def test_all_unusable_files_are_told_at_once(drawings, tmp_path, samples_per_shard, capsys):
    for name in ("a/x-ray.png", "b/plain.png", "b/drawing.png"):
        (drawings / name).write_bytes(b"no image")
    (drawings / "loose.jpg").touch()
    (drawings / "a" / "self.jpg").symlink_to(drawings / "a" / "self.jpg")
    options = {"samples_per_shard": samples_per_shard}
    for max_skip in (0, 1, 4):
        with refused("5 files", f"--max-skip 5 (now {max_skip})", "skipped.jsonl", error=ShardError):
            make(drawings, tmp_path / "dst", max_skip=max_skip, **options)
        assert (tmp_path / "dst" / "skipped.jsonl").read_text().count("\n") == 5
        assert capsys.readouterr().out.count("going on") == 1
    assert len(make(drawings, tmp_path / "dst", max_skip=5, **options)) == 3
    out = capsys.readouterr().out
    assert "continuing" in out and "going on" not in out and "1 images have 16-bit grey" in out
