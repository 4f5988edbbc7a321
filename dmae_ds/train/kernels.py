"""Kernels of a run's networks: torch's own, oneDNN's linear layers where they are faster, or compiled blocks.

Names of weights stay, and results stay up to rounding; the recipe's keys are `compile` and `linear`.
"""

from __future__ import annotations

import time
from typing import NamedTuple, Sequence

import torch
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import nn

from dmae_ds.config.run import RunConfig
from dmae_ds.distributed import collectives
from dmae_ds.errors import UserError
from dmae_ds.models.onednn import FASTER, onednn_operator, onednn_speedup, use_onednn
from dmae_ds.output.lines import say


class Kernels(NamedTuple):
    """What was chosen: `linear` is "torch" or "onednn"; `text` is a line for the summary, or empty."""

    linear: str
    text: str = ""


def choose_kernels(
    config: RunConfig,
    networks: Sequence[nn.Module | None],
    device: torch.device,
    *,
    zero_stage: int,
    is_large: bool,
    previous: str | None = None,
) -> Kernels:
    """Prepare the networks as the recipe asks, before an engine takes them. Collective.

    is_large: whether the networks are large enough for `linear: auto` to time oneDNN
    previous: the choice of the run that is resumed; it is kept if it is still possible
    Raises UserError for `linear: onednn` where it is not possible.
    """
    networks = [network for network in networks if network is not None]
    obstacle = _why_not_onednn(config, device, zero_stage=zero_stage)
    collectives.raise_on_all_ranks(lambda: _raise_if_asked_for(config, obstacle))
    if config.compile:
        num_blocks = sum(compile_blocks(network) for network in networks)
        return Kernels("torch", f"{num_blocks} blocks, compiled by torch.compile in their first step")
    wanted = config.linear if previous is None or config.linear != "auto" else previous
    if wanted == "torch" or obstacle or not (is_large or wanted == "onednn"):
        return Kernels("torch")
    if wanted == previous:
        return Kernels("onednn", f"{_use_onednn(networks)} linear layers through oneDNN, as before")
    # All ranks measure at once, because they share their cores in training.
    speedup = collectives.broadcast_from_main(onednn_speedup())
    if wanted == "auto" and speedup < FASTER:
        return Kernels("torch")
    num_layers = _use_onednn(networks)
    return Kernels(
        "onednn", f"{num_layers} linear layers through oneDNN, {speedup:.2f} times as fast here as torch's"
    )


def _use_onednn(networks: list[nn.Module]) -> int:
    return sum(use_onednn(network) for network in networks)


def _raise_if_asked_for(config: RunConfig, obstacle: str) -> None:
    if config.linear == "onednn" and obstacle:
        raise UserError(f"linear=onednn {obstacle}; use linear=auto")


def _why_not_onednn(config: RunConfig, device: torch.device, *, zero_stage: int) -> str:
    """Why oneDNN's linear layers are not possible here, as the end of a sentence; "" where they are."""
    if device.type != "cpu":
        return "is for CPUs"
    if config.precision != "fp32":
        return f"requires precision fp32, found {config.precision}"
    if not onednn_operator():
        return "requires an operator that this torch does not have"
    if zero_stage == 3:
        return "cannot keep weights that ZeRO 3 removes after each layer"
    return "and compile=true exclude each other" if config.compile else ""


class WarmUp:
    """Prints once how long the first step of a compiled run took, and the third."""

    def __init__(self, compiled: bool):
        self._seconds: list[float] | None = [] if compiled else None
        self._since = time.perf_counter()

    def step(self) -> None:
        """Note the end of a step."""
        if self._seconds is None:
            return
        now = time.perf_counter()
        self._seconds.append(now - self._since)
        self._since = now
        if len(self._seconds) == 3:
            first, _, third = self._seconds
            self._seconds = None
            if collectives.is_main():
                text = f"compile   the first step took {first:.1f} s, the third {third:.3g} s"
                say(text)


def compile_blocks(network: nn.Module) -> int:
    """Let every transformer block of a network be compiled when it first runs; returns the number of blocks.

    One graph serves all steps, because the size of the mask is fixed and shapes never change in a run.
    Compiling the block, which repeats, takes a fraction of the time of a whole network. Names of parameters
    stay.
    """
    blocks = [module for module in network.modules() if isinstance(module, (Block, EvaBlock))]
    for block in blocks:
        block.compile(dynamic=False)
    return len(blocks)
