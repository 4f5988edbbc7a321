"""A tiny student and `dmae-ds eval detect` on it in this process."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

from dmae_ds.dense.detect import evaluate
from dmae_ds.models.vit import build_student

NUMBERS = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
# Three steps of 8 images an epoch, with everything random switched on.
QUICK = [
    "data.mean=[0.5, 0.5, 0.5]",
    "data.std=[0.5, 0.5, 0.5]",
    "data.num_workers=0",
    "network.img_size=32",
    "detector.window=3",
    "detector.global_blocks=[2]",
    "detector.channels=8",
    "detector.proposals=20",
    "detector.rois=8",
    "drop_path=0.2",
    "optim.global_batch=8",
    "optim.length=2",
    "optim.warmup_steps=1",
    "optim.evaluate_every=2",
    "optim.save_every=1",
]


def make_student(path, *, seed=0, **numbers):
    """A weights file of a small student with random weights."""
    numbers = {**NUMBERS, **numbers}
    student = build_student("vit_tiny_patch16_224", numbers, generator=torch.Generator().manual_seed(seed))
    tensors = {name: tensor.contiguous() for name, tensor in student.state_dict().items()}
    metadata = {"timm_name": "vit_tiny_patch16_224", "timm_overrides": json.dumps(numbers), "step": "7"}
    save_file(tensors, path, {"format": "pt", **metadata})
    return path


def arguments(scenes, out, *overrides):
    """The overrides of a quick training on the small scenes, into a folder."""
    data = [f"data.train={scenes / 'train'}", f"data.val={scenes / 'val'}", f"run.dir={out}"]
    return [*QUICK, *data, *overrides]


def detect(weights, scenes, out, *overrides, recipe="vitdet_coco", **options):
    """Run `dmae-ds eval detect`. Returns the line of results.jsonl."""
    return evaluate(str(weights), recipe=recipe, overrides=arguments(scenes, out, *overrides), **options)
