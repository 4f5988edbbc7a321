"""Linear segmentation: batch norm, dropout and a 1x1 convolution on frozen patch features (as DINOv3's).

    dmae-ds eval dense RUN --task linear [--iterations 40000] [--batch 16]

The loss is the mean cross-entropy of all pixels of a global batch that have a class, after the scores were
enlarged to pixels. A global batch, its crops and its dropout depend on the seed and the iteration alone, sums
go over all ranks, and so the trained layer is the same for any number of ranks, up to the order of sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dmae_ds.data.dense import DenseSample, DenseSet
from dmae_ds.data.dense_transforms import SegmentationView
from dmae_ds.data.order import sample_ids
from dmae_ds.errors import UserError
from dmae_ds.evaluate.dense_features import DenseNetwork, DenseOptions, load_numbered
from dmae_ds.evaluate.features import Processes
from dmae_ds.models.patches import Normalize
from dmae_ds.output.progress import LINE_EVERY_S, Progress


@dataclass(frozen=True)
class LinearOptions:
    """How the layer is trained; the defaults are DINOv3's for ADE20K.

    iterations, warmup: optimizer steps; batch: crops of a step over all ranks; lr: peak learning rate
    """

    iterations: int = 40_000
    warmup: int = 1_500
    batch: int = 16
    lr: float = 1e-3
    weight_decay: float = 1e-3
    dropout: float = 0.1
    seed: int = 0


class LinearHead(nn.Module):
    """Batch norm over all ranks, dropout of channels, and a 1x1 convolution of patch features."""

    def __init__(self, dim: int, num_classes: int, *, seed: int = 0):
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.conv = nn.Conv2d(dim, num_classes, kernel_size=1)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.conv.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.conv.bias)

    def normalise(self, features: Tensor, processes: Processes) -> Tensor:
        """Batch norm of training by the statistics of all ranks' features [n, D, h, w]. Collective.

        Not SyncBatchNorm, which refuses CPUs: features are frozen, so no gradient passes through statistics.
        """
        norm, rows = self.norm, features.detach().double()
        num = torch.tensor([features.numel() // norm.num_features], device=features.device)
        sums = torch.cat([num, rows.sum(dim=(0, 2, 3)), rows.square().sum(dim=(0, 2, 3))])
        total = processes.reduce(sums)
        num, mean, square = total[0], *total[1:].chunk(2)
        mean, square = mean / num, square / num
        variance = (square - mean.square()).clamp_min(0)
        with torch.no_grad():
            norm.running_mean.lerp_(mean.float(), norm.momentum)
            norm.running_var.lerp_((variance * num / (num - 1).clamp_min(1)).float(), norm.momentum)
        return functional.batch_norm(
            features, mean.float(), variance.float(), norm.weight, norm.bias, training=False, eps=norm.eps
        )

    def forward(self, rows: Tensor) -> Tensor:
        """Scores [M, C] of patch features [M, D], with the running statistics."""
        # [M, D] -> [M, D, 1, 1] -> [M, C, 1, 1] -> [M, C]
        norm = self.norm
        rows = functional.batch_norm(
            rows, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps
        )
        return functional.linear(rows, self.conv.weight.flatten(1), self.conv.bias)


def learning_rate(iteration: int, options: LinearOptions) -> float:
    """Learning rate of an iteration from 0: a linear warm-up to the peak, then half a cosine to 0."""
    if iteration < options.warmup:
        return options.lr * (iteration + 1) / options.warmup
    share = (iteration - options.warmup) / max(1, options.iterations - options.warmup)
    return options.lr * (1 + math.cos(math.pi * share)) / 2


def check_linear(options: LinearOptions, *, num_processes: int = 1) -> None:
    """Raise UserError for numbers out of range, and for a batch that leaves a rank without a crop."""
    if options.batch < num_processes:
        raise UserError(
            f"--batch {options.batch} is less than the {num_processes} ranks; raise it, or take fewer ranks"
        )
    if min(options.iterations, options.batch) < 1 or not 0 <= options.warmup < options.iterations:
        raise UserError(
            f"iterations {options.iterations}, warm-up {options.warmup}, batch {options.batch}: expected at "
            "least 1 iteration and crop, and a warm-up shorter than the iterations"
        )
    if not (options.lr > 0 and options.weight_decay >= 0 and 0 <= options.dropout < 1 and options.seed >= 0):
        raise UserError(
            f"lr {options.lr:g}, weight decay {options.weight_decay:g}, dropout {options.dropout:g}, seed "
            f"{options.seed}: expected an lr above 0, a decay and a seed of at least 0, a dropout from 0 to 1"
        )


def train_head(
    network: DenseNetwork,
    dense_set: DenseSet,
    options: DenseOptions,
    linear: LinearOptions,
    *,
    processes: Processes,
    title: str | None,
) -> LinearHead:
    """Train the layer on crops of a set; returns it in eval mode, equal on all ranks. Collective.

    Raises UserError where it ends with weights that are not finite.
    """
    check_linear(linear, num_processes=processes.num_processes)
    device = processes.device
    head = LinearHead(network.embed_dim, len(dense_set.classes), seed=linear.seed).to(device)
    trained = list(head.parameters())
    optimizer = torch.optim.AdamW(trained, lr=linear.lr, weight_decay=linear.weight_decay)
    progress = Progress(
        total=linear.iterations,
        unit="iteration",
        title=title,
        every_s=LINE_EVERY_S,
        is_shown=title is not None and processes.is_main_process,
    )
    normalize = Normalize(options.mean, options.std).to(device)
    with progress:
        for iteration, crops in enumerate(_batches(dense_set, options, linear, processes)):
            images = torch.stack([crop.image for crop in crops]).to(device)
            label_maps = torch.stack([crop.label_map for crop in crops]).to(device)
            with processes.autocast():
                # [n, 3, H, W] -> [n, H, W, 3] to be normalised -> [n, 3, H, W]
                features = network(normalize(images.movedim(1, -1)).movedim(-1, 1))
            kept = _dropout(iteration, linear, dim=network.embed_dim)
            kept = kept[processes.process_index :: processes.num_processes].to(device)
            # [n, D, h, w] * [n, D, 1, 1] -> [n, C, h, w] -> [n, C, H, W]
            scores = head.conv(head.normalise(features, processes) * kept[:, :, None, None])
            scores = enlarge(scores, label_maps.shape[1:], network.patch_size)
            total = functional.cross_entropy(
                scores, label_maps, ignore_index=dense_set.ignore_index, reduction="sum"
            )
            num_pixels = processes.reduce((label_maps != dense_set.ignore_index).sum())
            (total / num_pixels.clamp_min(1)).backward()
            _sum_gradients(trained, processes)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(iteration, linear)
            optimizer.step()
            optimizer.zero_grad()
            progress.advance()
    if not all(parameter.isfinite().all() for parameter in trained):
        raise UserError(
            f"the linear layer's weights are not finite after {linear.iterations} iterations; lower --lr "
            f"(now {linear.lr:g}), or check the network's training with `dmae-ds report`"
        )
    return head.eval().requires_grad_(False)


def enlarge(scores: Tensor, size: tuple[int, int], patch_size: int) -> Tensor:
    """Enlarge scores [n, C, h, w] of patches to pixels [n, C, H, W], bilinearly, without padded pixels."""
    height, width = (side * patch_size for side in scores.shape[2:])
    enlarged = functional.interpolate(scores, (height, width), mode="bilinear", align_corners=False)
    return enlarged[:, :, : size[0], : size[1]]


def _sum_gradients(parameters: list[nn.Parameter], processes: Processes) -> None:
    """Replace the gradients by their sums over ranks. Collective."""
    flat = processes.reduce(torch.cat([parameter.grad.flatten() for parameter in parameters]))
    for parameter, gradient in zip(parameters, flat.split([one.numel() for one in parameters]), strict=True):
        parameter.grad = gradient.view_as(parameter)


def _dropout(iteration: int, linear: LinearOptions, *, dim: int) -> Tensor:
    """Factors [batch, D] of the channels of a global batch: 0, or 1 / (1 - dropout)."""
    key = int(np.random.Philox(key=[linear.seed, iteration]).random_raw() >> 1)
    generator = torch.Generator().manual_seed(key)
    kept = torch.rand(linear.batch, dim, generator=generator) >= linear.dropout
    return kept.float() / (1 - linear.dropout)


def _batches(
    dense_set: DenseSet, options: DenseOptions, linear: LinearOptions, processes: Processes
) -> Iterator[list[DenseSample]]:
    """This rank's crops of each iteration: every P-th of the global batch."""
    read = partial(
        _read_crops,
        dense_set=dense_set,
        options=options,
        linear=linear,
        rank=processes.process_index,
        world_size=processes.num_processes,
    )
    return load_numbered(read, range(linear.iterations), num_workers=options.num_workers)


