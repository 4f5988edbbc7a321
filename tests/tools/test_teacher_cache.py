"""`dmae-ds teacher cache`: a student from stored features is the live one; what is refused, and kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dmae_ds.config.load import load_config
from dmae_ds.data.storage import Access
from dmae_ds.distributed.world import World
from dmae_ds.errors import UserError
from dmae_ds.teacher.cache_layout import CODEC
from dmae_ds.teacher.early import open_manifest
from dmae_ds.tools.early import CacheRequest, prepare_cache
from dmae_ds.tools.teacher_stats import write_stats
from dmae_ds.train.preflight import prepare
from tests.train.conftest import LIMIT_S, command, deepspeed, environment, losses, run

DRIVER = Path(__file__).with_name("cache_driver.py")
KILLER = Path(__file__).with_name("kill_driver.py")
STEPS = 25  # 2 epochs of 397 images, 32 a step
EPOCHS = {"optim.epochs": 2, "optim.warmup_epochs": 0.1, "optim.global_batch": 32, "optim.micro_batch": 16}


def two_epochs(tiny_recipe: list[str], digits: Path) -> list[str]:
    """The tiny recipe over two epochs of few images, without workers."""
    few = [f"data.train={digits / 'val'}", "data.num_workers=0", "data.flip=true"]
    return [*tiny_recipe, *few, *(f"{key}={value}" for key, value in EPOCHS.items())]


def cached(out: Path) -> list[str]:
    return ["teacher.placement=cache", f"teacher.cache={out}", "teacher.weights=null"]


def drive(jobs: list, folder: Path, *, ranks: int = 1) -> None:
    start = [sys.executable] if ranks == 1 else deepspeed(ranks)
    done = run([*start, str(DRIVER), json.dumps(jobs)], cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]


def files_of(out: Path) -> dict[str, bytes]:
    """Content of everything in a cache but the lock."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.name != "lock"}


def student(folder: Path) -> bytes:
    return (folder / "student.safetensors").read_bytes()


@pytest.fixture(scope="module")
def recipe(tiny_recipe, digits) -> list[str]:
    return two_epochs(tiny_recipe, digits)


@pytest.fixture(scope="module")
def stored(recipe, tmp_path_factory) -> Path:
    """A folder with caches and runs that one rank wrote: fp32, int8, half as long; live, and from each."""
    folder = tmp_path_factory.mktemp("caches")
    caches = {
        "fp32": {},
        "int8": {"dtype": "int8"},
        "pca": {"pca": 24, "dtype": "bf16"},
        "one": {"epochs": 1},
    }
    jobs = [["store", {"out": name, **options}, recipe] for name, options in caches.items()]
    jobs += [["train", {}, [*recipe, "run.dir=live"]]]
    jobs += [
        ["train", {}, [*recipe, f"run.dir=from_{name}", *cached(Path(name))]] for name in ("fp32", "one")
    ]
    drive(jobs, folder)
    return folder


def test_a_student_from_stored_features_is_the_live_one(stored):
    assert len(losses(stored / "live")) == STEPS
    assert losses(stored / "from_fp32") == losses(stored / "live")
    assert student(stored / "from_fp32") == student(stored / "live")


def test_a_short_cache_comes_again(stored):
    """The reader compares epochs and ids of every row, so the loader shows the stored steps again."""
    live, again = losses(stored / "live"), losses(stored / "from_one")
    assert len(again) == STEPS and again[:13] == live[:13] and again[13:] != live[13:]
    assert "replay" in (stored / "from_one" / "train.log").read_text()


def test_what_is_lost_is_measured(stored):
    manifests = {name: open_manifest(str(stored / name), access=Access()) for name in ("fp32", "int8", "pca")}
    errors = {name: manifest.errors["block/3"] for name, manifest in manifests.items()}
    assert errors["fp32"] == {"relative": 0, "cosine": 1}
    assert 1e-4 < errors["int8"]["relative"] < 0.02 and errors["int8"]["cosine"] > 0.9998
    assert errors["int8"]["relative"] < errors["pca"]["relative"] < 0.5
    sizes = {name: manifest.layout.row_bytes for name, manifest in manifests.items()}
    # 17 tokens of 48 numbers: float32; int8 and a float32 scale a token; 24 in bf16
    assert sizes == {"fp32": 17 * 48 * 4, "int8": 17 * (48 + 4), "pca": 17 * 24 * 2}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("run.seed=1", "run.seed"),
        ("objective.mask_ratio=0.5", "objective.mask_ratio"),
        ("data.crop_scale=[0.2,1]", "data.crop_scale"),
        ("optim.global_batch=64", "optim.global_batch"),
        ("teacher.standardize=layer_norm", "teacher.standardize"),
        ("data.train={train}", "data.train"),
        ("teacher.weights={other}", "teacher.weights"),
        ("teacher.cache={empty}", "teacher.cache"),
        ("teacher.cache=null", "teacher.cache"),
    ],
)
def test_a_cache_of_something_else_is_refused(stored, recipe, digits, tmp_path, change, named):
    other = tmp_path / "other.safetensors"
    weights = next(word.partition("=")[2] for word in recipe if word.startswith("teacher.weights="))
    other.write_bytes(Path(weights).read_bytes()[:-4] + b"\0\0\0\1")
    change = change.format(train=digits / "train", other=other, empty=tmp_path)
    name, *overrides = [*recipe, *cached(stored / "fp32"), f"run.dir={tmp_path / 'run'}", change]
    with pytest.raises(UserError) as refused:
        prepare(load_config(name, overrides), World(), resume="never")
    assert named in str(refused.value) and "\n" not in str(refused.value)


