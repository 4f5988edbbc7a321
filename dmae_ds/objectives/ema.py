"""The EMA twin as a module: copies of an objective's parts, in fp32, that nobody trains. `train/twin.py` keeps it."""

from __future__ import annotations

import contextlib
import copy

import torch
from torch import Tensor, nn

from dmae_ds.models.masking import MaskedBatch
from dmae_ds.objectives.base import Objective

AUTOCAST = {
    "fp32": None,
    "bf16": torch.bfloat16,
    "bf16_autocast": torch.bfloat16,
    "fp16": torch.float16,
}  # precision -> dtype of the twin's products


class TwinModule(nn.Module):
    """The parts as attributes, in the mode that they are in; `state` is {name: tensor} of `Objective.twin_state`, and may be updated in place.

    Make it before an engine takes the objective, and before anything hooks into its parts: they are copied as they stand.
    """

    def __init__(self, objective: Objective):
        super().__init__()
        for name in objective.twin.parts:
            self.add_module(name, copy.deepcopy(getattr(objective, name)))
        self.state: dict[str, Tensor] = {
            name: tensor.detach().clone() for name, tensor in objective.twin_state().items()
        }
        self.requires_grad_(False)


@torch.no_grad()
def twin_features(
    objective: Objective, twin: TwinModule, masked: MaskedBatch, *, precision: str
) -> dict[str, Tensor]:
    """What the objective wants of its twin for a micro-batch; names begin with "twin/".

    precision: the recipe's; the weights are fp32 whatever it says, the matrix products as it says
    """
    dtype = AUTOCAST[precision]
    with contextlib.nullcontext() if dtype is None else torch.autocast(masked.visible.device.type, dtype):
        found = objective.twin_features(twin, masked)
    assert all(name.startswith("twin/") for name in found), (
        f"twin_features gave {', '.join(found)}; names begin with twin/"
    )
    return found
