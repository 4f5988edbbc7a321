"""What a run chooses once it knows its device, before its networks are built."""

from __future__ import annotations

import torch

from dmae_ds.distributed.deepspeed_import import import_deepspeed
from dmae_ds.models.numerics import choose_determinism, choose_tf32
from dmae_ds.train.forecast import resolve_micro_batch, resolve_placement
from dmae_ds.train.preflight import Preflight


def choose_on_device(preflight: Preflight, device: torch.device) -> tuple[Preflight, dict[str, str]]:
    """Choose what depends on the device: products, kernels, micro-batch and the teacher's placement.

    Returns the preflight with the choices, and the reasons for the summary's rows `placement`, `batch` and
    `kernels`.
    """
    numerics = [
        choose_determinism(preflight.config.run.deterministic),
        choose_tf32(preflight.config.tf32, device),
    ]
    import_deepspeed(device)
    preflight, batch_reason = resolve_micro_batch(preflight, device)
    preflight, placement_reason = resolve_placement(preflight, device)
    return preflight, {
        "placement": placement_reason,
        "batch": batch_reason,
        "kernels": "; ".join(filter(None, numerics)),
    }
