"""Every objective with one process, two ranks, ZeRO-3 and a teacher in stages computes the same.

Also a kill changes nothing, and timm loads the student. `mae` and `dmae` are in test_same_curve.py and
test_resume.py; here are objectives with an EMA teacher, several views, labels, or another part of a
teacher. All tests are slow: a start of the launcher takes longer than the 20 steps of a run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from dmae_ds.config.load import read_saved_config
from tests.train.conftest import command, deepspeed, losses, refusal, run
from tests.train.test_resume import kill_at_step

DRIVER = Path(__file__).with_name("driver.py")
pytestmark = pytest.mark.slow
STEPS, BATCH = 20, 16
NETWORK = {"name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 4}
TEACHER = {**NETWORK, "embed_dim": 48, "depth": 4, "num_heads": 3, "format": "mae"}
TEACHER_DECODER = {"decoder_depth": 2, "decoder_embed_dim": 32, "decoder_num_heads": 2}
DECODER = {"depth": 2, "embed_dim": 32, "num_heads": 2}
EPOCHS = STEPS * BATCH / 1400
DINO = {
    "num_prototypes": 32,
    "hidden_dim": 24,
    "bottleneck_dim": 16,
    "local_crops": 2,
    "local_size": 16,
    "teacher_temperature_warmup_epochs": EPOCHS / 2,
    "freeze_last_layer_epochs": EPOCHS / 4,
}
# Every kind of target: a queue that is no multiple of the batch, similarities, and a masked pass.
FEATURES = {
    "targets": [
        {"name": "global", "tap": "cls", "student": "cls", "distance": "kl", "over": "queue"}
        | {"queue_size": 40, "normalize": "l2"},
        {"name": "local", "where": "patches", "distance": "kl", "over": "patches", "normalize": "l2"},
        {"name": "patch", "where": "masked", "head": "norm_linear"},
    ],
    "mask": {"ratio": 0.5, "shape": "block", "whole_pass": True, "every": 2},
    "photometric": "jitter",
}
# Of two teachers, of which an image may drop one.
TWO = {
    "targets": [
        {"tap": "a:tokens", "head": "norm_linear"},
        {"tap": "a:cls", "student": "cls", "distance": "cosine"},
        {"tap": "b:block/3", "student": "block/2", "distance": "smooth_l1", "where": "patches"},
    ],
    "teacher_drop": 0.5,
}
# Name of the run -> (objective, the teacher's file; of teachers a and b the files of both).
OBJECTIVES = {
    "g2sd_generic": ({"name": "g2sd_generic", "decoder": DECODER}, "mae"),
    "g2sd_specific": ({"name": "g2sd_specific"}, "classifier"),
    "sdae": ({"name": "sdae", "decoder": DECODER, "momentum_every": "step"}, None),
    "dino": ({"name": "dino", **DINO}, None),
    "dino_dmae": ({"name": "dino", **DINO, "distill": {}}, "mae"),
    "mocov3": ({"name": "mocov3", "hidden_dim": 24, "output_dim": 16}, None),
    "mocov3_dmae": ({"name": "mocov3", "hidden_dim": 24, "output_dim": 16, "distill": {}}, "mae"),
    "tinymim": ({"name": "tinymim"}, "mae"),
    "amd": ({"name": "amd", "mask_ratio": 0.75, "decoder": DECODER}, "mae"),
    "features": ({"name": "features", **FEATURES}, "mae"),
    "two_teachers": ({"name": "features", **TWO}, ("mae", "classifier")),
}
TEACHERS = {
    "g2sd_generic": TEACHER_DECODER,
    "tinymim": {"num_heads": 4},  # which divide the student's width
    "amd": {"sees": "superset", "mask_ratio": 0.5},
}
WITHOUT_EMA = ("g2sd_generic", "g2sd_specific", "tinymim", "amd", "two_teachers")
# Batch norm over 16 images that are nearly alike amplifies rounding: one process with 1, 2 and 3 threads
# differs by up to 1% at a rate of 1e-2, and by 3e-6 at 3e-3, with DMAE's term or without.
RATES = {"mocov3": 3e-3}
STREAM = ["deepspeed=zero2", "teacher.placement=pipeline", "teacher.stages=2"]
# One of the two is in stages, the other replicated.
STREAMS = {"two_teachers": ["deepspeed=zero2", "teachers.a.placement=pipeline", "teachers.a.stages=2"]}
VARIANTS = [
    *((name, variant) for name in OBJECTIVES for variant in ("alone", "zero2", "zero3")),
    *((name, "stream") for name, (_, teacher) in OBJECTIVES.items() if teacher is not None),
]
# These are killed: dino and mocov3 without DMAE's term have nothing in addition.
KILLED = ["g2sd_generic", "g2sd_specific", "sdae", "dino_dmae", "mocov3_dmae", "tinymim", "amd", "features"]
KILLED += ["two_teachers"]


@pytest.fixture(scope="session")
def recipes(digits, tmp_path_factory) -> dict[str, Path]:
    """A recipe for each: 20 steps of 16 images, a student of 32 x 4 blocks, a teacher of 48 x 4.

    The teacher has two decoder blocks or a head.
    """
    folder = tmp_path_factory.mktemp("recipes")
    torch.manual_seed(7)
    shape = {key: TEACHER[key] for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    state = timm.create_model(
        NETWORK["name"], num_classes=10, global_pool="avg", fc_norm=True, **shape
    ).state_dict()
    head = {name: tensor for name, tensor in state.items() if name.startswith(("head.", "fc_norm."))}
    encoder = {name: tensor for name, tensor in state.items() if name not in head}
    blocks = timm.create_model(
        NETWORK["name"], num_classes=0, **{**shape, "embed_dim": 32, "num_heads": 2, "depth": 2}
    ).blocks.state_dict()
    decoder = {
        "decoder_embed.weight": torch.randn(32, 48),
        "decoder_embed.bias": torch.randn(32),
        "mask_token": torch.randn(1, 1, 32),
        "decoder_pos_embed": torch.randn(1, 65, 32),
    }
    decoder |= {f"decoder_blocks.{name}": tensor for name, tensor in blocks.items()}
    norm = {"norm.weight": torch.ones(48), "norm.bias": torch.zeros(48)}
    torch.save({"model": {**encoder, **norm, **decoder}}, folder / "mae.pth")
    torch.save({"model": {**encoder, **head}}, folder / "classifier.pth")
    return {name: _write_recipe(folder, digits, name) for name in OBJECTIVES}


def _write_recipe(folder: Path, digits: Path, name: str) -> Path:
    objective, weights = OBJECTIVES[name]
    recipe = {
        "run": {"dir": str(folder / "unused")},
        "student": {**NETWORK, "embed_dim": 32, "depth": 4, "num_heads": 2},
        "objective": objective,
        "data": {
            "train": str(digits / "train"),
            "val": str(digits / "val"),
            "num_workers": 1,
            "crop_scale": [0.5, 1.0],
            "crop_pct": 1.0,
        },
        "optim": {
            "global_batch": BATCH,
            "base_lr": RATES.get(objective["name"], 1e-2),
            "epochs": EPOCHS,
            "warmup_epochs": EPOCHS / 5,
        },
        "checkpoint": {"every_steps": 5, "keep": 9},
        "log": {"every_steps": 1, "trackers": []},
    }
    if isinstance(weights, tuple):
        recipe["teachers"] = {
            teacher: {**TEACHER, "weights": str(folder / f"{file}.pth"), "standardize": "layer_norm"}
            for teacher, file in zip("ab", weights, strict=True)
        }
        recipe["teachers"]["b"] |= {"sees": "all", "weight": 0.5}
    elif weights is not None:
        recipe["teacher"] = {**TEACHER, **TEACHERS.get(name, {}), "weights": str(folder / f"{weights}.pth")}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory) -> Path:
    """Shards of images without labels."""
    folder = tmp_path_factory.mktemp("unlabelled")
    (folder / "images").mkdir()
    for number in range(64):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(folder / "images" / f"{number}.jpg")
    done = run(
        [
            sys.executable,
            "-m",
            "data_prep.cli",
            "make",
            "--unlabelled",
            str(folder / "images"),
            str(folder / "shards"),
        ],
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return folder / "shards"


@pytest.fixture(scope="module")
def curves(recipes, tmp_path_factory) -> Path:
    """A folder with runs named <objective>-<variant>: one start alone, one with two ranks."""
    folder = tmp_path_factory.mktemp("curves")
    launcher = [*deepspeed(2), str(DRIVER)]
    options = {"alone": [], "zero2": ["deepspeed=zero2"], "zero3": ["deepspeed=zero3"]}
    for start, alone in (([sys.executable, str(DRIVER)], True), (launcher, False)):
        runs = [
            [
                str(recipes[name]),
                f"run.dir={folder / f'{name}-{variant}'}",
                *options.get(variant, STREAMS.get(name, STREAM)),
            ]
            for name, variant in VARIANTS
            if (variant == "alone") == alone
        ]
        done = run([*start, json.dumps(runs)], cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("name, variant", [pair for pair in VARIANTS if pair[1] != "alone"])
def test_one_process_two_ranks_zero3_and_a_stream_compute_the_same(curves, name, variant):
    alone, found = losses(curves / f"{name}-alone"), losses(curves / f"{name}-{variant}")
    assert len(alone) == STEPS and alone[-1] != alone[0]
    assert found == pytest.approx(alone, rel=1e-5)


def test_four_ranks_with_two_teachers_in_stages_compute_the_same(recipes, tmp_path):
    """Groups of two and of four ranks are in one world, and the chain of streams fills and empties."""
    recipe = str(recipes["two_teachers"])
    stages = [f"teachers.{name}.placement=pipeline" for name in "ab"]
    stages += ["teachers.a.stages=4", "teachers.b.stages=2"]
    for ranks, more in ((1, []), (4, stages)):
        folder = tmp_path / str(ranks)
        done = run(command(["train", recipe, f"run.dir={folder}", *more], ranks=ranks), cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    assert len(losses(tmp_path / "4")) == STEPS
    assert losses(tmp_path / "4") == pytest.approx(losses(tmp_path / "1"), rel=1e-5)


@pytest.mark.parametrize("name, variant", VARIANTS)
def test_the_student_loads_into_timm_strictly(curves, name, variant):
    config = read_saved_config(curves / f"{name}-{variant}")
    state = load_file(curves / f"{name}-{variant}" / "student.safetensors")
    timm.create_model(config.student.name, num_classes=0, **config.student.overrides()).load_state_dict(
        state, strict=True
    )
    assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in (*WITHOUT_EMA, "features")])
def test_the_ema_teacher_is_in_the_checkpoint_and_the_same_on_any_ranks(curves, name):
    """Every way of training agrees on the EMA teacher, and it differs from the student."""

    def ema(variant):
        return load_file(
            curves / f"{name}-{variant}" / "checkpoints" / f"step-{STEPS:08d}" / "ema.safetensors"
        )

    alone = ema("alone")
    student = load_file(curves / f"{name}-alone" / "student.safetensors")
    for variant in ("zero2", "zero3"):
        found = ema(variant)
        assert found.keys() == alone.keys()
        for key, tensor in found.items():
            # AdamW turns gradients that are only rounding noise into steps of +-lr: the key third of
            # qkv.bias, and a shift of the input of batch norm.
            if not key.endswith("qkv.bias") and not (
                name.startswith("mocov3") and key == "student.norm.bias"
            ):
                torch.testing.assert_close(
                    tensor, alone[key], rtol=1e-3, atol=1e-4 * alone[key].abs().max().item() + 1e-6, msg=key
                )
    assert not torch.equal(alone["student.blocks.0.mlp.fc1.weight"], student["blocks.0.mlp.fc1.weight"])


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", KILLED)
def test_killed_and_resumed_is_bit_identical(recipes, tmp_path, name, ranks):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    recipe = [str(recipes[name]), *(STREAMS.get(name, []) if ranks == 2 else []), "deepspeed=zero2"]
    # Not a run of `curves`: a process that has trained other recipes before may round differently (seen on
    # AMD).
    done = run(command(["train", *recipe, f"run.dir={whole}"], ranks=ranks), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    kill_at_step(recipe, killed, 12, ranks=ranks, more=[])
    resumed_from = int((killed / "checkpoints" / "latest").read_text().removeprefix("step-"))
    assert 5 <= resumed_from < STEPS
    done = run(
        command(["train", *recipe, f"run.dir={killed}", "--resume", "auto"], ranks=ranks), cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(killed) == losses(whole)
    last = Path("checkpoints") / f"step-{STEPS:08d}" / "ema.safetensors"
    for file in (Path("student.safetensors"), *([last] if (whole / last).exists() else [])):
        expected, found = load_file(whole / file), load_file(killed / file)
        assert expected.keys() == found.keys() and all(
            torch.equal(expected[key], found[key]) for key in expected
        ), file
    assert (whole / last).exists() != (name in WITHOUT_EMA)


@pytest.mark.parametrize(
    "name, override, words",
    [
        (
            "g2sd_generic",
            "teacher.weights={folder}/classifier.pth",
            ["classifier.pth", "decoder block"],
        ),
        ("g2sd_specific", "teacher.weights={folder}/mae.pth", ["mae.pth", "classifier"]),
        ("g2sd_specific", "data.train={unlabelled}", ["labels"]),
        ("sdae", "objective.folds=49", ["objective.folds 49", "48"]),
        ("tinymim", "teacher.num_heads=3", ["student.embed_dim 32", "3 heads"]),
        ("tinymim", "objective.teacher_block=5", ["objective.teacher_block", "5", "4"]),
        ("amd", "teacher.mask_ratio=0.9", ["teacher.mask_ratio", "6", "16"]),
        ("amd", "objective.direct=[[1, 9]]", ["objective.direct", "9", "4"]),
        ("two_teachers", "teachers.b.weights={folder}/none.pth", ["teachers.b.weights", "none.pth"]),
        ("two_teachers", "teachers.b.stats={folder}/a", ["teachers.b.standardize"]),
        ("features", "optim.global_batch=64", ["queue_size 40", "optim.global_batch 64"]),
        (
            "features",
            "objective.targets=[{{name: all, tap: pooled, student: cls}}, {{name: some, where: masked}}]",
            ["'pooled'", "tokens, cls"],
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_training(
    recipes, digits, unlabelled, tmp_path, name, override, words
):
    override = override.format(folder=recipes[name].parent, unlabelled=unlabelled)
    line = refusal(["train", str(recipes[name]), f"run.dir={tmp_path / 'run'}", override], tmp_path)
    assert all(word in line for word in words), line
    assert (
        not (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "run" / "checkpoints").exists()
    )
