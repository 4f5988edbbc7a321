"""`dmae-ds eval dense`: what it prints, writes and refuses, for runs and weights files, on 1 and 2 ranks."""

import io
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dmae_ds.cli.main import main
from dmae_ds.data.dense import DenseInfo
from dmae_ds.data.shards import NewSample, write_manifest, write_shard
from dmae_ds.evaluate.results import read_results
from tests.conftest import REPOSITORY
from tests.evaluate.conftest import STEP, STUDENT, make_run
from tests.train.conftest import free_port

KNN = ["--size", "24", "--window", "16", "--patches", "400", "--k", "5"]
LINEAR = ["--size", "24", "--window", "16", "--iterations", "4", "--warmup", "1", "--batch", "5"]


@pytest.fixture(scope="module")
def dense_run(scenes, tmp_path_factory):
    """A run with random weights, whose data are the scenes."""
    folder = tmp_path_factory.mktemp("dense")
    return make_run(folder / "run", train=scenes / "train", val=scenes / "val", objective="mae")


@pytest.fixture
def run(dense_run, tmp_path):
    return shutil.copytree(dense_run, tmp_path / "run")


def png(values):
    file = io.BytesIO()
    Image.fromarray(np.asarray(values, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_maps(folder, maps, *, classes):
    """A dense set of grey images with these label maps [H, W]."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    samples = []
    for number, label_map in enumerate(maps):
        (height, width), label_map = np.shape(label_map), png(label_map)
        pixels = rng.integers(0, 255, (height, width, 3))
        samples.append(NewSample(number, "png", png(pixels), width, height, -1, seg=label_map))
    shard = write_shard(folder, "shard-000000.tar", samples, dense=True)
    info = DenseInfo(map_classes=classes, box_classes=None, has_masks=False)
    write_manifest(folder, classes=[], seed=0, shards=[shard], dense=info.entry())
    return folder


def dense(*words):
    return main(["eval", "dense", *map(str, words)])


def test_both_tasks_are_printed_and_written(run, capsys):
    words = [*KNN, *LINEAR[4:], "--seed", "3", "--task", "knn", "linear"]
    assert dense(run, *words) == 0
    out = capsys.readouterr().out
    knn, linear = read_results(run)
    assert (knn["metric"], linear["metric"]) == ("dense_knn", "dense_linear")
    for result in (knn, linear):
        assert set(result["scores"]) == {"miou", "mean_accuracy", "pixel_accuracy"}
        assert f"mIoU {result['scores']['miou']:.1f}%" in out
        expected = {"step": STEP, "num_train": 24, "num_val": 8, "labels": "all", "world_size": 1}
        assert {name: result[name] for name in expected} == expected
        sizes = {"size": 24, "window": 16, "stride": 10, "seed": 3, "precision": "fp32"}
        assert {name: result["settings"][name] for name in sizes} == sizes
    assert (knn["settings"]["k"], linear["settings"]["iterations"]) == (5, 4)
    assert 0 < knn["scores"]["miou"] < 50 and knn["scores"] != linear["scores"]
    assert dense(run, *words) == 0
    assert [result["scores"] for result in read_results(run)] == [knn["scores"], linear["scores"]]
    assert not list(run.rglob("*.tmp"))


def test_a_weights_file_in_place_of_a_run(run, scenes, tmp_path):
    tensors = {f"module.{name}": value for name, value in load_file(run / "student.safetensors").items()}
    torch.save({"model": tensors}, tmp_path / "x.pth")
    data = [f"data.train={scenes / 'train'}", f"data.val={scenes / 'val'}", "data.num_workers=0"]
    network = [f"network.{key}={value}" for key, value in STUDENT.items()]
    assert dense(tmp_path / "x.pth", *data, *network, f"run.dir={tmp_path / 'out'}", *KNN) == 0
    assert dense(run, *KNN) == 0
    ((ours,), (theirs,)) = (read_results(folder) for folder in (run, tmp_path / "out"))
    assert ours["scores"] == theirs["scores"] and theirs["step"] == 0


def test_a_run_without_label_maps_takes_other_data(run, shards, scenes, tmp_path, capsys):
    plain = make_run(tmp_path / "plain", train=shards[0], val=shards[1], objective="mae")
    assert dense(plain, *KNN) == 2
    error = capsys.readouterr().err
    for word in ("data.train", "--masks", "data.train=SHARDS", "data.val=SHARDS"):
        assert word in error
    assert error.count("\n") == 1 and not (plain / "results.jsonl").exists()
    data = [f"data.train={scenes / 'train'}", f"data.val={scenes / 'val'}"]
    assert dense(plain, *data, *KNN) == 0
    (folder,) = plain.glob("on-val-*")
    assert read_results(folder)[0]["metric"] == "dense_knn" and not (plain / "results.jsonl").exists()


def test_what_cannot_be_measured_is_one_line(run, scenes, tmp_path, capsys):
    blank = write_maps(tmp_path / "blank", [np.full((9, 13), 255)] * 2, classes=["a", "b"])
    other = write_maps(tmp_path / "other", [np.zeros((9, 13))] * 2, classes=["a", "c"])
    good = write_maps(tmp_path / "good", [np.eye(9, 13), np.zeros((5, 7))], classes=["a", "b"])
    damaged = shutil.copytree(good, tmp_path / "damaged")
    tar = damaged / "shard-000000.tar"
    content = bytearray(tar.read_bytes())
    content[512 + 60] ^= 255  # the first image
    tar.write_bytes(content)
    for data, options, words in (
        ((good, other), [], ("data.train", "data.val", "'b'", "'c'")),
        ((blank, good), [], ("data.train", "no pixel")),
        ((good, blank), ["--k", "1"], ("no pixel",)),
        ((good, damaged), ["--k", "1"], ("shard-000000.tar", "corrupt")),
        ((good, good), ["--k", "9999"], ("--k 9999", "patches")),
        ((good, good), ["--k", "0"], ("k 0",)),
        ((good, good), ["--window", "3"], ("window 3", "4 px")),
        ((good, good), ["--lr", "1"], ("--lr", "--task linear")),
        ((good, good), ["--task", "linear", "--k", "1"], ("--k", "--task knn")),
        ((good, good), ["--task", "linear", "--iterations", "1"], ("iterations 1", "warm-up 1500")),
        ((good, "null"), [], ("data.val", "null")),
        ((good, good), ["data.bits=16"], ("16 bits", "RGB")),
    ):
        overrides = [f"data.train={data[0]}", f"data.val={data[1]}", f"run.dir={tmp_path / 'out'}"]
        assert dense(run, *overrides, *options) == 2, options
        error = capsys.readouterr().err
        assert all(str(word) in error for word in words), error
        assert error.rstrip().count("\n") == 0 and not (tmp_path / "out" / "results.jsonl").exists()


def test_odd_sizes_classes_that_train_lacks_and_one_class(run, tmp_path):
    odd = write_maps(
        tmp_path / "odd", [np.eye(9, 13), np.zeros((1, 7)), np.ones((31, 6))], classes=["a", "b"]
    )
    lacks = write_maps(tmp_path / "lacks", [np.zeros((9, 13))], classes=["a", "b"])
    one = write_maps(tmp_path / "one", [np.zeros((9, 13)), np.full((5, 5), 255)], classes=["a"])
    results = {}
    for name, train, val in (("odd", odd, odd), ("lacks", lacks, odd), ("one", one, one)):
        out = tmp_path / f"out-{name}"
        data = [f"data.train={train}", f"data.val={val}", f"run.dir={out}"]
        tasks = ["--task", "knn", "linear", "--k", "2", *LINEAR, "--size", "0"]
        assert dense(run, *data, *tasks) == 0
        results[name] = [result["scores"] for result in read_results(out)]
    # Only class a is ever predicted: of its pixels all are right, of b's none.
    share = (117 - 9 + 7) / (117 + 7 + 186)
    assert results["lacks"][0] == pytest.approx(
        {"miou": 100 * share / 2, "mean_accuracy": 50, "pixel_accuracy": 100 * share}
    )
    assert all(scores["miou"] == 100 for scores in results["one"])
    assert 0 < results["odd"][0]["miou"] <= 100


@pytest.mark.slow
def test_two_ranks_give_the_numbers_of_one(run, tmp_path):
    words = [*KNN, *LINEAR[4:], "--task", "knn", "linear", "-q"]
    two = shutil.copytree(run, tmp_path / "two")
    start = [sys.executable, "-m"]
    ranks = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()), "-m"]
    for folder, more in ((run, []), (two, ranks)):
        command = [*start, *more, "dmae_ds", "eval", "dense", folder, *words]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    (knn, linear), (knn_of_two, linear_of_two) = read_results(run), read_results(two)
    assert knn_of_two["world_size"] == linear_of_two["world_size"] == 2
    assert knn_of_two["scores"] == knn["scores"]
    # Sums in another order may move a pixel whose two best scores are equal to six digits.
    assert linear_of_two["scores"] == pytest.approx(linear["scores"], abs=0.05)
