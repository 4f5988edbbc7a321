"""A frozen teacher of which only the needed blocks exist (DMAE, Sec. 3.2: "only partially executed").

Built on the meta device with timm's own constructor at the depth of the deepest tap, so the blocks above it are never
made; then filled tensor by tensor from a lazily opened file. A key that is needed and missing, misshapen, or in the
file without a known reason is an error; what is knowingly dropped is counted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import Iterable, Iterator

import torch
from torch import Tensor

from dmae_ds.errors import UserError
from dmae_ds.models.masking import MaskedBatch
from dmae_ds.models.vit import MaskedViT, build_timm_vit
from dmae_ds.teacher.formats import LazyTensors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Parts of a checkpoint that a truncated encoder has no use for: whatever stands above the blocks.
_DROPPED = re.compile(r"(norm|fc_norm|head|head_dist|decoder_\w+|mask_token)(\.|$)")
_BLOCK = re.compile(r"blocks\.(\d+)\.")


@dataclass(frozen=True)
class TeacherParts:
    """What was built of a teacher and what was left in the file, in parameters."""

    blocks: int
    whole_blocks: int
    kept: int
    dropped: int

    def __str__(self) -> str:
        return (
            f"{self.blocks} of {self.whole_blocks} blocks, {self.kept / 1e6:.1f} M parameters instantiated, "
            f"{self.dropped / 1e6:.1f} M left in the file"
        )


class FrozenTeacher:
    """The replicated teacher: every rank holds the needed blocks and runs them on its own visible patches.

    Deliberately no nn.Module: nothing that owns a student can register it, shard it or save it.
    """

    def __init__(self, vit: MaskedViT, taps: tuple[str, ...], parts: TeacherParts):
        self.vit, self.taps, self.parts = vit, taps, parts
        self._blocks = [block_number(tap) for tap in taps]

    def __str__(self) -> str:
        return str(self.parts)

    @torch.no_grad()
    def features(self, batch: MaskedBatch) -> dict[str, Tensor]:
        """{tap: [N, 1 + K, D_t]}: the residual stream right after each tapped block, CLS included."""
        _, tapped = self.vit(batch.visible, batch.ids_keep, taps=self._blocks)
        return {tap: tapped[block] for tap, block in zip(self.taps, self._blocks, strict=True)}

    def stream(self, batches: Iterable) -> Iterator[tuple]:
        """(micro-batch, masked batch) in, the same with its features out, in order. A pipelined teacher looks ahead here."""
        for source, masked in batches:
            yield source, masked, self.features(masked)


class NoTeacher:
    """For objectives without taps: the same stream, empty-handed."""

    def __str__(self) -> str:
        return "none"

    def stream(self, batches: Iterable) -> Iterator[tuple]:
        for source, masked in batches:
            yield source, masked, {}


def block_number(tap: str) -> int:
    """ "block/18" -> 18."""
    kind, _, number = tap.partition("/")
    assert kind == "block" and number.isdigit(), f"unknown tap {tap}"
    return int(number)


def meta_teacher(name: str, overrides: dict, depth: int | None = None) -> MaskedViT:
    """A teacher's geometry without a byte of weights: on the meta device, its first `depth` blocks, no final norm."""
    with torch.device("meta"):
        return MaskedViT(build_timm_vit(name, overrides, depth=depth, where="teacher"), keep_norm=False)


def load_teacher(
    name: str, overrides: dict, *, whole_blocks: int, weights: LazyTensors, taps: tuple[str, ...], dtype: str, device: torch.device
) -> FrozenTeacher:
    """Build the blocks up to the deepest tap and read exactly their tensors.

    whole_blocks: the depth of the uncut teacher, for the account of what was left out
    Raises UserError that lists the first missing, misshapen or unexpected keys.
    """
    depth = max(block_number(tap) for tap in taps)
    vit = meta_teacher(name, overrides, depth)
    needed = vit.state_dict()
    dropped = _check_keys(needed, weights, depth)
    # `assign` puts the read tensors in the place of the meta ones: nothing is allocated twice.
    vit.load_state_dict({key: weights[key].to(device=device, dtype=DTYPES[dtype]) for key in needed}, strict=True, assign=True)
    vit.eval().requires_grad_(False)
    parts = TeacherParts(
        blocks=depth, whole_blocks=whole_blocks, kept=sum(tensor.numel() for tensor in needed.values()),
        dropped=sum(prod(weights.shape(key)) for key in dropped),
    )  # fmt: skip
    return FrozenTeacher(vit, taps, parts)


def _check_keys(needed: dict[str, Tensor], weights: LazyTensors, depth: int) -> list[str]:
    """The keys that are knowingly dropped; raises UserError unless needed and loaded agree exactly."""
    missing = [key for key in needed if key not in weights]
    misshapen = [
        f"{key} {list(weights.shape(key))} instead of {list(tensor.shape)}"
        for key, tensor in needed.items()
        if key in weights and weights.shape(key) != tuple(tensor.shape)
    ]
    dropped, unexpected = [], []
    for key in weights:
        if key not in needed:
            block = _BLOCK.match(key)
            known = int(block[1]) >= depth if block else _DROPPED.match(key)
            (dropped if known else unexpected).append(key)
    problems = [f"{label} {len(keys)}: {_first(keys)}" for label, keys in (("missing", missing), ("misshapen", misshapen), ("unexpected", unexpected)) if keys]
    if problems:
        raise UserError(f"teacher.weights '{weights.path}' does not fit the teacher: {'; '.join(problems)}; check teacher.name, teacher.format and the file")
    return dropped


def _first(keys: list[str], limit: int = 3) -> str:
    return ", ".join(keys[:limit]) + (", ..." if len(keys) > limit else "")
