"""Run folders as `dmae-ds train` leaves them, made without training: random weights, invented losses, coloured pictures."""

import io
import json

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import save_file

from dmae_ds.config.load import dump_config
from dmae_ds.config.run import RunConfig
from dmae_ds.data.shards import NewSample, write_manifest, write_shard
from dmae_ds.models.vit import build_student
from dmae_ds.objectives.build import build_objective

STUDENT = {
    "name": "vit_tiny_patch16_224",
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
}
TEACHER = {**STUDENT, "embed_dim": 32, "depth": 4, "weights": "teacher.safetensors"}
CLASSES = ["red", "green", "blue"]
STEP = 30


def make_shards(folder, *, num, seed, classes=CLASSES, labels=None):
    """`num` small noisy pictures in two shards, tinted by their class."""
    rng = np.random.default_rng(seed)
    samples = []
    for number in range(num):
        label = number * 7 % 3 if labels is None else labels
        pixels = rng.integers(0, 120, (20, 24, 3))
        pixels[..., label] += 100
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
        samples.append(NewSample(number, "png", file.getvalue(), 24, 20, label))
    folder.mkdir(parents=True)
    shards = [
        write_shard(folder, "shard-000000.tar", samples[:7]),
        write_shard(folder, "shard-000001.tar", samples[7:]),
    ]
    write_manifest(folder, classes=classes, seed=0, shards=shards)
    return folder


def make_run(
    run,
    *,
    train,
    val,
    objective="dmae",
    share=0.5,
    rank=9.0,
    knn=None,
    num_steps=STEP,
    teacher=None,
    student={},
    **pixels,
):
    """A run folder at `run`. share: of distillation, in every step; rank: effective, every tenth step; None: a run of an older version; knn: top-1, rising, every tenth step

    teacher: a weights file; student: keys that differ; pixels: further keys of the objective, such as norm_pix
    """
    config = RunConfig.model_validate(
        {
            "run": {"dir": str(run)},
            "student": {**STUDENT, **student},
            "teacher": {**TEACHER, "weights": str(teacher or TEACHER["weights"])}
            if objective == "dmae"
            else None,
            "objective": {
                "name": objective,
                "decoder": {"depth": 1, "embed_dim": 16, "num_heads": 2},
                **pixels,
            },
            "data": {"train": str(train), "val": val and str(val), "num_workers": 0},
            "optim": {"global_batch": 6, "epochs": 9, "warmup_epochs": 1},
        }
    )
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(config))
    weights = build_objective(config)[0].state_dict()
    student = {
        name.removeprefix("student."): tensor.contiguous()
        for name, tensor in weights.items()
        if name.startswith("student.")
    }
    rest = {name: tensor.contiguous() for name, tensor in weights.items() if not name.startswith("student.")}
    for name, tensors in (("student", student), ("decoder", rest)):
        save_file(tensors, run / f"{name}.safetensors", metadata={"format": "pt", "step": str(num_steps)})
    lines = []
    for step in range(1, num_steps + 1):
        pixel = (1 if objective == "dmae" else 1.5) / step  # apart, so that no curve hides another
        parts = (
            {"loss": pixel + 2, "pixel": pixel, "align/1-3": 2.0, "share/1": share}
            if objective == "dmae"
            else {"loss": pixel, "pixel": pixel}
        )
        seen = {} if rank is None else {"seconds/data": 0.01, "seconds/teacher": 0.03, "seconds/rest": 0.06}
        if rank is not None and step % 10 == 0:
            seen |= {
                "rank/mean": rank,
                "rank/cls": 2 * rank,
                **({"norm/1": 10.0 + step} if objective == "dmae" else {}),
                "norm/2": 60.0 - step,
            }
        if knn is not None and step % 10 == 0:
            seen["knn/top1"] = knn + step
        lines.append(
            json.dumps(
                {
                    "step": step,
                    "epoch": step * 6 / 20,
                    "lr": 1e-3,
                    **parts,
                    "images_per_s": 100.0 + step % 3,
                    **seen,
                }
            )
            + "\n"
        )
    (run / "metrics.jsonl").write_text("".join(lines))
    return run


def make_teacher(path, *, blocks=4):
    """A weights file of TEACHER, or of its first blocks; random but no fresh initialisation."""
    generator = torch.Generator().manual_seed(3)
    shape = {key: value for key, value in TEACHER.items() if key not in ("name", "weights")}
    vit = build_student(TEACHER["name"], {**shape, "depth": blocks}, generator=generator)
    save_file(
        {
            name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in vit.state_dict().items()
        },
        path,
    )
    return path


def knn_result(top1, *, step=STEP, k=20, labels="all", subset_seed=None):
    """A line of RUN/results.jsonl, as `eval knn` writes it."""
    return {
        "metric": "knn",
        "scores": {"top1": top1},
        "labels": labels,
        "subset_seed": subset_seed,
        "settings": {"k": k, "temperature": 0.07, "pool": "mean"},
        "step": step,
        "num_train": 1400,
        "num_val": 397,
        "data": "0" * 64,
        "seconds": 1.5,
        "device": "cpu",
        "world_size": 1,
    }


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """accelerate picks its device once a process and keeps it: the CPU for each test here, none for whoever comes next."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """(train, val): 20 and 11 pictures, so that two processes get unequal numbers of one of them."""
    folder = tmp_path_factory.mktemp("shards")
    return make_shards(folder / "train", num=20, seed=1), make_shards(folder / "val", num=11, seed=2)


@pytest.fixture
def run(tmp_path, shards):
    """A DMAE run with all its files."""
    return make_run(tmp_path / "run", train=shards[0], val=shards[1])
