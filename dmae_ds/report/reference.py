"""The teacher that a page's students are held against: whole, as far as its file goes, loaded once for all runs that share it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dmae_ds.config.run import RunConfig
from dmae_ds.errors import UserError
from dmae_ds.evaluate.record import RunRecord
from dmae_ds.objectives.build import build_objective
from dmae_ds.objectives.feature_distillation import TeacherShape
from dmae_ds.teacher.build import build_frozen_teacher
from dmae_ds.teacher.frozen import FrozenTeacher, needed_depths

# Parameters of the whole teacher: 16 pictures through a ViT-L are 2 TFLOP, half a minute on two cores.
LARGEST = {"cpu": 1e9, "cuda": 8e9}


@dataclass(frozen=True)
class Reference:
    """A loaded teacher. name: for a reader; own: whether it is the run's; tapped: the deepest block that is imitated; note: what is missing of it, or nothing."""

    teacher: FrozenTeacher
    name: str
    own: bool
    tapped: int
    note: str

    @torch.inference_mode()
    def features(self, patches: Tensor) -> dict[int, Tensor]:
        """{block: [N, 1 + L, D_t]}, or [N, L, D_t] without CLS. patches: of whole pictures, as the student's, [N, L, P, P, 3]."""
        num_patches = patches.shape[1]
        ids = torch.arange(num_patches, device=patches.device).expand(len(patches), -1)
        tapped = self.teacher.run(self.teacher.view(patches), ids)
        return {block: self.teacher.select(tokens, num_patches).float() for block, tokens in tapped.items()}


@dataclass(frozen=True)
class Wanted:
    """A run's teacher as its recipe has it: what a loaded one depends on."""

    config: RunConfig
    taps: tuple[str, ...]
    shape: TeacherShape
    grid: tuple[int, int]  # of the student's patches, and of the teacher's


class Teachers:
    """The teachers of a page's runs; a run without one borrows the first run's that has one, to see what distillation changed."""

    def __init__(self, records: dict[str, RunRecord]):
        self._lender = next(
            ((name, record.config) for name, record in records.items() if record.config.teacher is not None),
            None,
        )
        self._lent: Wanted | None = None
        self._key: str | None = None  # of the last one that was loaded: runs of a page mostly share theirs
        self._loaded: tuple[FrozenTeacher | UserError, str] | None = None

    def of(
        self, record: RunRecord, objective: nn.Module, shape: TeacherShape | None, *, device: torch.device
    ) -> Reference | None:
        """The run's teacher, or a borrowed one; None where no run of the page has one. objective, shape: of the run.

        Raises UserError, a sentence for the page, where its file is gone, it is too large, or a borrowed one
        doesn't fit.
        """
        grid, data = objective.student.grid, record.config.data
        if shape is not None:
            wanted, name = Wanted(record.config, objective.taps, shape, grid), "its teacher"
        elif self._lender is not None:
            wanted, name = self._borrow(), f"{self._lender[0]}'s teacher"
            if wanted.grid != grid or (wanted.config.data.mean, wanted.config.data.std) != (
                data.mean,
                data.std,
            ):
                raise UserError(
                    f"it has no teacher, and {self._lender[0]}'s cuts or normalises pictures differently"
                )
        else:
            return None
        key = str((wanted.config.teacher, wanted.taps, data.mean, data.std))
        if self._key != key:
            self._loaded = None  # free the last one before the next is read
            self._key, self._loaded = key, _load(wanted, device)
        teacher, note = self._loaded
        if isinstance(teacher, UserError):
            raise teacher
        return Reference(
            teacher,
            name=name,
            own=shape is not None,
            tapped=needed_depths(wanted.taps, wanted.shape.depth)[0],
            note=note,
        )

    def _borrow(self) -> Wanted:
        if self._lent is None:
            objective, shape = build_objective(self._lender[1], device="meta")
            self._lent = Wanted(self._lender[1], objective.taps, shape, objective.student.grid)
        return self._lent


def _load(wanted: Wanted, device: torch.device) -> tuple[FrozenTeacher | UserError, str]:
    """The teacher with all its blocks or, from a file that holds fewer, those that the objective taps; and what to say of it."""
    config, depth = wanted.config, wanted.shape.depth
    size, largest = (
        12 * depth * wanted.shape.embed_dim**2,
        LARGEST[device.type],
    )  # of the blocks' matrices, with an MLP of ratio 4
    if size > largest:
        return UserError(
            f"its teacher has about {size / 1e9:.1f} B parameters; on this machine the report looks at teachers of up to {largest / 1e9:g} B"
        ), ""
    errors = []
    for blocks in dict.fromkeys((depth, needed_depths(wanted.taps, depth)[0])):
        try:
            teacher = build_frozen_teacher(
                config.teacher,
                taps=tuple(f"block/{block}" for block in range(1, blocks + 1)),
                whole_blocks=depth,
                mean=config.data.mean,
                std=config.data.std,
                device=device,
                standardize=False,
            )
        except UserError as error:
            errors.append(error)
            continue
        return (
            teacher,
            ""
            if blocks == depth
            else f"its teacher's file holds {blocks} of {depth} blocks; the others can't be compared",
        )
    return UserError(f"its teacher can't be loaded: {errors[0]}"), ""
