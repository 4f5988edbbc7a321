"""A checkpoint's parameters and Adam's moments in full, joined from the pieces that DeepSpeed's ranks wrote.

It is read one parameter at a time, from memory-mapped files: a rank that continues with another world size
or ZeRO stage needs neither the disk space nor the minutes of a conversion, and no half-made conversion can
be left over. DeepSpeed 0.19.8's own way (ds_to_universal, then load_universal) is not used for that because

- it does not load stages 1 and 2 -> 3, 3 -> 1 and 2, and 1, 2 and 3 -> 0;
- into stage 3 it gives every parameter group the first one's weight decay;
- it writes every parameter's states twice, as small files, and unpickles whatever a file holds.

The pieces are read as ds_to_universal reads them; tests/train/checkpoint/test_reshard.py compares the two.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Iterable

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

# Our key in DeepSpeed's model files: [[names of a group's parameters], ...].
GROUPS = "dmae_ds_parameter_groups"
MOMENTS = ("exp_avg", "exp_avg_sq")
STATES = ("fp32", *MOMENTS)


class FullState:
    """State of a checkpoint folder that was written at a ZeRO stage; `step` is Adam's counter."""

    def __init__(self, folder: Path, *, stage: int):
        self._shapes: dict[str, torch.Size] = {}
        # (name of a parameter, name of a state) -> its flat pieces, in order
        self._pieces: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
        self._steps: set[float] = set()
        open_stage = [
            self._open_stage_0,
            self._open_stage_1_or_2,
            self._open_stage_1_or_2,
            self._open_stage_3,
        ]
        open_stage[stage](folder)
        assert len(self._steps) == 1, f"{folder}: Adam's step counters differ: {self._steps}"
        (self.step,) = self._steps

    @property
    def names(self) -> list[str]:
        """Names of the trained parameters."""
        return list(self._shapes)

    def read(self, name: str) -> dict[str, Tensor]:
        """Read a parameter's {"fp32", "exp_avg", "exp_avg_sq"}, each in its shape, fp32, on the CPU."""
        shape, states = self._shapes[name], {}
        for state in STATES:
            flat = torch.cat(self._pieces[name, state]).float()
            states[state] = flat[: shape.numel()].view(shape)  # stage 3 pads the last piece
        return states

    def _open_stage_0(self, folder: Path) -> None:
        """The model, and torch's own state of the optimizer, which knows parameters by number."""
        (file,) = _open(folder, "*_model_states.pt")
        states = file["optimizer"]["state"]
        names = [name for group in file[GROUPS] for name in group]
        for number, name in enumerate(names):
            weight = file["module"][name]
            self._shapes[name] = weight.shape
            for state, tensor in _by_state(weight, states[number]):
                self._pieces[name, state].append(tensor.flatten())
            self._steps.add(float(states[number]["step"]))

    def _open_stage_1_or_2(self, folder: Path) -> None:
        """Each parameter group is one flat tensor, cut over the ranks without regard to its parameters."""
        for shapes in _open(folder, "*_model_states.pt")[0][PARAM_SHAPES]:
            self._shapes |= shapes
        for file in _open(folder, "*_optim_states.pt"):
            optimizer = file[OPTIMIZER_STATE_DICT]
            groups = zip(
                optimizer[SINGLE_PARTITION_OF_FP32_GROUPS], optimizer[PARAM_SLICE_MAPPINGS], strict=True
            )
            for number, (weights, slices) in enumerate(groups):
                states = optimizer[BASE_OPTIMIZER_STATE]["state"][number]
                self._steps.add(float(states["step"]))
                for name, place in slices.items():
                    for state, flat in _by_state(weights, states):
                        piece = flat[place.start : place.start + place.numel]
                        self._pieces[name, state].append(piece)

    def _open_stage_3(self, folder: Path) -> None:
        """Every parameter is cut into one piece a rank, all equal; the pieces of a rank follow each other."""
        groups = _open(folder, "*_model_states.pt")[0][PARAM_SHAPES]
        files = _open(folder, "*_optim_states.pt")
        for file in files:
            optimizer = file[OPTIMIZER_STATE_DICT]
            for number, shapes in enumerate(groups):
                weights = optimizer[FP32_FLAT_GROUPS][number]
                states = optimizer[OPTIMIZER_STATE_DICT]["state"][number]
                self._steps.add(float(states["step"]))
                start = 0
                for name, shape in shapes.items():
                    stop = start + math.ceil(shape.numel() / len(files))
                    for state, flat in _by_state(weights, states):
                        self._pieces[name, state].append(flat[start:stop])
                    self._shapes[name] = shape
                    start = stop


def read_buffers(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Read the buffers of these names that a checkpoint of any ZeRO stage holds."""
    module = _open(folder, "*_model_states.pt")[0]["module"]
    return {name: module[name] for name in names if name in module}


def read_groups(folder: Path) -> list[list[str]] | None:
    """Read which parameters were in which group of the optimizer; None where a checkpoint of old lacks it."""
    return load_file(next(folder.glob("*_model_states.pt")), mmap=True).get(GROUPS)


def _by_state(weight: Tensor, states: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Pairs of the names in STATES and their tensors: the weight, then Adam's moments."""
    return [("fp32", weight), *((moment, states[moment]) for moment in MOMENTS)]


def _open(folder: Path, pattern: str) -> list[dict]:
    """Open DeepSpeed's files of one kind, in the order of ranks."""

    def numbers(path: Path) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", path.name)]

    return [load_file(path, mmap=True) for path in sorted(folder.glob(pattern), key=numbers)]
