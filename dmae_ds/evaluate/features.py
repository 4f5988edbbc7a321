"""A run's student as plain timm, and its frozen features of a shard folder's images, in the order of ids.

Works alone and under `accelerate launch --multi_gpu -m dmae_ds eval knn RUN` or torchrun: each of P processes
embeds every P-th image, and the rows are put back in order. Features are float32; on a GPU the passes are in
the run's precision, unless `accelerate launch` gives another.
"""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from dmae_ds.config.data import DataConfig
from dmae_ds.config.load import read_saved_config
from dmae_ds.config.networks import ModelConfig
from dmae_ds.data.loader import eval_batches
from dmae_ds.data.pixels import PixelFormat
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.errors import UserError
from dmae_ds.evaluate.early import find_student
from dmae_ds.models.patches import Normalize
from dmae_ds.models.vit import find_builder
from dmae_ds.output.progress import LINE_EVERY_S, Progress

# Tokens after the final norm, [N, R + L, D], CLS first, and R, the number in front of the patches (1: CLS) ->
# features [N, D], or [N, L, D] of the patches.
POOLS = {
    "mean": lambda tokens, prefix: tokens[:, prefix:].mean(dim=1),
    "cls": lambda tokens, prefix: tokens[:, 0],
    "patches": lambda tokens, prefix: tokens[:, prefix:],
}
VECTOR_POOLS = ("mean", "cls")  # one feature per image; `patches` is for dense tasks


class Processes(Protocol):
    """The part of accelerate's Accelerator that evaluation uses; training has its own (train/knn.py)."""

    num_processes: int
    process_index: int
    is_main_process: bool
    device: torch.device
    mixed_precision: str  # no, bf16, fp16

    def autocast(self) -> AbstractContextManager:
        """The context of the student's passes."""

    def gather(self, tensor: Tensor) -> Tensor:
        """Rows [P * n, ...] of all P processes, each with [n, ...], one process after the other."""

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum over processes."""


@dataclass(frozen=True)
class FeatureOptions:
    """How images become features. pool: a name of POOLS; the rest as in DataConfig."""

    pool: str
    batch_size: int
    crop_pct: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_workers: int
    bits: int = 8

    @classmethod
    def of(cls, data: DataConfig, *, pool: str, batch_size: int) -> FeatureOptions:
        """Take crop, pixel statistics and workers from a recipe's data section."""
        return cls(pool, batch_size, data.crop_pct, data.mean, data.std, data.num_workers, data.bits)


def precision_of(processes: Processes) -> str:
    """Precision of the student's passes: fp32, bf16, fp16."""
    return {"no": "fp32"}.get(processes.mixed_precision, processes.mixed_precision)


def start_processes(run: Path | None) -> Accelerator:
    """Start accelerate. On a GPU, passes are in the run's precision unless `accelerate launch` gives one.

    run: None for a weights file, whose passes are in fp32
    Raises UserError where the run's config.yaml cannot be read.
    """
    if run is None or "ACCELERATE_MIXED_PRECISION" in os.environ or not torch.cuda.is_available():
        return Accelerator()
    precision = read_saved_config(run, student_only=True).precision
    return Accelerator(mixed_precision={"fp32": "no", "bf16_autocast": "bf16"}.get(precision, precision))


def read_step(run: Path) -> int:
    """The step of RUN/student.safetensors; 0 where the file does not have it."""
    with safe_open(run / "student.safetensors", framework="pt") as file:
        return int((file.metadata() or {}).get("step", 0))


def build_timm(config: ModelConfig) -> VisionTransformer:
    """Build the network of a recipe's section in timm's own class, without a head; its weights are random."""
    return find_builder(config.name, "student")(num_classes=0, **config.overrides())


def load_student(run: str | Path) -> VisionTransformer:
    """Load the student of a run folder into timm's own class, in eval mode; its file must fit strictly.

    Raises UserError where the file is missing, damaged, or holds another network than config.yaml names.
    """
    run = Path(run)
    config = read_saved_config(run, student_only=True).student
    path = find_student(run)
    student = build_timm(config)
    try:
        student.load_state_dict(load_file(path), strict=True)
    except SafetensorError as error:
        raise UserError(f"'{path}' is not a complete safetensors file ({error}); copy it again") from None
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]  # torch lists every key that does not fit
        raise UserError(
            f"'{path}' does not fit the student of config.yaml ({reason}); does it belong to another run?"
        ) from None
    return student.eval()


@torch.inference_mode()
def extract_features(
    student: VisionTransformer,
    shard_set: ShardSet,
    options: FeatureOptions,
    *,
    processes: Processes,
    title: str | None,
    subset: np.ndarray | None = None,
    agree: Callable[[Callable[[], None]], None] = lambda embed: embed(),
) -> tuple[Tensor, Tensor]:
    """Embed the central crop of every image with a student that is on the processes' device. Collective.

    title: of the progress that is shown, None for none; subset: rising sample ids [n], None for all samples
    agree: calls a function and raises, on every process, what one of them raised in it
    Returns features after the final norm, [n, D] or [n, L, D] float32 as the pool says, and labels [n] int64.
    Row i belongs to the i-th id; every process gets all rows on its device.
    """
    device, num_processes = processes.device, processes.num_processes
    pool, prefix = POOLS[options.pool], student.num_prefix_tokens
    normalize = Normalize(options.mean, options.std).to(device)
    num_samples = shard_set.num_samples if subset is None else len(subset)
    num_rows = math.ceil(num_samples / num_processes)  # equal on all processes; the last row may be unused
    tokens_of_none = torch.zeros(0, prefix + student.patch_embed.num_patches, student.num_features)
    features = torch.zeros(num_rows, *pool(tokens_of_none, prefix).shape[1:], device=device)
    labels = torch.zeros(num_rows, dtype=torch.int64, device=device)
    batches = eval_batches(
        shard_set,
        img_size=student.patch_embed.img_size[0],
        crop_pct=options.crop_pct,
        batch_size=options.batch_size,
        rank=processes.process_index,
        world_size=num_processes,
        num_workers=options.num_workers,
        pin_memory=device.type == "cuda",
        subset=subset,
        pixels=PixelFormat(len(options.mean), options.bits),
    )
    progress = Progress(
        total=num_rows * num_processes,
        unit="img",
        title=title,
        every_s=LINE_EVERY_S,
        is_shown=title is not None and processes.is_main_process,
    )

    def embed() -> None:
        stop = 0
        with progress:
            for batch in batches:
                batch = batch.to(device)
                rows = slice(stop, stop := stop + len(batch.labels))
                with processes.autocast():
                    # [N, 3, H, W] -> [N, H, W, 3] to be normalised -> [N, 3, H, W]
                    pixels = normalize(batch.images.movedim(1, -1)).movedim(-1, 1)
                    features[rows] = pool(student.forward_features(pixels).float(), prefix)
                labels[rows] = batch.labels
                progress.advance(len(batch.labels) * num_processes)

    agree(embed)
    return tuple(
        _in_id_order(processes.gather(rows), num_processes)[:num_samples] for rows in (features, labels)
    )


def _in_id_order(gathered: Tensor, num_processes: int) -> Tensor:
    """Move row r * R + i (the i-th of process r) of the gathered rows to place i * num_processes + r."""
    # [P * R, ...] -> [P, R, ...] -> [R, P, ...] -> [R * P, ...]
    return gathered.unflatten(0, (num_processes, -1)).transpose(0, 1).flatten(0, 1)
