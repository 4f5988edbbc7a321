"""The EMA teacher as a module: copies of an objective's parts, in fp32, that nobody trains. `train/ema.py` keeps it."""

from __future__ import annotations

import contextlib
import copy

import torch
from torch import Tensor, nn

from dmae_ds.models.masking import PatchBatch
from dmae_ds.objectives.base import Objective

AUTOCAST = {
    "fp32": None,
    "bf16": torch.bfloat16,
    "bf16_autocast": torch.bfloat16,
    "fp16": torch.float16,
}  # precision -> dtype of the EMA teacher's products


class EmaModule(nn.Module):
    """The parts as attributes, in the mode that they are in; `state` is {name: tensor} of `Objective.ema_state`, and may be updated in place.

    Make it before an engine takes the objective, and before anything hooks into its parts: they are copied as they stand.
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
    """What the objective wants of its EMA teacher for a micro-batch; names begin with "ema/".

    precision: the recipe's; the weights are fp32 whatever it says, the matrix products as it says
    """
    dtype = AUTOCAST[precision]
    with contextlib.nullcontext() if dtype is None else torch.autocast(masked.visible.device.type, dtype):
        found = objective.ema_features(ema, masked)
    assert all(name.startswith("ema/") for name in found), (
        f"ema_features gave {', '.join(found)}; names begin with ema/"
    )
    return found
