"""Top-1 and top-5 of a classifier over all processes' images."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from dmae_ds.data.batch import Batch
from dmae_ds.evaluate.features import Processes
from dmae_ds.models.patches import Normalize
from dmae_ds.objectives.augment import normalized


@torch.inference_mode()
def measure_accuracy(
    network: nn.Module,
    batches: Iterable[Batch],
    *,
    normalize: Normalize,
    num_classes: int,
    processes: Processes,
) -> tuple[float, float | None]:
    """Return top-1 and top-5 in percent over all processes' batches, every image once. Collective.

    Top-5 is None with five classes or fewer. The network is left in evaluation mode.
    """
    network.eval()
    # Images whose class is first, among the first five, and all images.
    counts = torch.zeros(3, dtype=torch.float64, device=processes.device)
    for batch in batches:
        batch = batch.to(processes.device)
        with processes.autocast():
            logits = network(normalized(batch.images, normalize))
        best = logits.float().topk(min(5, num_classes), dim=1).indices  # [N, 5]
        hits = best == batch.labels[:, None]
        num_images = torch.full((), len(hits), device=hits.device)
        counts += torch.stack([hits[:, 0].sum(), hits.any(dim=1).sum(), num_images])
    num_top1, num_top5, num_images = processes.reduce(counts).tolist()
    return 100 * num_top1 / num_images, 100 * num_top5 / num_images if num_classes > 5 else None
