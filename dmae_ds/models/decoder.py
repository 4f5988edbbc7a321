"""MAE's lightweight decoder, of any depth and width (MAE, Sec. 3; DMAE, Table 3b)."""

from __future__ import annotations

import math
from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from dmae_ds.errors import UserError
from dmae_ds.models.positions import sincos_positions
from dmae_ds.models.recompute import run_twice
from dmae_ds.models.vit import initialize_as_mae


class TokenDecoder(nn.Module):
    """The decoder's blocks on visible tokens and mask tokens, without a norm or a head after them.

    Attention doesn't depend on the order of tokens, and every token has its position added. So visible and
    mask tokens stay in the order of the mask instead of being put back on the grid.
    """

    def __init__(
        self,
        *,
        encoder_dim: int,
        grid: tuple[int, int],
        depth: int,
        embed_dim: int,
        num_heads: int,
        generator: torch.Generator,
    ):
        super().__init__()
        if embed_dim % num_heads:
            raise UserError(
                f"objective.decoder.embed_dim {embed_dim} is not a multiple of objective.decoder.num_heads "
                f"{num_heads}"
            )
        self.embed = nn.Linear(encoder_dim, embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.register_buffer("pos_embed", sincos_positions(embed_dim, grid))
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio=4, qkv_bias=True, norm_layer=norm) for _ in range(depth)
        )
        self.checkpoint_blocks = False  # see recompute.py
        initialize_as_mae(self, generator)

    def forward(self, latent: Tensor, ids_keep: Tensor, ids_masked: Tensor) -> Tensor:
        """Run the blocks.

        latent: [N, 1 + K, D], CLS first; [N, K, D] of a student without CLS
        Returns tokens [N, 1 + L, D_d] after the last block, in the order CLS, ids_keep, ids_masked.
        """
        # In the dtype of the weights, which is float32 under autocast: see MaskedViT.token_dtype. A mask
        # token that is not trained is a buffer, which DeepSpeed does not cast.
        dtype = self.blocks[0].norm1.weight.dtype
        visible = self.embed(latent).to(dtype)
        masks = self.mask_token.to(dtype).expand(len(visible), ids_masked.shape[1], -1)
        positions = self.pos_embed[0].to(dtype)
        # CLS has row 0 of the positional embedding, patch l has row 1 + l.
        of_cls = torch.zeros_like(ids_keep[:, : latent.shape[1] - ids_keep.shape[1]])
        places = torch.cat([of_cls, 1 + ids_keep, 1 + ids_masked], dim=1)
        tokens = torch.cat([visible, masks], dim=1) + positions[places]
        for block in self.blocks:
            tokens = run_twice(block, tokens) if self.checkpoint_blocks else block(tokens)
        return tokens


class Decoder(TokenDecoder):
    """TokenDecoder with a norm and a linear head, which predict the masked patches alone.

    feature_dim: size of the prediction for a patch; None: its pixels
    """

    def __init__(
        self,
        *,
        encoder_dim: int,
        patch_size: int,
        grid: tuple[int, int],
        depth: int,
        embed_dim: int,
        num_heads: int,
        generator: torch.Generator,
        feature_dim: int | None = None,
        channels: int = 3,
    ):
        super().__init__(
            encoder_dim=encoder_dim,
            grid=grid,
            depth=depth,
            embed_dim=embed_dim,
            num_heads=num_heads,
            generator=generator,
        )
        self.shape = (patch_size, patch_size, channels) if feature_dim is None else (feature_dim,)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.pred = nn.Linear(embed_dim, math.prod(self.shape))
        for head in (self.norm, self.pred):
            initialize_as_mae(head, generator)

    def forward(self, latent: Tensor, ids_keep: Tensor, ids_masked: Tensor) -> Tensor:
        """Predict the masked patches, in ids_masked's order.

        latent: [N, 1 + K, D], CLS first; [N, K, D] of a student without CLS
        Returns pixels [N, L - K, P, P, C] or features [N, L - K, feature_dim].
        """
        tokens = super().forward(latent, ids_keep, ids_masked)
        return self.pred(self.norm(tokens[:, latent.shape[1] :])).unflatten(-1, self.shape)
