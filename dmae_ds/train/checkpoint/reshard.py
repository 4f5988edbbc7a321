"""A checkpoint's whole state -> an engine of any ZeRO stage and world size.

DeepSpeed makes Adam's moments at the first step, so before one there is nothing to set: they are made here as torch's
AdamW would, flat and zero, and filled through DeepSpeed's own functions for setting parts of them.
"""

from __future__ import annotations

import math

import torch
from deepspeed import zero
from deepspeed.utils import (
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from dmae_ds.distributed import collectives
from dmae_ds.train.checkpoint.full_state import MOMENTS, WholeState


def load_whole(engine, parameters: dict[str, nn.Parameter], state: WholeState) -> None:
    """Put a whole state into a new DeepSpeed engine. Collective; every rank reads what it needs."""
    assert set(state.names) == set(parameters), (
        f"the checkpoint has other parameters: {set(state.names) ^ set(parameters)}"
    )
    stage = engine.zero_optimization_stage()
    if stage == 0:
        _load_plain(engine.optimizer, parameters, state)
    elif stage < 3:
        _load_sliced(engine.optimizer, parameters, state)
    else:
        _load_scattered(engine.optimizer, parameters, state)


def _load_plain(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], state: WholeState
) -> None:
    for name, parameter in parameters.items():
        values = state.read(name)
        parameter.data.copy_(values["fp32"])
        optimizer.state[parameter] = {
            "step": torch.tensor(state.step),
            **{moment: values[moment].to(parameter.device) for moment in MOMENTS},
        }


def _load_sliced(optimizer, parameters: dict[str, nn.Parameter], state: WholeState) -> None:
    """Stages 1 and 2, and DeepSpeed's optimiser for bf16: a group is one flat tensor of fp32 masters, cut over the ranks."""
    _make_moments(
        optimizer.optimizer, [group["params"][0] for group in optimizer.optimizer.param_groups], state.step
    )
    optimizer._lazy_init_hp_params_optimizer_state()  # tells each parameter where in the flat tensors it is
    for name, parameter in parameters.items():
        values = {key: value.to(parameter.device) for key, value in state.read(name).items()}
        parameter.data.copy_(values["fp32"])
        safe_set_full_fp32_param(parameter, values["fp32"])
        for moment in MOMENTS:
            safe_set_full_optimizer_state(parameter, values[moment], moment)


def _load_scattered(optimizer, parameters: dict[str, nn.Parameter], state: WholeState) -> None:
    """Stage 3: each parameter is cut into as many equal pieces as there are ranks, the last one padded."""
    optimizer.checkpoint_event_prologue()  # parts everything, also what is small and stays whole between steps
    _make_moments(optimizer.optimizer, optimizer.fp32_partitioned_groups_flat, state.step)
    rank, ranks = collectives.rank(), collectives.world_size()
    for name, parameter in parameters.items():
        values = state.read(name)
        with zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(values["fp32"])
        # DeepSpeed's functions for whole values cut beyond the end of those that don't divide by the ranks.
        safe_set_local_fp32_param(parameter, _piece(values["fp32"], rank, ranks))
        for moment in MOMENTS:
            safe_set_local_optimizer_state(parameter, _piece(values[moment], rank, ranks), moment)
    optimizer.checkpoint_event_epilogue()


def _make_moments(optimizer: torch.optim.Optimizer, flats: list[Tensor], step: float) -> None:
    for flat in flats:
        optimizer.state[flat] = {
            "step": torch.tensor(step),
            **{moment: torch.zeros_like(flat) for moment in MOMENTS},
        }


def _piece(value: Tensor, rank: int, ranks: int) -> Tensor:
    size = math.ceil(value.numel() / ranks)
    return nn.functional.pad(value.flatten(), (0, size * ranks - value.numel()))[
        rank * size : (rank + 1) * size
    ]
