"""A frozen teacher of which only the needed blocks exist (DMAE, Sec. 3.2: "only partially executed").

Built without a byte of weights by timm's own constructor at the depth of the deepest tap, so the blocks above it are
never made; then filled tensor by tensor from a lazily opened file (fit.py says which and refuses what doesn't fit).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Iterable, Iterator

import torch
from torch import Tensor

from dmae_ds.models.masking import PatchBatch
from dmae_ds.models.vit import MaskedViT, build_timm_vit
from dmae_ds.output.units import size_text
from dmae_ds.teacher.identity import Probe, probe
from dmae_ds.teacher.top import Top
from dmae_ds.weights.fit import Dropped

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8": torch.bfloat16,
}  # fp8: of all but the matrix products (fp8.py)


@dataclass(frozen=True)
class TeacherParts:
    """What was built of a teacher and what was left in the file, in parameters and bytes."""

    blocks: int
    whole_blocks: int
    kept: int
    kept_bytes: int
    block_parameters: int  # of the encoder's blocks that were built
    decoder_parameters: int  # of the decoder's
    dropped: Dropped
    notes: tuple[str, ...] = ()

    def saved_compute(self, *, tokens: int, num_patches: int) -> float:
        """The share of the whole teacher's matrix products that is never done, for `tokens` tokens in the encoder and all
        patches in the decoder, where the file has one. Attention's own products are left out (a few percent)."""
        above = tokens * sum(self.dropped.blocks.values()) + (1 + num_patches) * sum(
            self.dropped.decoder.values()
        )
        done = tokens * self.block_parameters + (1 + num_patches) * self.decoder_parameters
        return above / (above + done)

    def __str__(self) -> str:
        return f"{self.blocks} of {self.whole_blocks} blocks, {self.kept / 1e6:.1f} M parameters ({size_text(self.kept_bytes)}) instantiated"

    def describe_dropped(self) -> str:
        """What stays in the file, part by part; empty where nothing does."""
        parts = []
        if self.dropped.blocks:
            first, last = self.blocks + 1, self.whole_blocks
            parts.append(f"blocks {first}-{last}" if first < last else f"block {last}")
        if self.dropped.decoder:
            parts.append("upper decoder blocks" if self.decoder_parameters else "decoder")
        parts += sorted({name.split(".")[0] for name in self.dropped.rest})
        return (
            f"{', '.join(parts)}: {self.dropped.parameters / 1e6:.1f} M parameters, {size_text(self.dropped.num_bytes)}"
            if parts
            else ""
        )


