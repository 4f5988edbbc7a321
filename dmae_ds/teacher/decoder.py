"""The first blocks of a frozen MAE's decoder, for objectives that tap `decoder/4` (G2SD); the rest is never made."""

from __future__ import annotations

from functools import partial

import torch
from accelerate import init_empty_weights
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from dmae_ds.errors import UserError
from dmae_ds.teacher.fit import describe_kind
from dmae_ds.teacher.formats import Weights


class TeacherDecoder(nn.Module):
    """Visible tokens and mask tokens through the decoder's blocks (MAE, Sec. 3), under the published names.

    Tokens stay in the order of the mask, as in our own decoder: attention doesn't mind, and each carries its position.
    """

    def __init__(self, *, encoder_dim: int, embed_dim: int, depth: int, num_heads: int, num_patches: int):
        super().__init__()
        self.decoder_embed = nn.Linear(encoder_dim, embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.register_buffer("decoder_pos_embed", torch.empty(1, 1 + num_patches, embed_dim))
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.decoder_blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio=4, qkv_bias=True, norm_layer=norm) for _ in range(depth))

    def forward(self, latent: Tensor, ids_keep: Tensor, ids_masked: Tensor) -> dict[int, Tensor]:
        """latent [N, 1 + K, D_t], the encoder's output after its norm
        -> {block: [N, 1 + L, D_d]} right after each block; tokens as CLS, ids_keep, ids_masked."""
        visible = self.decoder_embed(latent)
        masks = self.mask_token.to(visible.dtype).expand(len(visible), ids_masked.shape[1], -1)
        places = torch.cat([torch.zeros_like(ids_keep[:, :1]), 1 + ids_keep, 1 + ids_masked], dim=1)
        tokens = torch.cat([visible, masks], dim=1) + self.decoder_pos_embed[0].to(visible.dtype)[places]
        tapped = {}
        for number, block in enumerate(self.decoder_blocks, start=1):
            tapped[number] = tokens = block(tokens)
        return tapped


def meta_decoder(weights: Weights, *, encoder_dim: int, depth: int, num_heads: int, num_patches: int) -> TeacherDecoder:
    """The decoder's first `depth` blocks on the meta device, as wide as the file's.

    Raises UserError where the file has no decoder, or too short a one.
    """
    if "decoder_embed.weight" not in weights:
        raise UserError(
            f"teacher.weights '{weights.path}' is {describe_kind(weights.container) or 'no masked autoencoder'}; the objective taps decoder block {depth}: "
            "give a whole MAE, such as mae_pretrain_vit_large_full.pth or a mae_visualize file"
        )
    embed_dim = weights.like("decoder_embed.weight").shape[0]
    if embed_dim % num_heads:
        raise UserError(f"teacher.decoder_num_heads {num_heads} does not divide the decoder's width {embed_dim}, found in '{weights.path}'")
    with init_empty_weights(include_buffers=True):
        return TeacherDecoder(encoder_dim=encoder_dim, embed_dim=embed_dim, depth=depth, num_heads=num_heads, num_patches=num_patches)
