"""Run folders like those of `dmae-ds train`, made without training: random weights, invented losses."""

import io
import json
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import save_file

from dmae_ds.config.load import dump_config
from dmae_ds.config.run import RunConfig
from dmae_ds.data.shards import NewSample, write_manifest, write_shard
from dmae_ds.evaluate.results import METRICS, Metric, Score
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
    """Shards of `num` small noisy images, tinted by their class, in two tars."""
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


@dataclass(frozen=True)
class Metrics:
    """The invented metrics of a run.

    share: of distillation in the gradient, in every step; rank, spread: effective rank and spread of the
    features, every tenth step, in the first step those of the initial weights; rank None: a run of an older
    version; knn: top-1, rising, every tenth step
    """

    share: float = 0.5
    rank: float | None = 9.0
    spread: float = 0.3
    start: dict = field(default_factory=lambda: {"rank/mean": 6.0, "rank/cls": 12.0, "spread/mean": 0.04})
    knn: float | None = None
    num_steps: int = STEP

    def row(self, step, *, distilled):
        """The line of a step in metrics.jsonl."""
        pixel = (1 if distilled else 1.5) / step  # apart, so that no curve hides another
        row = {"step": step, "epoch": step * 6 / 20, "lr": 1e-3, "loss": pixel, "pixel": pixel}
        if distilled:
            row |= {"loss": pixel + 2, "align/1-3": 2.0, "share/1": self.share}
        row["images_per_s"] = 100.0 + step % 3
        if self.rank is not None:
            row |= {"seconds/data": 0.01, "seconds/teacher": 0.03, "seconds/rest": 0.06}
        if self.rank is not None and step % 10 == 0:
            row |= {"rank/mean": self.rank, "rank/cls": 2 * self.rank, "norm/2": 60.0 - step}
            row["spread/mean"] = self.spread
            if distilled:
                row["norm/1"] = 10.0 + step
        if self.rank is not None and step == 1:
            row |= self.start
        if self.knn is not None and step % 10 == 0:
            row["knn/top1"] = self.knn + step
        return row


def make_run(run, *, train, val, objective="dmae", metrics=Metrics(), teacher=None, student=None, **pixels):
    """A run folder at `run`.

    teacher: a weights file; student: keys that differ; pixels: further keys of the objective, such as
    norm_pix
    """
    distilled = objective == "dmae"
    decoder = {"depth": 1, "embed_dim": 16, "num_heads": 2}
    config = RunConfig.model_validate(
        {
            "run": {"dir": str(run)},
            "student": {**STUDENT, **(student or {})},
            "teacher": {**TEACHER, "weights": str(teacher or TEACHER["weights"])} if distilled else None,
            "objective": {"name": objective, "decoder": decoder, **pixels},
            "data": {"train": str(train), "val": val and str(val), "num_workers": 0},
            "optim": {"global_batch": 6, "epochs": 9, "warmup_epochs": 1},
        }
    )
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(config))
    files = {"student": {}, "decoder": {}}
    for name, tensor in build_objective(config)[0].state_dict().items():
        file = "student" if name.startswith("student.") else "decoder"
        files[file][name.removeprefix("student.")] = tensor.contiguous()
    for name, tensors in files.items():
        metadata = {"format": "pt", "step": str(metrics.num_steps)}
        save_file(tensors, run / f"{name}.safetensors", metadata=metadata)
    rows = [metrics.row(step, distilled=distilled) for step in range(1, metrics.num_steps + 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def make_teacher(path, *, blocks=4):
    """A weights file of TEACHER, or of its first blocks, with random weights."""
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
        "val": "1" * 64,
        "seconds": 1.5,
        "device": "cpu",
        "world_size": 1,
    }


SEGMENTATION = Metric("linear segmentation", {"miou": Score("mIoU", "%", 0, 100)}, "miou")


@pytest.fixture
def segmentation(monkeypatch):
    """A line of results.jsonl of a metric whose only score is mIoU, and which METRICS knows for the test."""
    monkeypatch.setitem(METRICS, "segmentation", SEGMENTATION)
    return {
        **knn_result(0.0),
        "metric": "segmentation",
        "scores": {"miou": 41.5},
        "settings": {"recipe": "voc"},
    }


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Let accelerate choose the CPU for each test, and forget it afterwards (it chooses once per process)."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Folders (train, val) of 20 and 11 images, so two processes get unequal numbers of the latter."""
    folder = tmp_path_factory.mktemp("shards")
    return make_shards(folder / "train", num=20, seed=1), make_shards(folder / "val", num=11, seed=2)


@pytest.fixture
def run(tmp_path, shards):
    """A DMAE run with all its files."""
    return make_run(tmp_path / "run", train=shards[0], val=shards[1])
