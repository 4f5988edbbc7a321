"""Where CLS looks: the attention of a block from CLS to the patches, head by head, and the heads that look closest.

timm fuses attention into one operation that never shows its weights. Its other path, which computes them, is taken for
the one block that is asked, so that whatever timm puts in (normalised queries, rotary angles) is in the maps too.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator

import torch
from torch import Tensor, nn

from dmae_ds.models.vit import MaskedViT


@contextmanager
def attention_weights(attention: nn.Module) -> Iterator[list[Tensor]]:
    """A list that gets the weights [N, heads, T, T] of every pass through a timm attention module; each row sums to one."""
    found: list[Tensor] = []
    handle = attention.attn_drop.register_forward_hook(lambda module, inputs, output: found.append(inputs[0]))
    fused, attention.fused_attn = attention.fused_attn, False
    try:
        yield found
    finally:
        attention.fused_attn = fused
        handle.remove()


@torch.inference_mode()
def cls_attention(vit: MaskedViT, patches: Tensor, block: int) -> Tensor:
    """[N, heads, L]: how CLS of block `block` (from 1) divides its attention over the patches; what CLS and registers get is left out.

    patches: all of every picture, [N, L, P, P, 3], normalised. Raises ValueError for a network without CLS.
    """
    if vit.cls_token is None:
        raise ValueError("this network has no CLS token")
    ids = torch.arange(vit.num_patches, device=patches.device).expand(len(patches), -1)
    with attention_weights(vit.blocks[block - 1].attn) as found:
        vit(patches, ids)
    return found[0][:, :, 0, vit.num_prefix :].float()


def telling_heads(maps: Tensor, num: int) -> list[int]:
    """The heads whose maps say most about the picture, best first: what they look at differs from picture to picture.

    maps [N, heads, L] of at least two pictures. A head is rated by the Jensen-Shannon divergence of its N maps: a head that looks
    everywhere, or always at the same place, has none.
    """
    shares = maps.double() / maps.double().sum(dim=-1, keepdim=True).clamp(min=1e-12)
    divergence = _entropy(shares.mean(dim=0)) - _entropy(shares).mean(dim=0)  # [heads]
    return divergence.argsort(descending=True, stable=True)[:num].tolist()


def _entropy(shares: Tensor) -> Tensor:
    return torch.special.entr(shares).sum(dim=-1)
