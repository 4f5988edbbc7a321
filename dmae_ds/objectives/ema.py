"""The EMA teacher as a module: fp32 copies of submodules of an objective, without gradients.

`train/ema.py` updates and checkpoints it.
"""

from __future__ import annotations

import contextlib
import copy

import torch
from torch import Tensor, nn

from dmae_ds.models.masking import PatchBatch
from dmae_ds.objectives.base import Objective

# The recipe's precision -> dtype of the EMA teacher's matrix products.
AUTOCAST = {
    "fp32": None,
    "bf16": torch.bfloat16,
    "bf16_autocast": torch.bfloat16,
    "fp16": torch.float16,
}


class EmaModule(nn.Module):
    """Copies of `objective.ema.parts` as attributes, in the same training mode, and `state`.

    state: {name: tensor} of `Objective.ema_state`; may be updated in place
    Build it before an engine takes the objective and before anything adds hooks, which would be copied too.
    """

    def __init__(self, objective: Objective):
        super().__init__()
        for name in objective.ema.parts:
            self.add_module(name, copy.deepcopy(getattr(objective, name)))
        self.state: dict[str, Tensor] = {
            name: tensor.detach().clone() for name, tensor in objective.ema_state().items()
        }
        self.requires_grad_(False)


@torch.no_grad()
def ema_features(
    objective: Objective, ema: EmaModule, masked: PatchBatch, *, precision: str
) -> dict[str, Tensor]:
    """Return what the objective computes with its EMA teacher for a micro-batch, {"ema/NAME": tensor}.

    precision: of the recipe; it sets the dtype of the matrix products, the weights are always fp32
    """
    dtype = AUTOCAST[precision]
    with contextlib.nullcontext() if dtype is None else torch.autocast(masked.visible.device.type, dtype):
        features = objective.ema_features(ema, masked)
    assert all(name.startswith("ema/") for name in features), (
        f"ema_features gave {', '.join(features)}; names begin with ema/"
    )
    return features
