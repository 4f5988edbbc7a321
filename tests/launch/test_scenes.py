"""launch/scenes.sh: its commands parse, and name files that launch/scenes.py writes."""

from __future__ import annotations

import os
import runpy
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.cli import build_parser

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


def test_scenes_become_two_sets_with_maps_and_boxes(tmp_path):
    runpy.run_path(str(LAUNCH / "scenes.py"))["write_scenes"](tmp_path / "scenes", {"train": 2, "val": 1})
    program = tmp_path / "bin" / "dmae-shards"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$@" >>"$CALLS"\n')
    program.chmod(0o755)
    environment = {**os.environ, "OUT": str(tmp_path), "CALLS": str(tmp_path / "calls")}
    environment["PATH"] = f"{program.parent}:{os.environ['PATH']}"
    done = subprocess.run(["bash", LAUNCH / "scenes.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls = [
        build_parser().parse_args(line.split()) for line in (tmp_path / "calls").read_text().splitlines()
    ]
    assert [Path(call.dst).relative_to(tmp_path) for call in calls] == [
        Path("shards/scenes/train"),
        Path("shards/scenes/val"),
    ]
    for call, number in zip(calls, (2, 1), strict=True):
        assert call.zero_is_unlabelled and call.classes.is_file() and call.coco.is_file()
        assert len(list(call.src.glob("*.jpg"))) == len(list(call.masks.glob("*.png"))) == number


def test_equal_seeds_give_equal_scenes_of_the_promised_size(tmp_path):
    write_scenes = runpy.run_path(str(LAUNCH / "scenes.py"))["write_scenes"]
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        write_scenes(tmp_path / name, {"train": 3, "val": 2}, seed=seed)
    files = {
        name: {
            path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")
        }
        for name in ("one", "same", "other")
    }
    assert files["one"] == files["same"] != files["other"]
    assert len(files["one"]) == 2 * 5 + 3
    for path in (tmp_path / "one").rglob("*.jpg"):
        assert all(64 <= side <= 96 for side in Image.open(path).size)


def test_a_texture_is_told_by_its_colour_and_one_patch_of_it_less_well():
    scenes = runpy.run_path(str(LAUNCH / "scenes.py"))
    colours = scenes["BRIGHTNESS"] + scenes["TINT"] * np.array(scenes["TINTS"])
    shares = []
    for side in (8, 64):
        rng, hits = np.random.default_rng(0), 0
        for number in range(200):
            kind = number % len(colours)
            pixels = scenes["texture"](scenes["TEXTURES"][kind], side, side, rng)
            hits += np.square(colours - pixels.mean((0, 1))).sum(1).argmin() == kind
        shares.append(hits / 200)
    assert shares[0] < 0.87 and shares[1] > 0.92
