"""Activation checkpointing (`student.checkpoint_blocks`): backward runs a block a second time.

Forward keeps a block's input alone. Losses and gradients are those without it: blocks draw nothing at random.
"""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def run_twice(run: Callable[..., Tensor], *inputs: object) -> Tensor:
    """Return run(*inputs); backward calls it again for what is in between. Without gradients: once.

    torch ends the second pass inside its last layer. ZeRO-3 requires that: at that layer's end it would
    release the weights that backward has just gathered.
    """
    if not torch.is_grad_enabled():
        return run(*inputs)
    return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
