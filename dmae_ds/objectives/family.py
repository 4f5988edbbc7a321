"""A family: several objectives, each with its student, on the same images (`students` of a recipe).

Nothing is shared but images, noise and the teacher's passes, so every member is the student that it would
have been alone: its mask is drawn from the same noise, its initial weights by a generator of its own. The
losses are added, which adds no gradient to anybody's.

Members whose teacher sees the same patches share a pass of it (teacher/passes.py). That is decided by what
objectives declare (`Objective.shown`) or by equal sections of the recipe; where neither says so, a member has
a pass of its own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from timm.layers import DropPath, PatchDropout
from torch import Tensor, nn

from dmae_ds.config.family import key_of, prefix_of
from dmae_ds.config.objectives import ObjectiveSection
from dmae_ds.data.batch import Batch
from dmae_ds.errors import UserError
from dmae_ds.models.masking import PatchBatch
from dmae_ds.models.vit import MaskedViT
from dmae_ds.objectives.base import Objective
from dmae_ds.objectives.needs import Progress
from dmae_ds.teacher.passes import TeacherPasses, pass_tap


@dataclass
class FamilyBatch(PatchBatch):
    """A micro-batch as each member prepared it.

    Its own patches are those of the teacher's first pass; without a teacher, those of the first member.

    of_members: {name: the member's batch}; members with equal sections have the same one
    passes: what the teacher sees in each of its passes
    """

    of_members: dict[str, PatchBatch]
    passes: tuple[PatchBatch, ...]


class Family(Objective):
    """Members by name, `sections` being their sections of the recipe.

    pass_of: {name: number of the teacher's pass that a member with taps reads, from 0}
    Raises UserError for members that cannot be trained on the same batches.
    """

    def __init__(self, members: dict[str, Objective], sections: dict[str, ObjectiveSection]):
        nn.Module.__init__(self)
        self.by_name = members
        self.modules_of_members = nn.ModuleList(members.values())
        _check(members)
        first = next(iter(members.values()))
        self.lr_scales: dict[str, float] = {}
        self.labels = any(member.labels for member in members.values())
        self.rand_augment = first.rand_augment
        self.views = max((member.views for member in members.values()), key=len)
        # The first of those members with an equal section: it prepares the batch of all of them.
        self.prepared_by = {
            name: next(other for other in members if sections[other] == sections[name]) for name in members
        }
        self._choose_passes()
        # As of the batch's own patches, what the teacher sees in its first pass.
        shown = members[self.shown_by[0]] if self.shown_by else first
        self.num_visible = shown.num_visible

    def _choose_passes(self) -> None:
        """Give members that show the teacher the same patches one pass, with the taps of all of them."""
        keys: list[object] = []
        self.pass_of: dict[str, int] = {}
        taps: list[tuple[str, ...]] = []
        self.shown_by: list[str] = []  # who prepares the patches of each pass
        for name, member in self.by_name.items():
            if not member.taps:
                continue
            key = member.shown or self.prepared_by[name]
            if key not in keys:
                keys.append(key)
                taps.append(())
                self.shown_by.append(self.prepared_by[name])
            number = keys.index(key)
            self.pass_of[name] = number
            taps[number] = tuple(dict.fromkeys((*taps[number], *member.taps)))
        self.pass_taps = tuple(taps)
        self.taps = tuple(dict.fromkeys(tap for each in taps for tap in each))

    @property
    def student(self) -> MaskedViT:
        """The first member's student: all have its image size, patches and channels."""
        return next(iter(self.by_name.values())).student

    def members(self) -> dict[str, Objective]:
        return self.by_name

    def in_passes(self, teacher):
        return TeacherPasses(teacher, self.pass_taps) if self.taps else teacher

    def prepare(self, batch: Batch, normalize: nn.Module) -> FamilyBatch:
        prepared: dict[str, PatchBatch] = {}
        for name, member in self.by_name.items():
            if self.prepared_by[name] == name:
                prepared[name] = member.prepare(_first_views(batch, len(member.views)), normalize)
        of_members = {name: prepared[by] for name, by in self.prepared_by.items()}
        passes = tuple(prepared[name] for name in self.shown_by)
        first = passes[0] if passes else next(iter(of_members.values()))
        return FamilyBatch(
            visible=first.visible,
            masked=first.masked,
            ids_keep=first.ids_keep,
            ids_masked=first.ids_masked,
            of_members=of_members,
            passes=passes,
        )

    def inputs_of(
        self, batch: FamilyBatch, features: dict[str, Tensor]
    ) -> dict[str, tuple[PatchBatch, dict[str, Tensor]]]:
        return {
            name: (
                batch.of_members[name],
                {tap: features[pass_tap(self.pass_of[name], tap)] for tap in member.taps},
            )
            for name, member in self.by_name.items()
        }

    def start_step(self, progress: Progress) -> None:
        for member in self.by_name.values():
            member.start_step(progress)

    def memory(self) -> dict[str, Tensor]:
        return _prefixed({name: member.memory() for name, member in self.by_name.items()})

    def forward(self, batch: FamilyBatch, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return {"loss": the sum, "small/loss", "small/pixel", ...}, scalars."""
        inputs = self.inputs_of(batch, features)
        return with_sum({name: member(*inputs[name]) for name, member in self.by_name.items()})

    def describe(self) -> str:
        return "; ".join(f"{name}: {member.describe()}" for name, member in self.by_name.items())

    def gradient_shares(self) -> dict[str, Tensor]:
        return _prefixed({name: member.gradient_shares() for name, member in self.by_name.items()})


def with_sum(losses: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the losses of all members under their names, and as "loss" the sum of theirs."""
    return {"loss": sum(parts["loss"] for parts in losses.values()), **_prefixed(losses)}


def _prefixed(of_members: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        f"{prefix_of(name)}{key}": value
        for name, values in of_members.items()
        for key, value in values.items()
    }


def _first_views(batch: Batch, num: int) -> Batch:
    """Return the batch with its first `num` views."""
    if len(batch.views) == num:
        return batch
    return dataclasses.replace(batch, more_views=batch.more_views[: num - 1])


def _check(members: dict[str, Objective]) -> None:
    """Raise UserError for members that need batches of different kinds, or what a family does not have."""
    first_name, first = next(iter(members.items()))
    longest = max((member.views for member in members.values()), key=len)
    for name, member in members.items():
        if member.ema is not None:
            raise UserError(
                f"{key_of(name, 'objective')} has an EMA teacher, which a family does not train; train this "
                "student by itself, or choose another objective"
            )
        layer = next(filter(_is_random, member.modules()), None)
        if layer is not None:
            raise UserError(
                f"{key_of(name, 'name')} has a {type(layer).__name__} that drops at random, by numbers that "
                "all students of a family would draw from; remove it, or train this student by itself"
            )
        mine, others = (
            (each.student.grid, each.student.patch_size, each.student.channels) for each in (member, first)
        )
        if mine != others:
            raise UserError(
                f"students.{name} sees {_patches(member.student)}, and students.{first_name} "
                f"{_patches(first.student)}; students of a family see the same patches: set img_size, "
                "patch_size and in_chans alike"
            )
        if longest[: len(member.views)] != member.views or member.rand_augment != first.rand_augment:
            raise UserError(
                f"{key_of(name, 'objective')} crops or changes images otherwise than the other students of "
                "the family; train this student by itself, or give all the same crops"
            )


def check_repeat(family: Family, repeat: int) -> None:
    """Raise UserError where members have different numbers of views of images that come again at once."""
    if repeat > 1 and len({len(member.views) for member in family.by_name.values()}) > 1:
        raise UserError(
            f"data.repeat {repeat} requires students of a family whose objectives have equally many views of "
            "an image; set data.repeat=1, or change objective.photometric"
        )


def _patches(student: MaskedViT) -> str:
    rows, columns = student.grid
    return f"{rows}x{columns} patches of {student.patch_size} px in {student.channels} channels"


def _is_random(module: nn.Module) -> bool:
    rate = 0.0
    if isinstance(module, nn.modules.dropout._DropoutNd):
        rate = module.p
    elif isinstance(module, DropPath):
        rate = module.drop_prob or 0.0
    elif isinstance(module, PatchDropout):
        rate = module.prob
    return rate > 0
