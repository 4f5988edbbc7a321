"""Run folders for the results page: what a finished run leaves, without weights."""

from __future__ import annotations

import json

from dmae_ds.config.load import dump_config, load_config
from dmae_ds.report.published import NUM_IMAGENET
from dmae_ds.train.checkpoint.folder import CheckpointFolder

FINETUNE = {
    "recipe": "finetune_mae",
    "epochs": 100.0,
    "img_size": 224,
    "seed": 0,
    "init": "weights",
    "distill": None,
}
KNN = {"k": 20, "temperature": 0.07, "pool": "mean"}


def make_run(
    folder,
    recipe="dmae_vit_large_to_base",
    *overrides,
    results=(),
    num_images=NUM_IMAGENET,
    progress=1.0,
    images_per_s=1000.0,
    world_size=8,
    num_val=50_000,
    fingerprint=None,
):
    """Write a run folder without weights.

    results: (metric, labels[, subset_seed], top1, settings), measured at the last step; progress: share of
    its epochs; fingerprint: of its training data, None if the checkpoint doesn't say
    """
    config = load_config(recipe, [f"run.dir={folder}", *overrides])
    step = int(progress * config.optim.epochs * num_images / config.optim.global_batch)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "student.safetensors").touch()
    row = {
        "step": step,
        "epoch": step * config.optim.global_batch / num_images,
        "lr": 1e-3,
        "loss": 1.0,
        "pixel": 1.0,
        "images_per_s": images_per_s,
    }
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    checkpoints = CheckpointFolder(folder)
    checkpoints.begin(step)
    known = {} if fingerprint is None else {"fingerprint": fingerprint}
    checkpoints.commit(step, {"step": step, "world_size": world_size, **known}, {})
    lines = [
        {
            "metric": metric,
            "top1": top1,
            "top5": None,
            "labels": labels,
            "subset_seed": seed,
            "settings": settings,
            "step": step,
            "num_train": num_images,
            "num_val": num_val,
            "data": "f",
            "seconds": 3600.0,
            "device": "NVIDIA H100",
            "world_size": 8,
            "when": "2026-01-01T00:00:00+00:00",
        }
        for metric, labels, seed, top1, settings in (
            result if len(result) == 5 else (*result[:2], None if result[1] == "all" else 0, *result[2:])
            for result in results
        )
    ]
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