def test_a_cache_without_its_weights_or_with_the_right_ones_is_taken(stored, recipe, tmp_path):
    weights = next(word for word in recipe if word.startswith("teacher.weights="))
    for more in ([], [weights], ["teacher.weights=gone.safetensors"], ["teacher.pretrained=false"]):
        name, *overrides = [*recipe, *cached(stored / "one"), f"run.dir={tmp_path / 'run'}", *more]
        assert prepare(load_config(name, overrides), World(), resume="never").replay == 13


@pytest.mark.parametrize(
    ("options", "change", "named"),
    [
        ({"dtype": "bf16"}, "log.every_steps=5", "--dtype"),
        ({"epochs": 1}, "log.every_steps=5", "--epochs"),
        ({"epochs": float("inf")}, "log.every_steps=5", "--epochs inf"),
        ({"pca": 8}, "log.every_steps=5", "dimensions"),
        ({}, "teacher=null", "teacher"),
        ({"pca": 0}, "log.every_steps=5", "--pca"),
    ],
)
def test_another_request_for_the_same_folder_is_refused(stored, recipe, options, change, named):
    name, *overrides = [*recipe, change]
    with pytest.raises(UserError) as refused:
        prepare_cache(load_config(name, overrides), World(), CacheRequest(stored / "fp32", **options))
    assert named in str(refused.value)


def test_a_part_of_the_images_has_as_many_steps_as_its_run(recipe, tmp_path):
    name, *overrides = [*recipe, "data.share=0.5", f"run.dir={tmp_path / 'run'}"]
    config = load_config(name, overrides)
    of_cache = prepare_cache(config, World(), CacheRequest(tmp_path / "out")).num_steps
    assert of_cache == prepare(config, World(), resume="never").num_steps == 13


def test_a_folder_with_other_files_and_an_incomplete_cache_are_refused(stored, recipe, tmp_path):
    name, *overrides = recipe
    with pytest.raises(UserError) as refused:
        prepare_cache(load_config(name, overrides), World(), CacheRequest(stored / "live"))
    assert str(stored / "live") in str(refused.value)
    for file, content in files_of(stored / "fp32").items():
        (tmp_path / file).write_bytes(content)
    config = load_config(name, [*overrides, *cached(tmp_path), f"run.dir={tmp_path / 'run'}"])
    damaged = sorted(tmp_path.glob("features-*.bin"))[-1]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(UserError, match=damaged.name):
        prepare(config, World(), resume="never")
    damaged.unlink()
    with pytest.raises(UserError, match=damaged.name):
        prepare(config, World(), resume="never")


@pytest.mark.slow
def test_a_damaged_codec_is_made_again_and_other_statistics_are_refused(stored, recipe, tmp_path):
    stats, scaled = tmp_path / "stats.safetensors", tmp_path / "scaled"
    zscore = [*recipe, "teacher.standardize=zscore", f"teacher.stats={stats}"]
    config = load_config(zscore[0], [*zscore[1:], "run.dir=unused"])
    write_stats(config, num_images=16, out=stats)
    shutil.copytree(stored / "int8", tmp_path / "int8")
    codec = tmp_path / "int8" / CODEC
    whole = codec.read_bytes()
    codec.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    again = [["store", {"out": "int8", "dtype": "int8"}, recipe], ["store", {"out": "scaled"}, zscore]]
    drive(again, tmp_path)
    assert codec.read_bytes() == whole and files_of(tmp_path / "int8") == files_of(stored / "int8")
    codec.unlink()
    drive(again, tmp_path)  # the same statistics are taken
    assert codec.read_bytes() == whole
    write_stats(config, num_images=32, out=stats)
    next(scaled.glob("features-*.bin")).unlink()
    with pytest.raises(AssertionError, match=r"teacher\.stats"):
        drive(again[1:], tmp_path)


@pytest.mark.slow
def test_two_ranks_and_a_pipeline_write_the_same_files_and_read_them(recipe, stored, tmp_path):
    streamed = [*recipe, "teacher.placement=pipeline", "teacher.stages=2"]
    jobs = [
        ["store", {"out": "fp32"}, recipe],
        ["store", {"out": "streamed"}, streamed],
        ["store", {"out": "int8", "dtype": "int8"}, streamed],
        ["store", {"out": "pca", "dtype": "bf16", "pca": 24}, recipe],
        ["train", {}, [*recipe, "run.dir=live"]],
        ["train", {}, [*recipe, "run.dir=from_two", *cached(Path("streamed"))]],
        ["train", {}, [*recipe, "run.dir=from_one", *cached(stored / "fp32")]],
    ]
    drive(jobs, tmp_path, ranks=2)
    for name, of_one in (("fp32", "fp32"), ("streamed", "fp32"), ("int8", "int8"), ("pca", "pca")):
        assert files_of(tmp_path / name) == files_of(stored / of_one), name
    assert student(tmp_path / "from_two") == student(tmp_path / "live") == student(tmp_path / "from_one")


