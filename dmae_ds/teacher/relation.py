"""Queries, keys and values of one block, for objectives that tap `relation/18` (TinyMIM).

They are what the block's attention multiplies, by its own code: after its norms of queries and keys, and with
rotary angles, not scaled. The attention runs up to its product, where a function mode of torch takes them.
"""

from __future__ import annotations

from typing import Callable

from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn, stack
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dmae_ds.errors import UserError


def relation_of(block: nn.Module) -> Callable[..., Tensor]:
    """The function that a block's input [N, T, D] goes through: [N, T, 3 * heads * d], q, k, v of each head.

    It takes `rope` as the block does. `split_heads` undoes the flattening.
    """

    def run(tokens: Tensor, **kwargs) -> Tensor:
        try:
            with _UpToTheProduct():
                block.attn(block.norm1(tokens), **kwargs)
        except _Reached as reached:
            # 3 x [N, heads, T, d] -> [N, T, 3, heads, d]
            return stack(reached.inputs).permute(1, 3, 0, 2, 4).flatten(2)
        raise UserError(
            "the objective taps a relation, and timm computes attention without torch's "
            "scaled_dot_product_attention; unset TIMM_FUSED_ATTN"
        )

    return run


def split_heads(flat: Tensor, num_heads: int) -> Tensor:
    """Turn [N, T, 3 * heads * d] into [N, 3, heads, T, d]."""
    return flat.unflatten(-1, (3, num_heads, -1)).permute(0, 2, 3, 1, 4)


def why_no_relation(block: nn.Module) -> str:
    """Why a block has no relations to tap, as the end of a sentence; empty where it has."""
    if isinstance(block, (Block, EvaBlock)):
        return ""
    return f"has blocks of type {type(block).__name__}, which don't norm before they attend"


class _Reached(Exception):
    def __init__(self, inputs: tuple[Tensor, ...]):
        super().__init__()
        self.inputs = inputs


class _UpToTheProduct(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is functional.scaled_dot_product_attention:
            raise _Reached(args[:3])
        return function(*args, **(kwargs or {}))
