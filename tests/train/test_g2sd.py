"""Teachers with a decoder or a classifier on top, in every placement; and what a specific run leaves: the classifier, and what it is worth."""

from __future__ import annotations

import json
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
from dmae_ds.distributed.world import World
from dmae_ds.models.decoder import Decoder
from dmae_ds.models.vit import build_student
from dmae_ds.train.preflight import prepare
from tests.messages import refused
from tests.train.conftest import free_port, losses, run

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
    """Arguments of `dmae-ds train`: 8 steps of each stage, beside a random MAE and a random classifier."""
    folder, generator = tmp_path_factory.mktemp("teachers"), torch.Generator().manual_seed(7)
    about = {"timm_name": NAME, "timm_overrides": json.dumps(SHAPE)}
    save_file(
        build_student(NAME, SHAPE, generator=generator).state_dict(),
        folder / "student.safetensors",
        metadata=about,
    )
    decoder = Decoder(
        encoder_dim=48, patch_size=4, grid=(8, 8), depth=2, embed_dim=32, num_heads=4, generator=generator
    )
    save_file(
        {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()},
        folder / "decoder.safetensors",
        metadata=about,
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
    """Each stage alone, and on two ranks with its teacher in every placement: two starts in all."""
    folder = tmp_path_factory.mktemp("runs")
    launcher = ["deepspeed", "-q", "--num_gpus", "2", "--master_port", str(free_port()), DRIVER]
    placed = {
        f"{stage}-{name}": [*recipes[stage], *more] for stage in recipes for name, more in PLACEMENTS.items()
    }
    alone = {f"{stage}-alone": [*recipes[stage], "optim.micro_batch=4"] for stage in recipes}
    for start, variants in (([sys.executable, DRIVER], alone), (launcher, placed)):
        done = run(
            [
                *start,
                json.dumps(
                    [[*arguments, f"run.dir={folder / name}"] for name, arguments in variants.items()]
                ),
            ],
            cwd=folder,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["generic", "specific"])
def test_the_curve_is_the_same_wherever_the_teacher_is(runs, stage):
    """Pictures that are mixed too: alone, four at a time are accumulated."""
    alone = losses(runs / f"{stage}-alone")
    assert len(alone) == 8 and len(set(alone)) == 8
    for name in PLACEMENTS:
        assert losses(runs / f"{stage}-{name}") == pytest.approx(alone, rel=1e-5), name


@pytest.mark.slow
def test_a_specific_run_leaves_a_classifier_that_timm_alone_measures(runs, digits):
    folder = runs / "specific-zero3"
    with safe_open(folder / "classifier.safetensors", "pt") as file:
        about = file.metadata()
    keys = json.loads(about["classifier"])
    model = timm.create_model(
        about["timm_name"], **json.loads(about["timm_overrides"]), **keys["keys"]
    ).eval()
    model.load_state_dict(load_file(folder / "classifier.safetensors"), strict=True)
    val = ShardSet.open(digits / "val", label="data.val")
    right = 0
    for batch in eval_batches(
        val, img_size=32, crop_pct=1.0, batch_size=64, rank=0, world_size=1, num_workers=0
    ):
        pixels = (batch.images.float() / 255 - torch.tensor(keys["mean"])[:, None, None]) / torch.tensor(
            keys["std"]
        )[:, None, None]
        with torch.no_grad():
            right += int((model(pixels).argmax(dim=1) == batch.labels).sum())
    said = json.loads((folder / "accuracy.json").read_text())
    assert said["top1"] == pytest.approx(100 * right / 397) and said["num_val"] == 397 and said["step"] == 8
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "accuracy/top1" in row] == [8] and rows[-1][
        "accuracy/top1"
    ] == pytest.approx(said["top1"])
    (result,) = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert (result["metric"], result["settings"]["init"]) == ("supervised", "random")
    plain = timm.create_model(NAME, num_classes=0, **{**SHAPE, "embed_dim": 32, "num_heads": 2})
    plain.load_state_dict(load_file(folder / "student.safetensors"), strict=True)
    assert not (runs / "generic-zero3" / "accuracy.json").exists()


def test_neighbours_that_are_mixed_stay_in_one_micro_batch(recipes, tmp_path):
    world = World(rank=0, local_rank=0, size=1, local_size=1)

    def check(*more):
        recipe, *overrides = [*recipes["specific"], f"run.dir={tmp_path / 'run'}", *more]
        return prepare(load_config(recipe, overrides), world, resume="never")

    assert check("optim.micro_batch=7").micro_batch == 4
    assert (
        check("optim.global_batch=15", "objective.augment.mixup=0", "objective.augment.cutmix=0").micro_batch
        == 15
    )
    with refused("g2sd_specific", "data.repeat", 2):
        check("data.repeat=2")
    assert check().num_classes == 10
