"""The summary of a run without the run (`dmae-ds train --dry-run`): no engine, no run folder, no step.

The networks are built and the teacher's weights are read, so what a start would refuse is refused here too.
"""

from __future__ import annotations

from dmae_ds.config.deepspeed import zero_stage
from dmae_ds.distributed import process_group
from dmae_ds.train.device_choices import choose_on_device
from dmae_ds.train.ema import build_ema_teacher
from dmae_ds.train.forecast import has_large
from dmae_ds.train.kernels import choose_kernels
from dmae_ds.train.networks import build_networks
from dmae_ds.train.preflight import Preflight
from dmae_ds.train.run import previous_linear
from dmae_ds.train.summary import summary


def print_summary(preflight: Preflight) -> None:
    """Print the summary of a checked recipe on rank 0, in a process group that is made here."""
    with process_group.joined(preflight.world, timeout_s=preflight.config.dist.timeout_s) as device:
        preflight, texts = choose_on_device(preflight, device)
        config = preflight.config
        objective, teacher = build_networks(preflight, device)
        ema = build_ema_teacher(objective, precision=config.precision, device=device)
        kernels = choose_kernels(
            config,
            [objective, *teacher.networks(), ema.module],
            device,
            zero_stage=zero_stage(preflight.deepspeed),
            is_large=has_large(objective),
            previous=previous_linear(preflight),
        )
        texts["kernels"] = "; ".join(filter(None, [texts["kernels"], kernels.text]))
        text = summary(preflight, objective, teacher, ema, **texts)
    if preflight.world.is_main:
        print(text, flush=True)
