"""launch/clipart.py and clipart.sh: which images are chosen, that parts share none, where they are from."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmae_ds.data.shards import MANIFEST, ShardError

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


@pytest.fixture
def clipart(monkeypatch):
    """The script as a module, with small numbers."""
    spec = importlib.util.spec_from_file_location("clipart", LAUNCH / "clipart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in {"MIN_IMAGES": 4, "MAX_IMAGES": 5, "SHORT_SIDE": 20}.items():
        monkeypatch.setattr(module, name, value)
    return module


@pytest.fixture
def src(tmp_path):
    """Images: 7 of `bee`, 5 of `ant` in two folders, 3 of `cat`, 6 of no class; and what is left out."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "src"

    def write(name: str, pixels: np.ndarray) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)

    names = [f"bee/{number}.png" for number in range(7)] + [f"cat/{number}.png" for number in range(3)]
    names += [f"ant/{number}.png" for number in range(3)] + ["ant/red/8.png", "ant/red/9.png"]
    for name in names + [f"unsorted/{number}.png" for number in range(6)]:
        write(name, np.kron(rng.integers(0, 256, (8, 6, 4)), np.ones((5, 5, 1))).astype(np.uint8))
    near = np.asarray(Image.open(folder / "ant/0.png")).astype(int)
    write("dog/near.png", (near + rng.integers(-8, 9, near.shape)).clip(0, 255).astype(np.uint8))
    write("bee/blank.png", np.zeros((30, 30, 4), np.uint8))
    (folder / "bee/broken.png").write_bytes((folder / "bee/0.png").read_bytes()[:200])
    (folder / "bee/link.png").symlink_to("../ant/1.png")
    (folder / "ant/gone.png").symlink_to("nowhere.png")
    return folder


def test_classes_that_are_left_out_are_told(clipart, src, capsys):
    for number in range(9):
        (src / "eel").mkdir(exist_ok=True)
        (src / "eel" / f"{number}.webp").touch()
    classes, _ = clipart.choose(src)
    told = capsys.readouterr().err
    assert "eel" not in classes and "9 .webp" in told and "'eel'" in told and "cat (3)" in told


def test_chosen_are_images_of_large_classes_that_differ(clipart, src):
    classes, left_out = clipart.choose(src)
    assert {kind: len(names) for kind, names in classes.items()} == {"ant": 5, "bee": 5}
    assert {"ant/red/8.png", "ant/0.png"} < set(classes["ant"])
    chosen = {name for names in classes.values() for name in names}
    every = {path.relative_to(src).as_posix() for path in src.rglob("*.png")}
    assert chosen | set(left_out) == every and not chosen & set(left_out)
    assert "ant/0.png" in left_out["dog/near.png"] and "ant/1.png" in left_out["bee/link.png"]
    for name in ("bee/blank.png", "bee/broken.png", "ant/gone.png", "cat/0.png", "unsorted/0.png"):
        assert left_out[name]
    assert clipart.choose(src) == (classes, left_out)


@pytest.mark.parametrize("change, is_alike", [("darker", True), ("moved", False), ("thin", False)])
def test_alike_is_a_share_of_the_ink(clipart, change, is_alike):
    drawing = np.ones((16, 16, 3), np.float32)
    drawing[4:12, 7:9] = 0.5
    other = {
        "darker": drawing - 0.1 * (drawing < 1),
        "moved": np.roll(drawing, 4, axis=1),
        "thin": np.where(np.eye(16)[..., None] > 0, 0.95, np.ones_like(drawing)),
    }[change]
    alike = clipart.Alike(2)
    assert alike.find(1 - drawing.reshape(-1)) is None
    alike.keep("first", 1 - drawing.reshape(-1))
    assert alike.find(1 - np.asarray(other, np.float32).reshape(-1)) == ("first" if is_alike else None)


def test_parts_share_no_image_and_a_second_call_adds_nothing(clipart, src, tmp_path, capsys):
    out = tmp_path / "out"
    assert clipart.main([str(src), str(out)]) == 0
    manifests = {
        part: json.loads((out / "shards" / part / MANIFEST).read_text()) for part in ("train", "val")
    }
    assert manifests["train"]["num_samples"] == 8 and manifests["val"]["num_samples"] == 2
    assert all(manifest["classes"] == ["ant", "bee"] for manifest in manifests.values())
    names = [
        set((out / "shards" / part / "sources.txt").read_text().splitlines()) for part in ("train", "val")
    ]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 10
    assert len((out / "left_out.tsv").read_text().splitlines()) == 26 - 10
    assert not list(out.glob("*.tmp"))
    sides = [min(Image.open(path).size) for path in (out / "images").rglob("*.png")]
    assert set(sides) == {30}  # links to SRC; the shards have 20
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert clipart.main([str(src), str(out)]) == 0
    capsys.readouterr()
    assert clipart.main([str(src / "ant"), str(out)]) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1 and f"'{src}'" in message and f"'{src / 'ant'}'" in message
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_a_folder_without_a_large_class_is_refused_in_one_line(clipart, src, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(clipart, "MIN_IMAGES", 50)
    with pytest.raises(ShardError):
        clipart.write_subset(src, tmp_path / "out")
    for folder, found in ((src, "50"), (tmp_path / "none", "none"), (src / "ant" / "red", "red")):
        assert clipart.main([str(folder), str(tmp_path / "out")]) == 2
        message = capsys.readouterr().err
        assert len(message.splitlines()) == 1 and str(folder) in message and found in message
    assert not (tmp_path / "out" / "images").exists()


def fetch(tmp_path: Path, apt_get: str, **variables: str) -> tuple[subprocess.CompletedProcess, str]:
    """Run clipart.sh with stand-ins; returns the process, and the arguments of the Python script."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    stand_ins = {
        "apt-get": apt_get,
        "dpkg-deb": "mkdir -p usr/share/openclipart/png",
        "python": f'echo "$@" >{tmp_path}/call',
    }
    for name, text in stand_ins.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    environment = {**os.environ, "OUT": f"{tmp_path}/out", "PACKAGE": f"{tmp_path}/package", "SRC": ""}
    environment |= {"PATH": f"{programs}:{os.environ['PATH']}", **variables}
    (tmp_path / "call").write_text("")
    done = subprocess.run(["bash", LAUNCH / "clipart.sh"], env=environment, capture_output=True, text=True)
    return done, (tmp_path / "call").read_text().strip()


def test_the_package_is_fetched_where_it_is_neither_installed_nor_replaced(tmp_path):
    done, call = fetch(tmp_path, "exit 100")
    assert done.returncode == 2 and "SRC" in done.stderr and not call
    assert not (tmp_path / "out" / "openclipart").exists()
    unpacked = f"launch/clipart.py {tmp_path}/out/openclipart/usr/share/openclipart/png {tmp_path}/out"
    done, call = fetch(tmp_path, "touch openclipart-png_1_all.deb")
    assert done.returncode == 0, done.stderr
    assert call == unpacked and not list((tmp_path / "out").rglob("*.deb"))
    assert fetch(tmp_path, "exit 100")[1] == unpacked  # not fetched again
    (tmp_path / "package").mkdir()
    assert fetch(tmp_path, "exit 100")[1] == unpacked  # the one whose images are there
    new = f"{tmp_path}/new"
    assert fetch(tmp_path, "exit 100", OUT=new)[1] == f"launch/clipart.py {tmp_path}/package {new}"
    done, call = fetch(tmp_path, "exit 100", SRC="photos")
    assert call == f"launch/clipart.py photos {tmp_path}/out"