@pytest.mark.slow
def test_several_teachers_and_several_students_read_what_is_stored(recipe, tmp_path):
    weights = next(word.partition("=")[2] for word in recipe if word.startswith("teacher.weights="))
    train = next(word for word in recipe if word.startswith("data.train=") and word.endswith("val"))
    shape = {"name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 4, "depth": 4, "num_heads": 2}
    teacher = {**shape, "embed_dim": 48, "num_heads": 3, "weights": weights}
    common = {
        "data": {"train": train.partition("=")[2], "num_workers": 0, "mean": [0.5] * 3, "std": [0.5] * 3},
        "optim": {"global_batch": 32, "epochs": 1, "warmup_epochs": 0.1},
        "log": {"trackers": []},
    }
    targets = [{"name": name, "tap": f"{name}:tokens", "student": "tokens"} for name in "ab"]
    recipes = {
        "two": {
            "student": {**shape, "embed_dim": 32},
            "teachers": {"a": teacher, "b": {**teacher, "standardize": "layer_norm"}},
            "objective": {"name": "features", "targets": targets},
        },
        "family": {
            "students": {"p": {**shape, "embed_dim": 32}, "q": {**shape, "embed_dim": 64}},
            "teacher": teacher,
            "objective": {"name": "dmae", "decoder": {"depth": 1, "embed_dim": 32, "num_heads": 2}},
        },
    }
    for name, sections in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"run": {"dir": name}, **common, **sections}))
    of_a = ["run.dir=two_a", "teachers.a.placement=cache", "teachers.a.cache=a", "teachers.a.weights=null"]
    of_b = ["run.dir=two_ab", "teachers.b.placement=cache", "teachers.b.cache=b"]
    jobs = [["store", {"out": name, "teacher": name}, ["two.yaml"]] for name in "ab"]
    jobs += [["train", {}, ["two.yaml", *more]] for more in ([], of_a, [*of_a, *of_b])]
    jobs += [["store", {"out": "f"}, ["family.yaml"]], ["train", {}, ["family.yaml"]]]
    jobs += [["train", {}, ["family.yaml", "run.dir=family_f", *cached(Path("f"))]]]
    drive(jobs, tmp_path)
    assert student(tmp_path / "two") == student(tmp_path / "two_a") == student(tmp_path / "two_ab")
    for name in "pq":
        assert student(tmp_path / "family" / name) == student(tmp_path / "family_f" / name)


@pytest.mark.slow
def test_a_run_from_a_cache_resumes_bit_for_bit(recipe, stored, tmp_path):
    folder = tmp_path / "run"
    start = [*recipe, *cached(stored / "one"), f"run.dir={folder}", "checkpoint.every_steps=4"]
    process = subprocess.Popen(command(["train", *start], ranks=1), cwd=tmp_path, env=environment())
    deadline = time.monotonic() + LIMIT_S
    while not (folder / "checkpoints" / "step-00000016").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = run(command(["train", *start, "--resume", "auto"], ranks=1), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(folder)[-9:] == losses(stored / "from_one")[-9:]
    assert student(folder) == student(stored / "from_one")


@pytest.mark.slow
def test_twenty_kills_at_random_moments_end_in_the_same_files(recipe, tmp_path):
    long = [*recipe[1:], "optim.epochs=16", "optim.warmup_epochs=1", "-q"]
    done = run([sys.executable, str(KILLER), "20", "0", "whole", "killed", recipe[0], *long], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = [int(line) for line in done.stdout.splitlines() if line.isdigit()]
    num_files = len(list((tmp_path / "whole").glob("features-*.bin")))
    assert len(counts) == 20 and sum(0 < count < num_files for count in counts) > 2, counts
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_flipped_bit_ends_the_run_with_the_files_name(recipe, stored, tmp_path):
    out = tmp_path / "cache"
    out.mkdir()
    for name, content in files_of(stored / "fp32").items():
        (out / name).write_bytes(content)
    victim = sorted(out.glob("features-*.bin"))[1]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    done = run(
        command(["train", *recipe, *cached(out), f"run.dir={tmp_path / 'run'}", "-q"], ranks=1), cwd=tmp_path
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("dmae-ds: error")]
    assert victim.name in line
    os.remove(victim)
    again = run(command(["teacher", "cache", recipe[0], str(out), *recipe[1:], "-q"], ranks=1), cwd=tmp_path)
    assert again.returncode == 0 and files_of(out) == files_of(stored / "fp32")
