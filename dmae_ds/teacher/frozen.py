"""A frozen teacher with only the blocks that are needed (DMAE, Sec. 3.2: "only partially executed").

timm's own constructor builds it on the meta device at the depth of the deepest tap, so the blocks above never
exist. Then it is filled tensor by tensor from its file (fill.py), which is checked before.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from dmae_ds.errors import UserError
from dmae_ds.models.masking import PatchBatch
from dmae_ds.models.vit import MaskedViT, build_timm_vit
from dmae_ds.output.units import size_text
from dmae_ds.teacher.identity import Probe, probe
from dmae_ds.teacher.output import OUTPUT_TAPS
from dmae_ds.teacher.relation import relation_of, split_heads
from dmae_ds.teacher.top import Top
from dmae_ds.weights.fit import Dropped

DTYPES = {
    "auto": torch.float32,  # of a teacher by itself; a recipe replaces it by what its precision asks for
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,  # of everything but the matrix products (fp8.py)
}

TAPS_IN_ENCODER = ("block", "relation")
TAPS_OF_BLOCKS = (*TAPS_IN_ENCODER, "decoder")
TAPS_WITHOUT_BLOCK = ("prediction", "logits", *OUTPUT_TAPS)


@dataclass(frozen=True)
class TeacherParts:
    """The parts of a teacher that were built and those left in the file, in parameters and bytes."""

    blocks: int
    whole_blocks: int
    kept: int
    kept_bytes: int
    block_parameters: int  # of the encoder's blocks that were built
    decoder_parameters: int  # of the decoder's blocks that were built
    dropped: Dropped
    notes: tuple[str, ...] = ()

    def saved_compute(self, *, tokens: int, num_patches: int) -> float:
        """The share of the whole teacher's matrix products that is never computed.

        tokens: number of them in the encoder; the decoder, where the file has one, has all patches
        Attention's own products are left out (a few percent).
        """
        above = tokens * sum(self.dropped.blocks.values())
        above += (1 + num_patches) * sum(self.dropped.decoder.values())
        done = tokens * self.block_parameters + (1 + num_patches) * self.decoder_parameters
        return above / (above + done)

    def __str__(self) -> str:
        size = f"{self.kept / 1e6:.1f} M parameters ({size_text(self.kept_bytes)})"
        return f"{self.blocks} of {self.whole_blocks} blocks, {size} instantiated"

    def describe_dropped(self) -> str:
        """The parts that stay in the file, in one line; empty where nothing does."""
        parts = []
        if self.dropped.blocks:
            first, last = self.blocks + 1, self.whole_blocks
            parts.append(f"blocks {first}-{last}" if first < last else f"block {last}")
        if self.dropped.decoder:
            parts.append("upper decoder blocks" if self.decoder_parameters else "decoder")
        parts += sorted({name.split(".")[0] for name in self.dropped.rest})
        if not parts:
            return ""
        size = f"{self.dropped.parameters / 1e6:.1f} M parameters, {size_text(self.dropped.num_bytes)}"
        return f"{', '.join(parts)}: {size}"


class FrozenTeacher:
    """The replicated teacher: every rank holds the needed blocks and runs them on its own visible patches.

    Deliberately not an nn.Module: nothing that owns a student can register it, shard it or save it.
    view: the student's patches -> the teacher's
    sees: `visible`, `all`, or the number of patches of a superset of the student's
    target: features -> the target that the student imitates
    top: the output, decoder or classifier above the encoder, with the final norm, where tapped; whole on
        every rank
    path: of its weights
    """

    def __init__(
        self,
        vit: MaskedViT,
        taps: tuple[str, ...],
        parts: TeacherParts,
        *,
        view: Callable[[Tensor], Tensor] | None = None,
        sees: str | int = "visible",
        target: Callable[[str, Tensor], Tensor] | None = None,
        top: Top | None = None,
        path: Path | None = None,
    ):
        self.vit = vit
        self.parts = parts
        self.sees = sees
        self.target = target
        self.top = top
        self.path = path
        self.view = view or (lambda patches: patches)
        self.choose(taps)

    without_gradients = torch.inference_mode  # a teacher's operations are never recorded

    def with_taps(self, taps: tuple[str, ...]) -> FrozenTeacher:
        """Return the same network for some of its taps: what the others need is not computed."""
        other = copy.copy(self)
        other.top = self.top if needs_top(taps) else None
        other.choose(taps)
        return other

    def choose(self, taps: tuple[str, ...]) -> None:
        """Set the taps, and what follows from them: blocks that are run, and features that are kept."""
        self.taps = taps
        in_encoder = {split_tap(tap) for tap in taps if split_tap(tap)[0] in TAPS_IN_ENCODER}
        if self.top is not None:  # it begins with the last block's output
            in_encoder.add(("block", self.vit.depth))
        self.tapped = sorted({number for _, number in in_encoder})
        # A relation needs its block's input alone.
        self.last_run = max((number for kind, number in in_encoder if kind == "block"), default=0)
        self.last_run = max(self.last_run, *(number - 1 for _, number in in_encoder), 0)
        in_order = sorted(in_encoder, key=lambda tap: tap[::-1])
        self.encoder_taps = tuple(f"{kind}/{number}" for kind, number in in_order)

    def __str__(self) -> str:
        return str(self.parts)

    def features(self, batch: PatchBatch) -> dict[str, Tensor]:
        """Features by tap: the residual stream right after each tapped block, CLS first, without registers.

        Returns {tap: [N, 1 + K, D_t]}; [N, K, D_t] for a teacher without CLS. K are the student's visible
        patches, also where the teacher sees all; of a superset all its patches, the student's first. A
        relation is [N, 3, heads, 1 + K, d]: queries, keys and values. For taps of the output, the decoder or
        the classifier see output.py, decoder.py and head.py.
        """
        with self.without_gradients():
            features = self.finish(self.encode(batch), batch)
        # Inference tensors can't be part of a loss; copies can, and cost little.
        return {tap: tokens.clone() if tokens.is_inference() else tokens for tap, tokens in features.items()}

    def each(self, batch: PatchBatch) -> list[tuple[FrozenTeacher, PatchBatch]]:
        """The passes that a micro-batch takes: one, of this teacher (passes.py has several)."""
        return [(self, batch)]

    def encode(self, batch: PatchBatch) -> dict[str, Tensor]:
        """Features at the encoder's taps of the patches that `finish` needs."""
        patches, ids = self.inputs(batch)
        tapped = self.run(self.view(patches), ids)
        return {tap: self.select(tokens, self.num_home(batch)) for tap, tokens in tapped.items()}

    def run(self, patches: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """Run the encoder on the teacher's patches.

        Returns {tap in the encoder: [N, R + T, D_t]}, of a relation [N, R + T, 3 * heads * d].
        """
        return self.run_blocks(range(1, self.vit.depth + 1), self.vit.embed(patches, ids), ids)[1]

    def run_blocks(
        self, numbers: Iterable[int], tokens: Tensor, ids: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run consecutive blocks, counted from 1. Returns the last tokens, and the tapped ones like `run`."""
        tapped = {}
        for number in numbers:
            block = self.use_block(number)
            if f"relation/{number}" in self.encoder_taps:
                tapped[f"relation/{number}"] = self.vit.run_block(relation_of(block), tokens, ids)
            if number <= self.last_run:
                tokens = self.vit.run_block(block, tokens, ids)
            if f"block/{number}" in self.encoder_taps:
                tapped[f"block/{number}"] = tokens
        return tokens, tapped

    def use_block(self, number: int) -> nn.Module:
        """The block of this number, counted from 1, with its weights."""
        return self.vit.blocks[number - 1]

    def finish(self, encoded: dict[str, Tensor], batch: PatchBatch) -> dict[str, Tensor]:
        """Turn features at the encoder's taps into the student's targets, on the rank that owns the batch."""
        with torch.no_grad():
            features = encoded
            if self.top is not None:
                last = encoded[f"block/{self.vit.depth}"]
                features = encoded | self.top(last, batch.ids_keep, batch.ids_masked)
            features = {tap: self._at_home(tap, features[tap], batch) for tap in self.taps}
            if self.target is None:
                return features
            return {tap: self.target(tap, tokens) for tap, tokens in features.items()}

    def inputs(self, batch: PatchBatch) -> tuple[Tensor, Tensor]:
        """Patches that the teacher sees and their ids, the student's visible ones first."""
        if self.sees == "visible":
            return batch.visible, batch.ids_keep
        further = self.num_seen(batch) - batch.ids_keep.shape[1]
        patches = torch.cat([batch.visible, batch.masked[:, :further]], dim=1)
        return patches, torch.cat([batch.ids_keep, batch.ids_masked[:, :further]], dim=1)

    def num_seen(self, batch: PatchBatch) -> int:
        """Number of patches of an image that the teacher sees."""
        num_visible, num_masked = batch.ids_keep.shape[1], batch.ids_masked.shape[1]
        return {"visible": num_visible, "all": num_visible + num_masked}.get(self.sees, self.sees)

    def num_home(self, batch: PatchBatch) -> int:
        """Number of patches whose encoded features return to the rank of the batch."""
        return self.num_seen(batch) if "pooled" in self.taps else self._num_compared(batch)

    def _num_compared(self, batch: PatchBatch) -> int:
        """Number of patches of a feature: the student's visible ones, of a superset all."""
        return batch.ids_keep.shape[1] if isinstance(self.sees, str) else self.sees

    def select(self, tokens: Tensor, num_patches: int) -> Tensor:
        """Select CLS, where there is one, and the first patches from the teacher's tokens."""
        prefix, has_cls = self.vit.num_prefix, self.vit.cls_token is not None
        if prefix == has_cls and tokens.shape[1] == prefix + num_patches:
            return tokens
        patches = tokens[:, prefix : prefix + num_patches]
        return torch.cat([tokens[:, :1], patches], dim=1) if has_cls else patches

    def home_width(self, tap: str) -> int:
        """Numbers that a token has at a tap in the encoder."""
        kind, number = split_tap(tap)
        if kind == "block":
            return self.vit.embed_dim
        attention = self.vit.blocks[number - 1].attn
        return 3 * attention.num_heads * attention.head_dim

    def _at_home(self, tap: str, feature: Tensor, batch: PatchBatch) -> Tensor:
        """A feature as the objective gets it: of the compared patches alone, a relation with its heads."""
        kind, number = split_tap(tap)
        if kind in (*TAPS_IN_ENCODER, "tokens"):
            feature = feature[:, : (self.vit.cls_token is not None) + self._num_compared(batch)]
        if kind == "relation":
            return split_heads(feature, self.vit.blocks[number - 1].attn.num_heads)
        return feature

    def networks(self) -> list[nn.Module]:
        """The networks whose blocks kernels may be chosen for."""
        return [self.vit]

    def where(self) -> str:
        """The teacher's place in a run, for messages about a failure; empty where there is none."""
        return ""

    def spread(self) -> None:
        """Give every rank its share of the weights, where they are sharded. Collective."""

    def probe(self) -> Probe:
        """Features of the fixed input, at every block."""
        return probe(self.vit)

    def stream(self, batches: Iterable) -> Iterator[tuple]:
        """Take (micro-batch, masked batch) and yield both with features, in order.

        A pipelined teacher runs ahead.
        """
        for source, masked in batches:
            yield source, masked, self.features(masked)


class NoTeacher:
    """The teacher of an objective without taps: the same stream, without features."""

    def networks(self) -> list[nn.Module]:
        return []

    def where(self) -> str:
        return ""

    def __str__(self) -> str:
        return "none"

    def stream(self, batches: Iterable) -> Iterator[tuple]:
        for source, masked in batches:
            yield source, masked, {}


def split_tap(tap: str) -> tuple[str, int]:
    """Split "block/18" into ("block", 18), "decoder/4" into ("decoder", 4), counted from 1.

    Those without a block, such as "tokens" and "logits", have the number 0. Raises UserError for another tap.
    """
    if tap in TAPS_WITHOUT_BLOCK:
        return tap, 0
    kind, _, number = tap.partition("/")
    if kind not in TAPS_OF_BLOCKS or not number.isdigit() or not int(number):
        raise UserError(
            f"the objective taps '{tap}', which is unknown; taps are "
            f"{', '.join(f'{kind}/N' for kind in TAPS_OF_BLOCKS)}, with blocks counted from 1, and "
            f"{', '.join(TAPS_WITHOUT_BLOCK)}"
        )
    return kind, int(number)


def needed_depths(taps: Iterable[str], whole_blocks: int, whole_decoder: int = 0) -> tuple[int, int]:
    """Numbers of encoder and decoder blocks that these taps need.

    A decoder, a classifier and the output need the whole encoder, and a prediction the whole decoder.
    """
    split = [split_tap(tap) for tap in taps]
    encoder_depth = max((number for _, number in split), default=0)
    decoder_depth = max((number for kind, number in split if kind == "decoder"), default=0)
    if any(kind == "prediction" for kind, _ in split):
        decoder_depth = max(decoder_depth, whole_decoder)
    return (whole_blocks if needs_top(taps) else encoder_depth), decoder_depth


def needs_top(taps: Iterable[str]) -> bool:
    """Whether a tap is above the encoder: of the decoder, the classifier or the output."""
    return any(split_tap(tap)[0] not in TAPS_IN_ENCODER for tap in taps)


def meta_teacher(
    name: str, overrides: dict, depth: int | None = None, *, keep_norm: bool = False, where: str = "teacher"
) -> MaskedViT:
    """Build a teacher's first `depth` blocks on the meta device, by default without a final norm.

    where: its section in the recipe, for messages
    """
    return MaskedViT(build_timm_vit(name, overrides, depth=depth, where=where), keep_norm=keep_norm)


def with_notes(parts: TeacherParts, *notes: str) -> TeacherParts:
    """Add notes for the start of the run."""
    return replace(parts, notes=(*parts.notes, *(note for note in notes if note)))
