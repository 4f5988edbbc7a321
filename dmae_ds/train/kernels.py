"""What computes a run's networks: torch's own kernels, oneDNN's linear layers where they are faster, or compiled blocks.

Weights, names and results up to rounding stay the same; a recipe says `compile` and `linear`.
"""

from __future__ import annotations

import sys
import time
from typing import NamedTuple

import torch
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import nn
from tqdm import tqdm

from dmae_ds.config.run import RunConfig
from dmae_ds.distributed import collectives
from dmae_ds.errors import UserError
from dmae_ds.models.onednn import FASTER, onednn_operator, onednn_speedup, use_onednn


class Kernels(NamedTuple):
    """linear: "torch" or "onednn", what `linear: auto` came to; text: a line for the summary, or nothing."""

    linear: str
    text: str = ""


def choose_kernels(
    config: RunConfig,
    objective: nn.Module,
    teacher: nn.Module | None,
    device: torch.device,
    *,
    zero_stage: int,
    large: bool,
    ema: nn.Module | None = None,
    before: str | None = None,
) -> Kernels:
    """Prepare the networks as the recipe says, before an engine takes them.

    large: whether it is worth the time to try what `linear: auto` might take
    before: what it came to in the run that is resumed, which goes on with the same wherever it still can
    Collective. Raises UserError for `linear: onednn` where it can't be.
    """
    networks = [network for network in (objective, teacher, ema) if network is not None]
    why_not = _why_not_onednn(config, device, zero_stage=zero_stage)
    collectives.raise_on_all_ranks(lambda: _refuse(config, why_not))
    if config.compile:
        return Kernels(
            "torch",
            f"{sum(map(compile_blocks, networks))} blocks, compiled by torch.compile in their first step",
        )
    wanted = before if config.linear == "auto" and before is not None else config.linear
    if wanted == "torch" or why_not or not (large or wanted == "onednn"):
        return Kernels("torch")
    if wanted == before:
        return Kernels("onednn", f"{sum(map(use_onednn, networks))} linear layers through oneDNN, as before")
    speedup = collectives.broadcast_from_main(
        onednn_speedup()
    )  # on all ranks at once, as they share their cores in training
    if wanted == "auto" and speedup < FASTER:
        return Kernels("torch")
    return Kernels(
        "onednn",
        f"{sum(map(use_onednn, networks))} linear layers through oneDNN, {speedup:.2f} times as fast here as torch's",
    )


def _refuse(config: RunConfig, why_not: str) -> None:
    if config.linear == "onednn" and why_not:
        raise UserError(f"linear=onednn {why_not}; use linear=auto")


def _why_not_onednn(config: RunConfig, device: torch.device, *, zero_stage: int) -> str:
    if device.type != "cpu":
        return "is for CPUs"
    if config.precision != "fp32":
        return f"is for precision fp32, found {config.precision}"
    if not onednn_operator():
        return "needs an operator that this torch doesn't have"
    if zero_stage == 3:
        return "can't keep weights that ZeRO 3 takes away after each layer"
    return "and compile=true exclude each other" if config.compile else ""


class WarmUp:
    """Says once how long a compiled run's first step took, beside its third."""

    def __init__(self, compiled: bool):
        self._seconds: list[float] | None = [] if compiled else None
        self._since = time.perf_counter()

    def step(self) -> None:
        """After every step."""
        if self._seconds is None:
            return
        now = time.perf_counter()
        self._seconds.append(now - self._since)
        self._since = now
        if len(self._seconds) == 3:
            first, _, third = self._seconds
            self._seconds = None
            if collectives.is_main():
                tqdm.write(
                    f"compile   the first step took {first:.1f} s, the third {third:.3g} s", file=sys.stderr
                )


def compile_blocks(network: nn.Module) -> int:
    """Have every transformer block under a network compiled when it first runs; returns the number of blocks.

    One graph serves all shapes, because shapes never change in a run: the size of the mask is fixed. The block is what
    repeats, so compiling it takes a fraction of what a whole network takes. Names of parameters stay.
    """
    blocks = [module for module in network.modules() if isinstance(module, (Block, EvaBlock))]
    for block in blocks:
        block.compile(dynamic=False)
    return len(blocks)
