"""The part above a frozen encoder that the taps need: a decoder, a classifier's head, its output, or none.

It begins with the encoder's final norm (decoder.py, head.py, output.py), is small compared with the encoder,
and is whole on every rank: encoded features first return to their rank, wherever the encoder's blocks are.
"""

from __future__ import annotations

from torch import nn

from dmae_ds.config.networks import TeacherConfig
from dmae_ds.errors import UserError
from dmae_ds.models.vit import MaskedViT
from dmae_ds.teacher.decoder import TeacherDecoder, meta_decoder
from dmae_ds.teacher.head import TeacherHead, meta_head
from dmae_ds.teacher.output import OUTPUT_TAPS, TeacherOutput, meta_output
from dmae_ds.weights.named import Weights

Top = TeacherDecoder | TeacherHead | TeacherOutput


def meta_top(
    config: TeacherConfig,
    vit: MaskedViT,
    norm: nn.Module | None,
    *,
    taps: tuple[str, ...],
    decoder_depth: int,
    num_classes: int | None,
    weights: Weights | None = None,
) -> Top | None:
    """Build the part above the encoder on the meta device, without any weights.

    norm: the encoder's own final norm; decoder_depth: from `needed_depths`; num_classes: of the data
    weights: the file that shapes are checked against; None: the recipe alone gives them, for plans and
    benchmarks
    Raises UserError where the file or the network has no such part, or another one.
    """
    if any(tap in OUTPUT_TAPS for tap in taps):
        if decoder_depth or "logits" in taps:
            raise UserError(
                f"the objective taps {', '.join(taps)}: a teacher gives its output, its decoder or its "
                "logits; tap one of these"
            )
        return meta_output(config.name, config.overrides(), taps=taps)
    if "logits" in taps:
        assert not decoder_depth, "a teacher has a decoder or a classifier"
        return meta_head(weights, vit, norm, pool=config.pool, num_classes=num_classes)
    if not decoder_depth:
        return None
    return meta_decoder(
        weights,
        norm,
        encoder_dim=vit.embed_dim,
        embed_dim=config.decoder_embed_dim,
        depth=decoder_depth,
        num_heads=config.decoder_num_heads,
        num_patches=vit.num_patches,
        patch_size=vit.patch_size if "prediction" in taps else None,
        channels=vit.channels,
    )
