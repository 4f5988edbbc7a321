"""A frozen teacher with only the blocks that are needed (DMAE, Sec. 3.2: "only partially executed").

timm's own constructor builds it on the meta device at the depth of the deepest tap, so the blocks above never
exist. Then it is filled tensor by tensor from its file (fill.py), which is checked before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Iterable, Iterator

import torch
from torch import Tensor

from dmae_ds.errors import UserError
from dmae_ds.models.masking import PatchBatch
from dmae_ds.models.vit import MaskedViT, build_timm_vit
from dmae_ds.output.units import size_text
from dmae_ds.teacher.identity import Probe, probe
from dmae_ds.teacher.top import Top
from dmae_ds.weights.fit import Dropped

DTYPES = {
    "auto": torch.float32,  # of a teacher by itself; a recipe replaces it by what its precision asks for
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,  # of everything but the matrix products (fp8.py)
}


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
    sees: `visible` or `all`
    target: features -> the target that the student imitates
    top: the decoder or classifier above the encoder, with the final norm, where tapped; whole on every rank
    path: of its weights
    """

    def __init__(
        self,
        vit: MaskedViT,
        taps: tuple[str, ...],
        parts: TeacherParts,
        *,
        view: Callable[[Tensor], Tensor] | None = None,
        sees: str = "visible",
        target: Callable[[str, Tensor], Tensor] | None = None,
        top: Top | None = None,
        path: Path | None = None,
    ):
        self.vit = vit
        self.taps = taps
        self.parts = parts
        self.sees = sees
        self.target = target
        self.top = top
        self.path = path
        self.view = view or (lambda patches: patches)
        tapped = {split_tap(tap)[1] for tap in taps if split_tap(tap)[0] == "block"}
        if top is not None:  # it begins with the last block's output
            tapped.add(vit.depth)
        self.tapped = sorted(tapped)
        self.encoder_taps = tuple(f"block/{number}" for number in self.tapped)

    without_gradients = torch.inference_mode  # a teacher's operations are never recorded

    def __str__(self) -> str:
        return str(self.parts)

    def features(self, batch: PatchBatch) -> dict[str, Tensor]:
        """Features by tap: the residual stream right after each tapped block, CLS first, without registers.

        Returns {tap: [N, 1 + K, D_t]}; [N, K, D_t] for a teacher without CLS. K are the student's visible
        patches, also where the teacher sees all. For taps of the decoder or the classifier see decoder.py and
        head.py.
        """
        with self.without_gradients():
            patches, ids = self.inputs(batch)
            tapped = self.run(self.view(patches), ids)
            num_visible = batch.ids_keep.shape[1]
            encoded = {tap: self.select(tapped[split_tap(tap)[1]], num_visible) for tap in self.encoder_taps}
            features = self.finish(encoded, batch)
        # Inference tensors can't be part of a loss; copies can, and cost little.
        return {tap: tokens.clone() if tokens.is_inference() else tokens for tap, tokens in features.items()}

    def run(self, patches: Tensor, ids: Tensor) -> dict[int, Tensor]:
        """Run the encoder on the teacher's patches. Returns {tapped block: tokens}."""
        return self.vit(patches, ids, taps=self.tapped)[1]

    def finish(self, encoded: dict[str, Tensor], batch: PatchBatch) -> dict[str, Tensor]:
        """Turn features at the encoder's taps into the student's targets, on the rank that owns the batch."""
        with torch.no_grad():
            features = encoded
            if self.top is not None:
                last = encoded[f"block/{self.vit.depth}"]
                features = encoded | self.top(last, batch.ids_keep, batch.ids_masked)
            features = {tap: features[tap] for tap in self.taps}
            if self.target is None:
                return features
            return {tap: self.target(tap, tokens) for tap, tokens in features.items()}

    def inputs(self, batch: PatchBatch) -> tuple[Tensor, Tensor]:
        """Patches that the teacher sees and their ids, the student's visible ones first."""
        if self.sees == "visible":
            return batch.visible, batch.ids_keep
        patches = torch.cat([batch.visible, batch.masked], dim=1)
        return patches, torch.cat([batch.ids_keep, batch.ids_masked], dim=1)

    def select(self, tokens: Tensor, num_visible: int) -> Tensor:
        """Select CLS, where there is one, and the student's visible patches from the teacher's tokens."""
        prefix, has_cls = self.vit.num_prefix, self.vit.cls_token is not None
        if prefix == has_cls and tokens.shape[1] == prefix + num_visible:
            return tokens
        visible = tokens[:, prefix : prefix + num_visible]
        return torch.cat([tokens[:, :1], visible], dim=1) if has_cls else visible

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

    def where(self) -> str:
        return ""

    def __str__(self) -> str:
        return "none"

    def stream(self, batches: Iterable) -> Iterator[tuple]:
        for source, masked in batches:
            yield source, masked, {}


def split_tap(tap: str) -> tuple[str, int]:
    """Split "block/18" into ("block", 18), "decoder/4" into ("decoder", 4), counted from 1.

    "prediction" and "logits" have the number 0. Raises UserError for another tap.
    """
    if tap in ("prediction", "logits"):
        return tap, 0
    kind, _, number = tap.partition("/")
    if kind not in ("block", "decoder") or not number.isdigit() or not int(number):
        raise UserError(
            f"the objective taps '{tap}', which is unknown; taps are block/N and decoder/N, with blocks "
            "counted from 1, prediction and logits"
        )
    return kind, int(number)


def needed_depths(taps: Iterable[str], whole_blocks: int, whole_decoder: int = 0) -> tuple[int, int]:
    """Numbers of encoder and decoder blocks that these taps need.

    A decoder or classifier needs the whole encoder, and a prediction the whole decoder.
    """
    split = [split_tap(tap) for tap in taps]
    encoder_depth = max((number for _, number in split), default=0)
    decoder_depth = max((number for kind, number in split if kind == "decoder"), default=0)
    if any(kind == "prediction" for kind, _ in split):
        decoder_depth = max(decoder_depth, whole_decoder)
    return (whole_blocks if needs_top(taps) else encoder_depth), decoder_depth


def needs_top(taps: Iterable[str]) -> bool:
    """Whether a tap is above the encoder: of the decoder or the classifier."""
    return any(split_tap(tap)[0] != "block" for tap in taps)


def meta_teacher(
    name: str, overrides: dict, depth: int | None = None, *, keep_norm: bool = False
) -> MaskedViT:
    """Build a teacher's first `depth` blocks on the meta device, by default without a final norm."""
    return MaskedViT(build_timm_vit(name, overrides, depth=depth, where="teacher"), keep_norm=keep_norm)


def with_notes(parts: TeacherParts, *notes: str) -> TeacherParts:
    """Add notes for the start of the run."""
    return replace(parts, notes=(*parts.notes, *(note for note in notes if note)))