def _read_crops(
    iteration: int,
    *,
    dense_set: DenseSet,
    options: DenseOptions,
    linear: LinearOptions,
    rank: int,
    world_size: int,
) -> list[DenseSample]:
    """A rank's crops of an iteration; the global batch is the same for any number of ranks."""
    positions = np.arange(iteration * linear.batch, (iteration + 1) * linear.batch)[rank::world_size]
    epochs, numbers = sample_ids(positions, num_samples=len(dense_set), seed=linear.seed)
    return [
        crop_of(dense_set[number], options, no_class=dense_set.ignore_index, seed=linear.seed, epoch=epoch)
        for epoch, number in zip(epochs.tolist(), numbers.tolist(), strict=True)
    ]


def crop_of(
    sample: DenseSample, options: DenseOptions, *, no_class: int, seed: int, epoch: int
) -> DenseSample:
    """A crop as large as a window: scale .5 to 2, mirrored half of the time, keyed by (seed, epoch, key).

    The scale is relative to the short side of `options.size` px. Below and to the right of a smaller image
    the crop has the mean pixel, and its map no class.
    """
    view = SegmentationView(
        size=options.window,
        short_side=options.size or min(sample.image.shape[1:]),
        photometric=False,
        seed=seed,
        ignore_index=no_class,
        fill=tuple(round(255 * value) for value in options.mean),
    )
    return view(sample._replace(boxes=None, labels=None, masks=None, crowd=None), epoch=epoch)
