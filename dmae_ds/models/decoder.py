"""MAE's lightweight pixel decoder, of any depth and width (MAE, Sec. 3; DMAE, Table 3b)."""

from __future__ import annotations

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from dmae_ds.errors import UserError
from dmae_ds.models.positions import sincos_positions
from dmae_ds.models.vit import initialize_as_mae


class Decoder(nn.Module):
    """Visible tokens + mask tokens -> pixels of the masked patches.

    Attention doesn't care for the order of tokens, and every token carries its position code. So visible and mask
    tokens stay in the order of the mask instead of being put back on the grid, and the head runs on the masked ones only.
    """

    def __init__(self, *, encoder_dim: int, patch_size: int, grid: tuple[int, int], depth: int, embed_dim: int, num_heads: int, generator: torch.Generator):
        super().__init__()
        if embed_dim % num_heads:
            raise UserError(f"objective.decoder.embed_dim {embed_dim} is not a multiple of objective.decoder.num_heads {num_heads}")
        self.patch_size = patch_size
        self.embed = nn.Linear(encoder_dim, embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.register_buffer("pos_embed", sincos_positions(embed_dim, grid))
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio=4, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        self.norm = norm(embed_dim)
        self.pred = nn.Linear(embed_dim, patch_size**2 * 3)
        initialize_as_mae(self, generator)

    def forward(self, latent: Tensor, ids_keep: Tensor, ids_masked: Tensor) -> Tensor:
        """latent [N, 1 + K, D], CLS first -> predicted pixels of the masked patches [N, L - K, P, P, 3], in ids_masked's order."""
        num_visible = ids_keep.shape[1]
        visible = self.embed(latent)
        masks = self.mask_token.to(visible.dtype).expand(len(visible), ids_masked.shape[1], -1)
        positions = self.pos_embed[0].to(visible.dtype)
        # CLS has row 0 of the position codes, patch l has row 1 + l.
        places = torch.cat([torch.zeros_like(ids_keep[:, :1]), 1 + ids_keep, 1 + ids_masked], dim=1)
        tokens = torch.cat([visible, masks], dim=1) + positions[places]
        for block in self.blocks:
            tokens = block(tokens)
        pixels = self.pred(self.norm(tokens[:, 1 + num_visible :]))
        return pixels.unflatten(-1, (self.patch_size, self.patch_size, 3))
