"""What a run says when it is done: Python that loads its student, where that is, and what comes next."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from dmae_ds.config.run import RunConfig
from dmae_ds.models.vit import MaskedViT
from dmae_ds.train.checkpoint.student_file import STUDENT, python_that_loads
from dmae_ds.train.preflight import Preflight

# Python for an image's feature, by the tokens that an objective is judged by.
POOL = {"mean": "[:, {prefix}:].mean(dim=1)", "cls": "[:, 0]"}


def describe_loading(config: RunConfig, student: MaskedViT) -> str:
    """Python that loads a student without this project, and what it takes and gives.

    config: the recipe of this student alone
    """
    path = Path(config.run.dir).expanduser() / STUDENT
    if ":" in config.student.name:
        return f"student.name {config.student.name} builds the network of {path}; timm does not know it"
    loads = python_that_loads(config.student.name, {"num_classes": 0, **config.student.overrides()}, path)
    colours = "RGB" if student.channels == 3 else "channels as stored"
    height, width = (count * student.patch_size for count in student.grid)
    return (
        "the student loads into timm:\n"
        f"{loads}\n"
        f"# pixels: [N, {student.channels}, {height}, {width}], {colours} from 0 to 1, "
        f"minus {config.data.mean}, "
        f"divided by {config.data.std}\n"
        f"features = model.forward_features(pixels)"
        f"{POOL[config.objective.judged_by].format(prefix=student.num_prefix)}"
        f"  # [N, {student.embed_dim}]"
    )


def describe_done(preflight: Preflight, *, seconds: float) -> str:
    """The last line of a run: that it is done, where its student is, and what comes next."""
    run_dir = preflight.run_dir
    has_knn = preflight.config.data.val is not None and len(preflight.shards.classes) > 1
    steps = "dmae-ds eval knn" if has_knn else "dmae-ds export"
    more = "" if has_knn else " --to timm"
    first, *others = (run_dir / name for name in preflight.members)
    also = f" (and of {', '.join(folder.name for folder in others)})" if others else ""
    return (
        f"done: {preflight.num_steps:,} steps, this start {tqdm.format_interval(seconds)}; the student is "
        f"{first / STUDENT}{also}; next: {steps} {first}{more}, or dmae-ds report {run_dir}"
    )
