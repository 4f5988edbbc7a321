"""The teachers that a page compares students with, as many of their blocks as their files hold."""

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
from dmae_ds.teacher.frozen import FrozenTeacher, needed_depths, split_tap

# Parameters of the whole teacher. 16 images through a ViT-L are 2 TFLOP, half a minute on two cores.
MAX_PARAMETERS = {"cpu": 1e9, "cuda": 8e9}


@dataclass(frozen=True)
class Reference:
    """A loaded teacher.

    name: as the page calls it; tapped: the deepest block that is distilled; note: which blocks are missing,
    or ""
    """

    teacher: FrozenTeacher
    name: str
    tapped: int
    note: str

    @torch.inference_mode()
    def features(self, patches: Tensor) -> dict[int, Tensor]:
        """The features of every block, {block: [N, 1 + L, D_t]}, or [N, L, D_t] without CLS.

        patches: of whole images, as the student sees them, [N, L, P, P, 3]
        """
        num_patches = patches.shape[1]
        ids = torch.arange(num_patches, device=patches.device).expand(len(patches), -1)
        tapped = self.teacher.run(self.teacher.view(patches), ids)
        return {
            split_tap(tap)[1]: self.teacher.select(tokens, num_patches).float()
            for tap, tokens in tapped.items()
        }


@dataclass(frozen=True)
class Wanted:
    """The teacher of a run's recipe, and all that a loaded one depends on.

    grid: of the student's patches
    """

    config: RunConfig
    taps: tuple[str, ...]
    shape: TeacherShape
    grid: tuple[int, int]


class Teachers:
    """The teachers of a page's runs.

    A run without a teacher is compared with the first run's that has one, to show what distillation changed.
    """

    def __init__(self, records: dict[str, RunRecord]):
        with_teacher = [
            (name, record.config) for name, record in records.items() if record.config.teacher is not None
        ]
        self._lender = with_teacher[0] if with_teacher else None  # (name, config)
        self._lent: Wanted | None = None
        self._key: str | None = None  # of the last one that was loaded: most runs of a page share theirs
        self._loaded: tuple[FrozenTeacher | UserError, str] | None = None

    def load_for(
        self,
        record: RunRecord,
        objective: nn.Module,
        shapes: dict[str, TeacherShape],
        *,
        device: torch.device,
    ) -> Reference | None:
        """Load the run's teacher, or another run's; returns None if no run of the page has one.

        objective, shapes: the run's, as `build_objective` gives them

        Raises UserError, a sentence for the page, if its file is missing, it is too large, or another run's
        doesn't fit.
        """
        data = record.config.data
        if record.config.teachers is not None:
            raise UserError(f"it has the teachers {', '.join(shapes)}, and a student is compared with one")
        if shapes:
            wanted = Wanted(record.config, objective.taps, shapes[""], objective.student.grid)
            name = "its teacher"
        elif self._lender is not None:
            wanted, name = self._lend(record, objective), f"{self._lender[0]}'s teacher"
        else:
            return None
        key = str((wanted.config.teacher, wanted.taps, data.mean, data.std))
        if self._key != key:
            self._loaded = None  # free the last one before the next is read
            self._key, self._loaded = key, _load(wanted, device)
        teacher, note = self._loaded
        if isinstance(teacher, UserError):
            raise teacher
        tapped, _ = needed_depths(wanted.taps, wanted.shape.depth)
        return Reference(teacher, name=name, tapped=tapped, note=note)

    def _lend(self, record: RunRecord, objective: nn.Module) -> Wanted:
        name, config = self._lender
        if self._lent is None:
            lender, shapes = build_objective(config, device="meta")
            self._lent = Wanted(config, lender.taps, shapes[""], lender.student.grid)
        same_pixels = (config.data.mean, config.data.std) == (record.config.data.mean, record.config.data.std)
        if self._lent.grid != objective.student.grid or not same_pixels:
            raise UserError(f"it has no teacher, and {name} has another patch grid or data.mean and data.std")
        return self._lent


def _load(wanted: Wanted, device: torch.device) -> tuple[FrozenTeacher | UserError, str]:
    """Load all blocks of a teacher or, from a file with fewer, those that are tapped.

    Returns the teacher, or why there is none, and a note about missing blocks or "".
    """
    config, depth = wanted.config, wanted.shape.depth
    size = 12 * depth * wanted.shape.embed_dim**2  # the matrices of its blocks, with an MLP of ratio 4
    largest = MAX_PARAMETERS[device.type]
    if size > largest:
        error = UserError(
            f"its teacher has about {size / 1e9:.1f} B parameters; "
            f"on this machine the report loads teachers of up to {largest / 1e9:g} B"
        )
        return error, ""
    errors = []
    tapped, _ = needed_depths(wanted.taps, depth)
    for num_blocks in dict.fromkeys((depth, tapped)):
        try:
            teacher = build_frozen_teacher(
                config.teacher,
                taps=tuple(f"block/{block}" for block in range(1, num_blocks + 1)),
                whole_blocks=depth,
                mean=config.data.mean,
                std=config.data.std,
                device=device,
                standardize=False,
            )
        except UserError as error:
            errors.append(error)
            continue
        if num_blocks == depth:
            return teacher, ""
        return (
            teacher,
            f"its teacher's file holds {num_blocks} of {depth} blocks; the others can't be compared",
        )
    return UserError(f"its teacher can't be loaded: {errors[0]}"), ""
