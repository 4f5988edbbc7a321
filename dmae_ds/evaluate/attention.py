"""Attention maps: how much each head of a block attends from CLS to every patch, and which heads to show.

timm fuses attention into one operation that does not return its weights. Its other path, which computes them,
is used for the one block in question, so the maps include everything that timm does (normalised queries,
rotary angles).
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator

import torch
from torch import Tensor, nn

from dmae_ds.models.vit import MaskedViT


@contextmanager
def attention_weights(attention: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the weights [N, heads, T, T] of every pass through a timm attention module in a list.

    Each row of the weights sums to one.
    """
    weights: list[Tensor] = []
    handle = attention.attn_drop.register_forward_hook(
        lambda module, inputs, output: weights.append(inputs[0])
    )
    fused, attention.fused_attn = attention.fused_attn, False
    try:
        yield weights
    finally:
        attention.fused_attn = fused
        handle.remove()


@torch.inference_mode()
def cls_attention(vit: MaskedViT, patches: Tensor, block: int) -> Tensor:
    """Attention [N, heads, L] from CLS to the patches in block `block` (counted from 1).

    patches: all patches of every image, [N, L, P, P, 3], normalised
    Attention to CLS itself and to registers is left out. Raises ValueError for a network without CLS.
    """
    if vit.cls_token is None:
        raise ValueError("this network has no CLS token")
    ids = torch.arange(vit.num_patches, device=patches.device).expand(len(patches), -1)
    with attention_weights(vit.blocks[block - 1].attn) as weights:
        vit(patches, ids)
    return weights[0][:, :, 0, vit.num_prefix :].float()


def choose_heads(maps: Tensor, num: int) -> list[int]:
    """Choose the `num` heads whose maps differ most from image to image, best first.

    maps: [N, heads, L] of at least two images
    A head is rated by the Jensen-Shannon divergence of its N maps, which is zero for a head that attends
    everywhere or always to the same place.
    """
    shares = maps.double() / maps.double().sum(dim=-1, keepdim=True).clamp(min=1e-12)
    divergence = _entropy(shares.mean(dim=0)) - _entropy(shares).mean(dim=0)  # [heads]
    return divergence.argsort(descending=True, stable=True)[:num].tolist()


def _entropy(shares: Tensor) -> Tensor:
    return torch.special.entr(shares).sum(dim=-1)
