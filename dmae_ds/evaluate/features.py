"""A run's student as plain timm, and its frozen features of the pictures of a shard folder, in the order of their ids.

Works alone and under `accelerate launch --multi_gpu -m dmae_ds eval knn RUN` or torchrun: each of P processes embeds every
P-th picture, and the rows are put back in order. `--mixed_precision bf16` of accelerate is obeyed; features are float32.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import numpy as np
import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from tqdm import tqdm

from dmae_ds.config.load import read_saved_config
from dmae_ds.config.run import ModelConfig
from dmae_ds.data.loader import eval_batches
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.errors import UserError
from dmae_ds.models.patches import Normalize

# Tokens after the final norm, [N, 1 + L, D] with CLS first -> features [N, D].
POOLS = {
    "mean": lambda tokens: tokens[:, 1:].mean(dim=1),
    "cls": lambda tokens: tokens[:, 0],
}


class Processes(Protocol):
    """The part of accelerate's Accelerator that evaluation uses; a training run has one of its own (train/knn.py)."""

    num_processes: int
    process_index: int
    is_main_process: bool
    device: torch.device
    mixed_precision: str  # no, bf16, fp16

    def autocast(self) -> AbstractContextManager: ...

    def gather(
        self, tensor: Tensor
    ) -> Tensor: ...  # [n, ...] of each of P processes -> [P * n, ...], one after the other

    def reduce(self, tensor: Tensor) -> Tensor: ...  # the sum over processes


def precision_of(processes: Processes) -> str:
    """Of the student's passes: fp32, bf16, fp16."""
    return {"no": "fp32"}.get(processes.mixed_precision, processes.mixed_precision)


def read_step(run: Path) -> int:
    """The step of RUN/student.safetensors; 0 where the file doesn't say."""
    with safe_open(run / "student.safetensors", framework="pt") as file:
        return int((file.metadata() or {}).get("step", 0))


def build_timm(config: ModelConfig) -> VisionTransformer:
    """The network that a recipe's section names, in timm's own class, without a head; its weights are random."""
    return timm.create_model(config.name, num_classes=0, **config.overrides())


def load_student(run: Path) -> VisionTransformer:
    """The student of a run folder in timm's own class, in eval mode: its file must fit strictly.

    Raises UserError where the file is missing, damaged, or of another network than config.yaml names.
    """
    config = read_saved_config(run).student
    path = run / "student.safetensors"
    if not path.is_file():
        raise UserError(
            f"'{path}' is not there; a run writes it with its first checkpoint: wait for one, or set checkpoint.every_steps lower"
        )
    student = build_timm(config)
    try:
        student.load_state_dict(load_file(path), strict=True)
    except SafetensorError as error:
        raise UserError(f"'{path}' is not a whole safetensors file ({error}); copy it again") from None
    except RuntimeError as error:  # torch lists every key that doesn't fit; the first says enough
        raise UserError(
            f"'{path}' doesn't fit the student of config.yaml ({' '.join(str(error).split())[:200]}); is it another run's file?"
        ) from None
    return student.eval()


@torch.inference_mode()
def extract_features(
    student: VisionTransformer,
    shard_set: ShardSet,
    *,
    accelerator: Processes,
    normalize: Normalize,
    crop_pct: float,
    pool: str,
    batch_size: int,
    num_workers: int,
    title: str | None,
    subset: np.ndarray | None = None,
) -> tuple[Tensor, Tensor]:
    """Embed the central crop of every picture. Collective; `student` and `normalize` are on the accelerator's device.

    pool: `mean` of the patch tokens or `cls`, after the final norm; title: of the progress bar, None: no bar
    subset: rising sample ids [n]; None: all of them
    Returns features [n, D] float32 and labels [n] int64, row i for the i-th id, on the device of every process.
    """
    num_processes = accelerator.num_processes
    num_samples = shard_set.num_samples if subset is None else len(subset)
    num_rows = math.ceil(num_samples / num_processes)  # equal everywhere: the last row may stay a filler
    features = torch.zeros(num_rows, student.num_features, device=accelerator.device)
    labels = torch.zeros(num_rows, dtype=torch.int64, device=accelerator.device)
    batches = eval_batches(
        shard_set,
        img_size=student.patch_embed.img_size[0],
        crop_pct=crop_pct,
        batch_size=batch_size,
        rank=accelerator.process_index,
        world_size=num_processes,
        num_workers=num_workers,
        subset=subset,
    )
    bar = tqdm(
        total=num_rows * num_processes,
        desc=title,
        unit="img",
        disable=title is None or not accelerator.is_main_process,
    )
    stop = 0
    with bar:
        for batch in batches:
            batch = batch.to(accelerator.device)
            rows = slice(stop, stop := stop + len(batch.labels))
            with accelerator.autocast():
                # [N, 3, H, W] -> [N, H, W, 3] to be normalised -> [N, 3, H, W]
                tokens = student.forward_features(normalize(batch.images.movedim(1, -1)).movedim(-1, 1))
                features[rows] = POOLS[pool](tokens.float())
            labels[rows] = batch.labels
            bar.update(len(batch.labels) * num_processes)
    return tuple(
        _in_id_order(accelerator.gather(rows), num_processes)[:num_samples] for rows in (features, labels)
    )


def _in_id_order(gathered: Tensor, num_processes: int) -> Tensor:
    """Rows as gathered, one process after the other -> row i of process r at place i * num_processes + r."""
    # [P * R, ...] -> [P, R, ...] -> [R, P, ...] -> [R * P, ...]
    return gathered.unflatten(0, (num_processes, -1)).transpose(0, 1).flatten(0, 1)
