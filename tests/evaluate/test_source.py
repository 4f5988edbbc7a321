"""evaluate/source.py: other data for a run, and weights files in place of one."""

from __future__ import annotations

import timm
import torch
from safetensors.torch import load_file

from dmae_ds.cli.main import main
from dmae_ds.evaluate.features import POOLS
from dmae_ds.evaluate.results import read_results
from dmae_ds.evaluate.source import find_sources
from tests.evaluate.conftest import STEP, STUDENT, make_shards
from tests.messages import refused


def test_other_data_for_a_run_leaves_its_own_results_alone(run, shards, tmp_path):
    other = make_shards(tmp_path / "other", num=8, seed=5)
    assert main(["eval", "knn", str(run), "--k", "2"]) == 0
    before = (run / "results.jsonl").read_bytes()
    assert main(["eval", "knn", str(run), f"data.val={other}", "--pool", "cls", "--k", "2"]) == 0
    assert main(["eval", "probe", str(run), "--l2", "1", "--pool", "cls", f"data.val={other}"]) == 0
    assert (run / "results.jsonl").read_bytes() == before
    (folder,) = run.glob("on-other-*")
    knn, probe = read_results(folder)
    assert (knn["num_val"], probe["num_val"], probe["metric"], knn["step"]) == (8, 8, "probe", STEP)


def test_a_weights_file_in_place_of_a_run(run, shards, tmp_path):
    student = run / "student.safetensors"
    tensors = load_file(student)
    torch.save({"model": {f"module.{name}": value for name, value in tensors.items()}}, tmp_path / "x.pth")
    data = [f"data.train={shards[0]}", f"data.val={shards[1]}", "data.num_workers=0"]
    network = [f"network.{key}={value}" for key, value in STUDENT.items()]
    file, folder = str(tmp_path / "x.pth"), tmp_path / "out"
    assert main(["eval", "knn", file, *data, *network, f"run.dir={folder}", "--k", "2"]) == 0
    assert main(["eval", "knn", str(run), "--k", "2"]) == 0
    (ours,), (theirs,) = read_results(run), read_results(folder)
    assert ours["scores"] == theirs["scores"] and theirs["step"] == 0
    (source,) = find_sources([file, *data, *network, f"run.dir={folder}"])
    loaded = source.load().state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    torch.save({name: value + 1 for name, value in tensors.items()}, file)
    assert main(["eval", "knn", file, *data, *network, f"run.dir={folder}", "--k", "2"]) == 0
    assert len({result["settings"]["weights"] for result in read_results(folder)}) == 2
    with refused("data.repeat"):
        find_sources([file, *data, *network, f"run.dir={folder}", "data.repeat=2"])
    with refused("run.dir"):
        find_sources([file, *data, *network])
    with refused("network.name"):
        find_sources([file, *data, f"run.dir={folder}"])
    with refused("'none.pth'", "run folder"):
        find_sources(["none.pth", *data])
    with refused("network.depth=3", "run folder"):
        find_sources([str(run), "network.depth=3"])
    with refused("run.dir"):
        find_sources([str(run), file, f"run.dir={folder}"])


def test_pixels_of_a_tagged_network_are_normalised_as_timm_says(tmp_path):
    (tmp_path / "w.pth").touch()
    words = [
        str(tmp_path / "w.pth"),
        "data.train=x",
        "run.dir=y",
        "network.name=vit_base_patch16_224.augreg_in21k",
    ]
    assert find_sources(words)[0].data.mean == (0.5, 0.5, 0.5)
    assert find_sources([*words, "data.mean=[0,0,0]", "data.std=[1,1,1]"])[0].data.std == (1, 1, 1)


def test_registers_are_no_patches_and_a_network_without_cls_has_none_to_pool():
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, reg_tokens=2)
    tokens = torch.arange(7.0)[None, :, None]
    assert vit.num_prefix_tokens == 3
    assert POOLS["mean"](tokens, vit.num_prefix_tokens).item() == 4.5
    assert POOLS["patches"](tokens, 3).shape == (1, 4, 1)
