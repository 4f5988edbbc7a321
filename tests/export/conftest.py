"""Run folders of small students with random weights everywhere.

A new network's zeros and ones would hide tensors that were swapped.
"""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from dmae_ds.config.load import dump_config
from dmae_ds.config.networks import ModelConfig
from dmae_ds.config.run import RunConfig
from dmae_ds.finetune.network import build_classifier, classifier_kwargs, save_classifier
from dmae_ds.objectives.build import build_objective

STUDENT = {
    "name": "vit_tiny_patch16_224",
    "img_size": 24,
    "patch_size": 6,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 3,
    "mlp_ratio": 2,
}
DATA = {
    "train": "nowhere/train",
    "val": "nowhere/val",
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.3, 0.25],
    "crop_pct": 0.8,
    "num_workers": 0,
}
DECODER = {"depth": 2, "embed_dim": 16, "num_heads": 2}
STEP = 1234


def make_run(folder, *, student=STUDENT, seed=0, **sections):
    """Write a run folder; mask .9 of 16 patches keeps 2, where truncating would keep 1."""
    config = RunConfig.model_validate(
        {
            "run": {"dir": str(folder)},
            "student": student,
            "data": DATA,
            "optim": {"epochs": 9, "warmup_epochs": 1},
            "objective": {"name": "mae", "mask_ratio": 0.9, "norm_pix": True, "decoder": DECODER},
            **sections,
        }
    )
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: tensor + torch.randn(tensor.shape, generator=generator) / 16
        for name, tensor in build_objective(config)[0].state_dict().items()
    }
    metadata = {
        "timm_name": config.student.name,
        "timm_overrides": json.dumps(config.student.overrides()),
        "step": str(STEP),
    }
    for name, of_student in (("student", True), ("decoder", False)):
        tensors = {
            key.removeprefix("student."): tensor
            for key, tensor in weights.items()
            if key.startswith("student.") == of_student
        }
        save_file(tensors, folder / f"{name}.safetensors", metadata=metadata)
    return folder


def make_classifier(folder, *, pool):
    """Write the folder of `dmae-ds eval finetune` with five classes, whose data does not exist."""
    model_config, keys = ModelConfig(**STUDENT), classifier_kwargs(pool, 5)
    model = build_classifier(model_config, keys, seed=0, mean=DATA["mean"], std=DATA["std"])
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: tensor + torch.randn(tensor.shape, generator=generator) / 16
        for name, tensor in model.state_dict().items()
    }
    folder.mkdir(parents=True)
    save_classifier(
        folder / "last.safetensors",
        tensors,
        model_config,
        keys,
        mean=DATA["mean"],
        std=DATA["std"],
        step=STEP,
    )
    evaluation = {
        "weights": "someone/else",
        "format": "auto",
        "labels": "10%",
        "data": DATA,
        "optim": {"epochs": 100.0},
        "distill": None,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(evaluation))
    return folder


def change(path, name, by):
    """Add to one tensor of a safetensors file."""
    with safe_open(path, "pt") as file:
        names, metadata = file.keys(), file.metadata()
        tensors = {key: file.get_tensor(key) for key in names}
    tensors[name] = tensors[name] + by
    save_file(tensors, path, metadata=metadata)


def disturb(path, name):
    """Add a little noise to one tensor of a safetensors file; a layer norm would remove a constant."""
    with safe_open(path, "pt") as file:
        shape = file.get_tensor(name).shape
    change(path, name, by=torch.randn(shape, generator=torch.Generator().manual_seed(0)) / 50)


@pytest.fixture(scope="session")
def shared_run(tmp_path_factory):
    """A run that no test changes."""
    return make_run(tmp_path_factory.mktemp("export") / "run")


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")
