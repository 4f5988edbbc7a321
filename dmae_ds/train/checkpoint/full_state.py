"""A checkpoint's parameters and Adam's moments, whole, put together from the parts that DeepSpeed's ranks wrote.

Read a parameter at a time, from mapped files: a rank that continues with another world size or ZeRO stage needs neither
the disk space nor the minutes of a conversion, and nothing half-made can be left over. DeepSpeed 0.19.8's own way
(ds_to_universal, then load_universal) is not taken for that because

- it loads stages 1 and 2 -> 3, 3 -> 1 and 2, and 1, 2 and 3 -> 0 not at all;
- into stage 3 it gives every parameter group the first one's weight decay;
- it writes every parameter's states twice, as small files, and unpickles whatever a file holds.

The parts are cut as ds_to_universal reads them; tests/train/checkpoint/test_reshard.py holds the two against each other.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from pathlib import Path

import torch
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    FP32_FLAT_GROUPS,
    OPTIMIZER_STATE_DICT,
    PARAM_SHAPES,
    PARAM_SLICE_MAPPINGS,
    SINGLE_PARTITION_OF_FP32_GROUPS,
)
from torch import Tensor

from dmae_ds.train.checkpoint.deepspeed_files import load_file

GROUPS = (
    "dmae_ds_parameter_groups"  # ours, in DeepSpeed's model files: [[names of a group's parameters], ...]
)
MOMENTS = ("exp_avg", "exp_avg_sq")
STATES = ("fp32", *MOMENTS)


class WholeState:
    """The state of a checkpoint folder that was written at a ZeRO stage; `step` is Adam's counter."""

    def __init__(self, folder: Path, *, stage: int):
        self._shapes: dict[str, torch.Size] = {}
        self._pieces: dict[tuple[str, str], list[Tensor]] = defaultdict(
            list
        )  # (name, state) -> flat pieces, in order
        self._steps: set[float] = set()
        {0: self._open_whole, 1: self._open_sliced, 2: self._open_sliced, 3: self._open_scattered}[stage](
            folder
        )
        assert len(self._steps) == 1, f"{folder}: Adam's step counters differ: {self._steps}"
        (self.step,) = self._steps

    @property
    def names(self) -> list[str]:
        """Of the trained parameters."""
        return list(self._shapes)

    def read(self, name: str) -> dict[str, Tensor]:
        """{"fp32", "exp_avg", "exp_avg_sq"} of a parameter, in its shape, on the CPU, in fp32."""
        shape, found = self._shapes[name], {}
        for state in STATES:
            flat = torch.cat(self._pieces[name, state]).float()
            found[state] = flat[: shape.numel()].view(shape)  # stage 3 pads the last piece
        return found

    def _open_whole(self, folder: Path) -> None:
        """Stage 0: the model, and torch's own state of the optimiser, which knows parameters by number."""
        (file,) = _open(folder, "*_model_states.pt")
        states = file["optimizer"]["state"]
        for number, name in enumerate(name for group in file[GROUPS] for name in group):
            self._shapes[name] = file["module"][name].shape
            for state, tensor in zip(
                STATES, (file["module"][name], *(states[number][moment] for moment in MOMENTS)), strict=True
            ):
                self._pieces[name, state].append(tensor.flatten())
            self._steps.add(float(states[number]["step"]))

    def _open_sliced(self, folder: Path) -> None:
        """Stages 1 and 2: each group is one flat tensor, cut over the ranks wherever the cuts fall."""
        for shapes in _open(folder, "*_model_states.pt")[0][PARAM_SHAPES]:
            self._shapes |= shapes
        for file in _open(folder, "*_optim_states.pt"):
            optimizer = file[OPTIMIZER_STATE_DICT]
            for number, (weights, slices) in enumerate(
                zip(optimizer[SINGLE_PARTITION_OF_FP32_GROUPS], optimizer[PARAM_SLICE_MAPPINGS], strict=True)
            ):
                states = optimizer[BASE_OPTIMIZER_STATE]["state"][number]
                self._steps.add(float(states["step"]))
                for name, where in slices.items():
                    for state, flat in zip(
                        STATES, (weights, *(states[moment] for moment in MOMENTS)), strict=True
                    ):
                        self._pieces[name, state].append(flat[where.start : where.start + where.numel])

    def _open_scattered(self, folder: Path) -> None:
        """Stage 3: every parameter is cut into as many equal pieces as there are ranks, and a rank's pieces lie one behind the other."""
        groups = _open(folder, "*_model_states.pt")[0][PARAM_SHAPES]
        files = _open(folder, "*_optim_states.pt")
        for file in files:
            optimizer = file[OPTIMIZER_STATE_DICT]
            for number, shapes in enumerate(groups):
                states, start = optimizer[OPTIMIZER_STATE_DICT]["state"][number], 0
                self._steps.add(float(states["step"]))
                for name, shape in shapes.items():
                    stop = start + math.ceil(shape.numel() / len(files))
                    for state, flat in zip(
                        STATES,
                        (optimizer[FP32_FLAT_GROUPS][number], *(states[moment] for moment in MOMENTS)),
                        strict=True,
                    ):
                        self._pieces[name, state].append(flat[start:stop])
                    self._shapes[name], start = shape, stop


def _open(folder: Path, pattern: str) -> list[dict]:
    """DeepSpeed's files of one kind, in the order of ranks."""

    def numbers(path: Path) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", path.name)]

    return [load_file(path, mmap=True) for path in sorted(folder.glob(pattern), key=numbers)]
