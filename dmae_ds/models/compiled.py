"""torch.compile for the blocks of a network: one graph, compiled once for every shape that its blocks meet.

Shapes here never change in a run (the mask's size is fixed), so graphs are static; a block is the region that repeats, so
compiling it takes a fraction of what a whole network takes. Names of parameters stay.
"""

from __future__ import annotations

from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import nn


def compile_blocks(network: nn.Module) -> int:
    """Let every transformer block under a network be compiled when it is first run; returns how many there are."""
    blocks = [module for module in network.modules() if isinstance(module, (Block, EvaBlock))]
    for block in blocks:
        block.compile(dynamic=False)
    return len(blocks)
