"""Teachers with a decoder or a classifier on top, in every placement; the classifier that a run leaves."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dmae_ds.config.load import load_config
from dmae_ds.data.loader import eval_batches
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import write_manifest
from dmae_ds.distributed.world import World
from dmae_ds.models.decoder import Decoder
from dmae_ds.models.vit import build_student
from dmae_ds.train.preflight import prepare
from tests.messages import refused
from tests.train.conftest import deepspeed, losses, metrics, run

DRIVER = Path(__file__).with_name("driver.py")
NAME = "vit_tiny_patch16_224"
SHAPE = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3}
PLACEMENTS = {
    "replicated": [],
    "pipeline": ["teacher.placement=pipeline", "teacher.stages=2"],
    "zero3": ["teacher.placement=zero3", "deepspeed=zero3"],
}


@pytest.fixture(scope="module")
def recipes(digits, tmp_path_factory) -> dict[str, list[str]]:
    """Arguments of `dmae-ds train`: 8 steps of each stage, with a random MAE and a random classifier."""
    folder, generator = tmp_path_factory.mktemp("teachers"), torch.Generator().manual_seed(7)
    metadata = {"timm_name": NAME, "timm_overrides": json.dumps(SHAPE)}
    save_file(
        build_student(NAME, SHAPE, generator=generator).state_dict(),
        folder / "student.safetensors",
        metadata=metadata,
    )
    decoder = Decoder(
        encoder_dim=48, patch_size=4, grid=(8, 8), depth=2, embed_dim=32, num_heads=4, generator=generator
    )
    save_file(
        {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()},
        folder / "decoder.safetensors",
        metadata=metadata,
    )
    torch.manual_seed(8)
    model = timm.create_model(NAME, **SHAPE, num_classes=10, global_pool="avg")
    torch.nn.init.normal_(model.head.weight)
    save_file(model.state_dict(), folder / "classifier.safetensors")
    common = [
        f"data.train={digits / 'train'}",
        f"data.val={digits / 'val'}",
        *(f"teacher.{key}={SHAPE[key]}" for key in ("embed_dim", "depth", "num_heads")),
        "student.embed_dim=32",
        "student.num_heads=2",
        "optim.global_batch=16",
        f"optim.epochs={7.9 * 16 / 1400}",
        "optim.warmup_epochs=0.02",
        "log.trackers=[]",
        "checkpoint.keep=1",
    ]
    return {
        "generic": [
            "digits_g2sd_generic",
            *common,
            f"teacher.weights={folder}",
            "teacher.decoder_embed_dim=32",
        ],
        "specific": [
            "digits_g2sd_specific",
            *common,
            f"teacher.weights={folder / 'classifier.safetensors'}",
            "teacher.format=timm",
            "student.weights=null",
            "objective.augment.mixup=0.8",
            "objective.augment.cutmix=1.0",
            "objective.augment.erase=0.25",
            "objective.augment.rand_augment=rand-m9-mstd0.5-inc1",
        ],
    }


@pytest.fixture(scope="module")
def runs(recipes, tmp_path_factory) -> Path:
    """Runs of each stage alone, and on two ranks with its teacher in every placement; two starts."""
    folder = tmp_path_factory.mktemp("runs")
    launcher = [*deepspeed(2), str(DRIVER)]
    placed = {
        f"{stage}-{name}": [*recipes[stage], *more] for stage in recipes for name, more in PLACEMENTS.items()
    }
    alone = {f"{stage}-alone": [*recipes[stage], "optim.micro_batch=4"] for stage in recipes}
    for start, variants in (([sys.executable, str(DRIVER)], alone), (launcher, placed)):
        recipes = [[*arguments, f"run.dir={folder / name}"] for name, arguments in variants.items()]
        done = run([*start, json.dumps(recipes)], cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["generic", "specific"])
def test_the_curve_is_the_same_for_every_placement(runs, stage):
    """Also with images that are mixed; one process accumulates four at a time."""
    alone = losses(runs / f"{stage}-alone")
    assert len(alone) == 8 and len(set(alone)) == 8
    for name in PLACEMENTS:
        assert losses(runs / f"{stage}-{name}") == pytest.approx(alone, rel=1e-5), name


@pytest.mark.slow
def test_a_specific_run_leaves_a_classifier_that_timm_loads(runs, digits):
    folder = runs / "specific-zero3"
    with safe_open(folder / "classifier.safetensors", "pt") as file:
        metadata = file.metadata()
    settings = json.loads(metadata["classifier"])
    kwargs = {**json.loads(metadata["timm_overrides"]), **settings["keys"]}
    model = timm.create_model(metadata["timm_name"], **kwargs).eval()
    model.load_state_dict(load_file(folder / "classifier.safetensors"), strict=True)
    val = ShardSet.open(digits / "val", label="data.val")
    mean, std = (torch.tensor(settings[key])[:, None, None] for key in ("mean", "std"))
    num_right = 0
    for batch in eval_batches(
        val, img_size=32, crop_pct=1.0, batch_size=64, rank=0, world_size=1, num_workers=0
    ):
        with torch.no_grad():
            logits = model((batch.images.float() / 255 - mean) / std)
        num_right += int((logits.argmax(dim=1) == batch.labels).sum())
    accuracy = json.loads((folder / "accuracy.json").read_text())
    assert accuracy["top1"] == pytest.approx(100 * num_right / 397)
    assert (accuracy["num_val"], accuracy["step"]) == (397, 8)
    rows = metrics(folder)
    assert [row["step"] for row in rows if "accuracy/top1" in row] == [8]
    assert rows[-1]["accuracy/top1"] == pytest.approx(accuracy["top1"])
    (result,) = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert (result["metric"], result["settings"]["init"]) == ("supervised", "random")
    plain = timm.create_model(NAME, num_classes=0, **{**SHAPE, "embed_dim": 32, "num_heads": 2})
    plain.load_state_dict(load_file(folder / "student.safetensors"), strict=True)
    assert not (runs / "generic-zero3" / "accuracy.json").exists()


def test_images_that_are_mixed_stay_in_one_micro_batch(recipes, tmp_path):
    world = World(rank=0, local_rank=0, size=1, local_size=1)

    def check(*more):
        recipe, *overrides = [*recipes["specific"], f"run.dir={tmp_path / 'run'}", *more]
        return prepare(load_config(recipe, overrides), world, resume="never")

    assert check("optim.micro_batch=7").micro_batch == 4
    unmixed = ["objective.augment.mixup=0", "objective.augment.cutmix=0"]
    assert check("optim.global_batch=15", *unmixed).micro_batch == 15
    with refused("g2sd_specific", "data.repeat", 2):
        check("data.repeat=2")
    assert check().num_classes == 10


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (lambda names: [*names[:3], "x", *names[4:]], ["label 3", "'3'", "'x'"]),
        (lambda names: [names[1], names[0], *names[2:]], ["label 0", "'0'", "'1'"]),
        (lambda names: names[:9], ["10 and 9", "label 9", "no class"]),
        (lambda names: [*names, "10"], ["10 and 11", "label 10", "'10'"]),
        (lambda names: [], ["data.val", "0 classes"]),
    ],
)
def test_validation_images_of_other_classes_are_refused_before_training(recipes, tmp_path, changed, words):
    """Every accuracy that is measured after days of training would be of other classes."""
    recipe, *overrides = [*recipes["specific"], f"run.dir={tmp_path / 'run'}"]
    (val,) = [Path(text.partition("=")[2]) for text in overrides if text.startswith("data.val=")]
    shutil.copytree(val, tmp_path / "val")
    shards = ShardSet.open(val, label="data.val")
    write_manifest(tmp_path / "val", classes=changed(shards.classes), seed=0, shards=shards.shards)
    with refused("data.val", *words):
        prepare(load_config(recipe, [*overrides, f"data.val={tmp_path / 'val'}"]), World(), resume="never")
    assert not (tmp_path / "run").exists()
