"""Loading a checkpoint's full state into an engine of any ZeRO stage and world size.

DeepSpeed makes Adam's moments at the first step, so before it there is nothing to set: they are made here
as torch's AdamW would, flat and zero, and filled through DeepSpeed's own functions for setting parts of
them.
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
from dmae_ds.train.checkpoint.full_state import MOMENTS, FullState


def load_full_state(engine, parameters: dict[str, nn.Parameter], state: FullState) -> None:
    """Put a full state into a new DeepSpeed engine. Collective; every rank reads what it needs."""
    differing = set(state.names) ^ set(parameters)
    assert not differing, f"the checkpoint has other parameters: {differing}"
    stage = engine.zero_optimization_stage()
    if stage == 0:
        _load_stage_0(engine.optimizer, parameters, state)
    elif stage < 3:
        _load_stage_1_or_2(engine.optimizer, parameters, state)
    else:
        _load_stage_3(engine.optimizer, parameters, state)
    check_devices(engine.optimizer if stage == 0 else engine.optimizer.optimizer)


def check_devices(optimizer: torch.optim.Optimizer) -> None:
    """Assert that every state of an optimizer is on its parameter's device.

    On CUDA the fused AdamW stops in its first step otherwise; on CPUs nothing would show.
    """
    for parameter, states in optimizer.state.items():
        for name, value in states.items():
            place = value.device if isinstance(value, Tensor) else "the host"
            assert place == parameter.device, f"{name} is on {place}, its parameter on {parameter.device}"


def _load_stage_0(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], state: FullState
) -> None:
    for name, parameter in parameters.items():
        values = state.read(name)
        parameter.data.copy_(values["fp32"])
        moments = {moment: values[moment].to(parameter.device) for moment in MOMENTS}
        optimizer.state[parameter] = {"step": _counter(state.step, parameter.device), **moments}


def _load_stage_1_or_2(optimizer, parameters: dict[str, nn.Parameter], state: FullState) -> None:
    """Also DeepSpeed's optimizer for bf16: a group is one flat tensor of fp32 weights, cut over the ranks."""
    flats = [group["params"][0] for group in optimizer.optimizer.param_groups]
    _make_moments(optimizer.optimizer, flats, state.step)
    optimizer._lazy_init_hp_params_optimizer_state()  # maps each parameter to its place in the flat tensors
    for name, parameter in parameters.items():
        values = {key: value.to(parameter.device) for key, value in state.read(name).items()}
        parameter.data.copy_(values["fp32"])
        safe_set_full_fp32_param(parameter, values["fp32"])
        for moment in MOMENTS:
            safe_set_full_optimizer_state(parameter, values[moment], moment)


def _load_stage_3(optimizer, parameters: dict[str, nn.Parameter], state: FullState) -> None:
    """Each parameter is cut into as many equal pieces as there are ranks, the last one padded."""
    # Partitions everything, also the small parameters that stay whole between steps.
    optimizer.checkpoint_event_prologue()
    _make_moments(optimizer.optimizer, optimizer.fp32_partitioned_groups_flat, state.step)
    rank, world_size = collectives.rank(), collectives.world_size()
    for name, parameter in parameters.items():
        values = state.read(name)
        with zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(values["fp32"])
        # DeepSpeed's functions for full values read beyond the end of those that the ranks don't divide.
        safe_set_local_fp32_param(parameter, cut_piece(values["fp32"], rank, world_size))
        for moment in MOMENTS:
            safe_set_local_optimizer_state(parameter, cut_piece(values[moment], rank, world_size), moment)
    optimizer.checkpoint_event_epilogue()


def _make_moments(optimizer: torch.optim.Optimizer, flats: list[Tensor], step: float) -> None:
    for flat in flats:
        moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}
        optimizer.state[flat] = {"step": _counter(step, flat.device), **moments}


def _counter(step: float, device: torch.device) -> Tensor:
    """Adam's counter as torch's fused AdamW makes it: float32, on the parameter's device."""
    return torch.tensor(step, dtype=torch.float32, device=device)


def cut_piece(value: Tensor, rank: int, world_size: int) -> Tensor:
    """A rank's flat piece of a tensor under ZeRO-3: equal pieces, the last one padded with zeros."""
    size = math.ceil(value.numel() / world_size)
    padded = nn.functional.pad(value.flatten(), (0, size * world_size - value.numel()))
    return padded[rank * size : (rank + 1) * size]