class FrozenTeacher:
    """The replicated teacher: every rank holds the needed blocks and runs them on its own visible patches.

    Deliberately no nn.Module: nothing that owns a student can register it, shard it or save it.
    view: the student's patches -> the teacher's; sees: `visible` or `all`; target: features -> what is imitated
    top: what stands on the encoder, from its final norm up, where a tap is of the decoder or the classifier; every rank has all of it
    path: where its weights came from
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
        self.vit, self.taps, self.parts, self.sees, self.target, self.top, self.path = (
            vit,
            taps,
            parts,
            sees,
            target,
            top,
            path,
        )
        self.view = view or (lambda patches: patches)
        # The encoder's own taps: the last block's output is what a top stands on.
        self.tapped = sorted(
            {split_tap(tap)[1] for tap in taps if split_tap(tap)[0] == "block"}
            | ({vit.depth} if top is not None else set())
        )
        self.encoder_taps = tuple(f"block/{number}" for number in self.tapped)

    without_gradients = torch.inference_mode  # nothing is ever recorded of a teacher

    def __str__(self) -> str:
        return str(self.parts)

    def features(self, batch: PatchBatch) -> dict[str, Tensor]:
        """{tap: [N, 1 + K, D_t]}: the residual stream right after each tapped block, CLS first; registers are left out.

        [N, K, D_t] for a teacher without CLS. K are the student's visible patches, also where the teacher sees all.
        A tap of the decoder or the classifier: see decoder.py and head.py.
        """
        with self.without_gradients():
            patches, ids = self.inputs(batch)
            tapped = self.run(self.view(patches), ids)
            found = self.finish(
                {
                    tap: self.select(tapped[split_tap(tap)[1]], batch.ids_keep.shape[1])
                    for tap in self.encoder_taps
                },
                batch,
            )
        # What inference mode made can't be part of a loss: copies can, and are small beside the teacher's work.
        return {tap: tokens.clone() if tokens.is_inference() else tokens for tap, tokens in found.items()}

    def run(self, patches: Tensor, ids: Tensor) -> dict[int, Tensor]:
        """{tapped block: tokens}, of patches as the teacher wants them."""
        return self.vit(patches, ids, taps=self.tapped)[1]

    def finish(self, encoded: dict[str, Tensor], batch: PatchBatch) -> dict[str, Tensor]:
        """Features at the encoder's taps -> what the student is to imitate, by tap. On the rank whose batch it is."""
        with torch.no_grad():
            above = (
                {}
                if self.top is None
                else self.top(encoded[f"block/{self.vit.depth}"], batch.ids_keep, batch.ids_masked)
            )
            found = {tap: (above if tap in above else encoded)[tap] for tap in self.taps}
            return (
                found
                if self.target is None
                else {tap: self.target(tap, tokens) for tap, tokens in found.items()}
            )

    def inputs(self, batch: PatchBatch) -> tuple[Tensor, Tensor]:
        """Patches that the teacher looks at and their places, the student's visible ones first."""
        if self.sees == "visible":
            return batch.visible, batch.ids_keep
        return torch.cat([batch.visible, batch.masked], dim=1), torch.cat(
            [batch.ids_keep, batch.ids_masked], dim=1
        )

    def select(self, tokens: Tensor, num_visible: int) -> Tensor:
        """CLS, where there is one, and the student's visible patches, out of everything that the teacher ran on."""
        prefix, has_cls = self.vit.num_prefix, self.vit.cls_token is not None
        if prefix == has_cls and tokens.shape[1] == prefix + num_visible:
            return tokens
        visible = tokens[:, prefix : prefix + num_visible]
        return torch.cat([tokens[:, :1], visible], dim=1) if has_cls else visible

    def where(self) -> str:
        """What a message says of the teacher's part in a run that broke; nothing where it has none."""
        return ""

    def spread(self) -> None:
        """Give every rank its share of the weights, where they are shared out. Collective."""

    def probe(self) -> Probe:
        """Features of the fixed input, at every block."""
        return probe(self.vit)

    def stream(self, batches: Iterable) -> Iterator[tuple]:
        """(micro-batch, masked batch) in, the same with its features out, in order. A pipelined teacher looks ahead here."""
        for source, masked in batches:
            yield source, masked, self.features(masked)


class NoTeacher:
    """For objectives without taps: the same stream, empty-handed."""

    def where(self) -> str:
        return ""

    def __str__(self) -> str:
        return "none"

    def stream(self, batches: Iterable) -> Iterator[tuple]:
        for source, masked in batches:
            yield source, masked, {}


def split_tap(tap: str) -> tuple[str, int]:
    """ "block/18" -> ("block", 18), "decoder/4" -> ("decoder", 4), counted from 1; "prediction" and "logits" -> (themselves, 0)."""
    if tap in ("prediction", "logits"):
        return tap, 0
    kind, _, number = tap.partition("/")
    assert kind in ("block", "decoder") and number.isdigit(), f"unknown tap {tap}"
    return kind, int(number)


def needed_depths(taps: Iterable[str], whole_blocks: int, whole_decoder: int = 0) -> tuple[int, int]:
    """How many encoder and decoder blocks these taps need; whatever stands on the encoder needs all of it, a prediction the whole decoder."""
    found = [split_tap(tap) for tap in taps]
    decoder = max(
        (
            whole_decoder if kind == "prediction" else number
            for kind, number in found
            if kind in ("decoder", "prediction")
        ),
        default=0,
    )
    return (whole_blocks if needs_top(taps) else max((number for _, number in found), default=0)), decoder


def needs_top(taps: Iterable[str]) -> bool:
    """Whether a tap is of what stands on the encoder."""
    return any(split_tap(tap)[0] != "block" for tap in taps)


def meta_teacher(
    name: str, overrides: dict, depth: int | None = None, *, keep_norm: bool = False
) -> MaskedViT:
    """A teacher's geometry without a byte of weights: on the meta device, its first `depth` blocks, no final norm."""
    return MaskedViT(build_timm_vit(name, overrides, depth=depth, where="teacher"), keep_norm=keep_norm)


def with_notes(parts: TeacherParts, *notes: str) -> TeacherParts:
    """The same account with more to say, once, at the start."""
    return replace(parts, notes=(*parts.notes, *(note for note in notes if note)))
