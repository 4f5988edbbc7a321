"""A frozen MAE's decoder on top of its encoder, for objectives that tap `decoder/4` (G2SD) or `prediction`.

No block above the deepest tap is built.
"""

from __future__ import annotations

from functools import partial

import torch
from accelerate import init_empty_weights
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from dmae_ds.errors import UserError
from dmae_ds.weights.kinds import describe_kind
from dmae_ds.weights.named import Weights


class TeacherDecoder(nn.Module):
    """The encoder's final norm, then visible and mask tokens through the decoder's blocks (MAE, Sec. 3).

    Names are the published ones. Tokens stay in the order of the mask, as in our own decoder: attention
    doesn't depend on their order, and each token has its position added.
    patch_size: given, the decoder is complete and predicts pixels; None: it ends after its last block
    """

    def __init__(
        self,
        norm: nn.Module,
        *,
        encoder_dim: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        num_patches: int,
        patch_size: int | None = None,
        channels: int = 3,
    ):
        super().__init__()
        self.norm = norm
        self.decoder_embed = nn.Linear(encoder_dim, embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.register_buffer("decoder_pos_embed", torch.empty(1, 1 + num_patches, embed_dim))
        layer_norm = partial(nn.LayerNorm, eps=1e-6)
        self.decoder_blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio=4, qkv_bias=True, norm_layer=layer_norm)
            for _ in range(depth)
        )
        self.patch_size = patch_size
        if patch_size is not None:
            self.decoder_norm = layer_norm(embed_dim)
            self.decoder_pred = nn.Linear(embed_dim, patch_size**2 * channels)

    def forward(self, encoded: Tensor, ids_keep: Tensor, ids_masked: Tensor) -> dict[str, Tensor]:
        """Run the decoder.

        encoded: [N, 1 + K, D_t], right after the encoder's last block
        Returns {"decoder/4": [N, 1 + L, D_d]} right after each block, tokens in the order CLS, ids_keep,
        ids_masked; a complete decoder also {"prediction": [N, L - K, P_t, P_t, 3]}, pixels of the masked
        patches in ids_masked's order.
        """
        visible = self.decoder_embed(self.norm(encoded))
        masks = self.mask_token.to(visible.dtype).expand(len(visible), ids_masked.shape[1], -1)
        places = torch.cat([torch.zeros_like(ids_keep[:, :1]), 1 + ids_keep, 1 + ids_masked], dim=1)
        tokens = torch.cat([visible, masks], dim=1) + self.decoder_pos_embed[0].to(visible.dtype)[places]
        features = {}
        for number, block in enumerate(self.decoder_blocks, start=1):
            features[f"decoder/{number}"] = tokens = block(tokens)
        if self.patch_size is not None:
            pixels = self.decoder_pred(self.decoder_norm(tokens[:, 1 + ids_keep.shape[1] :]))
            features["prediction"] = pixels.unflatten(-1, (self.patch_size, self.patch_size, -1))
        return features


def meta_decoder(
    weights: Weights | None,
    norm: nn.Module,
    *,
    encoder_dim: int,
    embed_dim: int,
    depth: int,
    num_heads: int,
    num_patches: int,
    patch_size: int | None = None,
    channels: int = 3,
) -> TeacherDecoder:
    """Build the decoder's first `depth` blocks on the meta device; with `patch_size`, all of it.

    weights: the file that they are checked against, if any
    Raises UserError where the file has no decoder, one of another width, or more blocks than
    teacher.decoder_depth.
    """
    if weights is not None:
        _check(weights, embed_dim=embed_dim, depth=depth, whole=patch_size is not None)
    if embed_dim % num_heads:
        raise UserError(
            f"teacher.decoder_num_heads {num_heads} does not divide teacher.decoder_embed_dim {embed_dim}"
        )
    with init_empty_weights(include_buffers=True):
        return TeacherDecoder(
            norm,
            encoder_dim=encoder_dim,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            num_patches=num_patches,
            patch_size=patch_size,
            channels=channels,
        )


def _check(weights: Weights, *, embed_dim: int, depth: int, whole: bool) -> None:
    if "decoder_embed.weight" not in weights:
        taps = "the decoder's prediction" if whole else f"decoder block {depth}"
        kind = describe_kind(weights.container) or "not a masked autoencoder"
        raise UserError(
            f"teacher.weights '{weights.path}' is {kind}, but the objective taps {taps}; give a whole MAE, "
            "such as mae_pretrain_vit_large_full.pth, a mae_visualize file, or a run folder of ours"
        )
    width = weights.like("decoder_embed.weight").shape[0]
    if width != embed_dim:
        raise UserError(
            f"teacher.decoder_embed_dim is {embed_dim}, the decoder in '{weights.path}' is {width} wide; "
            f"set teacher.decoder_embed_dim={width}"
        )
    if whole and any(name.startswith(f"decoder_blocks.{depth}.") for name in weights):
        raise UserError(
            f"teacher.decoder_depth is {depth}, the decoder in '{weights.path}' has more blocks; set "
            "teacher.decoder_depth to its number of blocks"
        )
