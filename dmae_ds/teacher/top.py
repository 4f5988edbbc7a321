"""What stands on a frozen encoder, as the taps ask for it: a decoder (decoder.py), a classifier's head (head.py), or nothing.

It begins with the encoder's final norm, is small beside the encoder, and every rank has all of it: encoded features come home first,
from wherever the encoder's blocks are.
"""

from __future__ import annotations

from torch import nn

from dmae_ds.config.run import TeacherConfig
from dmae_ds.models.vit import MaskedViT
from dmae_ds.teacher.decoder import TeacherDecoder, meta_decoder
from dmae_ds.teacher.head import TeacherHead, meta_head
from dmae_ds.weights.named import Weights

Top = TeacherDecoder | TeacherHead


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
    """On the meta device, without a byte of weights.

    norm: the encoder's own final one; decoder_depth: as `needed_depths` finds it; num_classes: of the data
    weights: the file that the shapes are held against; None: the recipe alone says what they are, for plans and benchmarks
    Raises UserError where the file has no such thing, or another one.
    """
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
    )
