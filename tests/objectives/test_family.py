"""A family of objectives: each member gets its own patches and features, and loses nothing of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from dmae_ds.bench.random_batch import random_batch
from dmae_ds.bench.random_teacher import random_teacher, random_teacher_view, random_top
from dmae_ds.config.family import members_of
from dmae_ds.config.networks import StudentConfig
from dmae_ds.config.run import RunConfig
from dmae_ds.models.patches import Normalize
from dmae_ds.objectives.build import build_objective
from dmae_ds.objectives.dmae import Dmae
from dmae_ds.objectives.family import Family, check_repeat
from dmae_ds.objectives.masked import MaskedObjective
from dmae_ds.objectives.needs import Progress
from dmae_ds.teacher.build import seen_patches
from dmae_ds.teacher.frozen import FrozenTeacher
from tests.messages import refused
from tests.objectives.reference import MEAN, STD
from tests.objectives.small import DECODER, config_for

DMAE = {"name": "dmae", "decoder": DECODER}
WHOLE = {"name": "features", "photometric": "jitter", "targets": [{"tap": "tokens"}, {"tap": "block/6"}]}
HALF = {"name": "features", "mask": {"by": "drop", "ratio": 0.75}, "targets": [{"tap": "block/7"}]}


def family_config(*, sees: str = "visible", **objectives: dict) -> RunConfig:
    """The recipe of a family of small students, each with its objective."""
    one = config_for(DMAE, teacher={"sees": sees})
    students = {
        name: {**one.student.model_dump(exclude_unset=True), "objective": objective}
        for name, objective in objectives.items()
    }
    values = one.model_dump(mode="json", exclude_unset=True)
    return RunConfig.model_validate({**values, "student": None, "objective": None, "students": students})


def build(config: RunConfig):
    return build_objective(config)[0]


def teacher_of(config: RunConfig, objective) -> FrozenTeacher:
    device = torch.device("cpu")
    vit = random_teacher(config, 8, None, device=device, sleep_ms=None)
    return FrozenTeacher(
        vit,
        objective.taps,
        None,
        view=random_teacher_view(config, device),
        sees=seen_patches(config.teacher, vit.num_patches),
        top=random_top(config, objective, device=device),
    )


@pytest.mark.parametrize("sees", ["visible", "all"])
def test_every_member_gets_the_features_and_gradients_that_it_would_get_alone(sees):
    mae = {"name": "mae", "decoder": DECODER}
    config = family_config(sees=sees, whole=WHOLE, dmae=DMAE, half=HALF, again=DMAE, mae=mae)
    family, normalize = build(config), Normalize(MEAN, STD)
    # Half of the patches are those of dmae, whatever the section says; whole images are not.
    assert family.pass_of == {"whole": 0, "dmae": 1, "half": 1, "again": 1}
    assert family.pass_taps == (("tokens", "block/6"), ("block/6", "block/7"))
    teacher = family.in_passes(teacher_of(config, family))
    assert [one.last_run for one in teacher.passes] == [8, 7]  # what another pass needs is not computed
    batch = random_batch(family, 4, torch.Generator().manual_seed(0))
    assert len(batch.views) == 2
    prepared = family.prepare(batch, normalize)
    assert prepared.of_members["again"] is prepared.of_members["dmae"]
    ((_, given, features),) = teacher.stream([("source", prepared)])
    assert given is prepared and features.keys() == teacher.features(prepared).keys()
    family.start_step(Progress(0, 1, 0.0, 1.0))
    losses = family(prepared, features)
    losses["loss"].backward()
    assert losses["loss"] == sum(losses[f"{name}/loss"] for name in config.students)
    for name, alone_config in members_of(config).items():
        alone = build(alone_config)
        mine = alone.prepare(replace(batch, more_views=batch.more_views[: len(alone.views) - 1]), normalize)
        wanted = {} if alone_config.teacher is None else teacher_of(alone_config, alone).features(mine)
        alone.start_step(Progress(0, 1, 0.0, 1.0))
        parts = alone(mine, wanted)
        parts["loss"].backward()
        assert all(torch.equal(losses[f"{name}/{part}"], value) for part, value in parts.items()), name
        trained = dict(family.by_name[name].named_parameters())
        assert trained.keys() == dict(alone.named_parameters()).keys()
        assert all(torch.equal(trained[key].grad, one.grad) for key, one in alone.named_parameters()), name
        shares = alone.gradient_shares()
        assert all(torch.equal(family.gradient_shares()[f"{name}/{key}"], shares[key]) for key in shares)


class OtherPatches(Dmae):
    """An own objective whose patches nobody knows."""

    def prepare(self, batch, normalize):
        return super().prepare(batch, normalize)


def test_a_pass_is_shared_only_where_that_is_declared():
    config = family_config(one=DMAE, two={**DMAE, "mask_ratio": 0.5}, three={**DMAE, "alpha": 2.0})
    assert build(config).pass_of == {"one": 0, "two": 1, "three": 0}
    members = {name: build(one) for name, one in members_of(config).items()}
    sections = {name: one.objective for name, one in members_of(config).items()}
    members["three"].__class__ = OtherPatches
    assert members["three"].shown is None
    assert Family(members, sections).pass_of == {"one": 0, "two": 1, "three": 2}
    members["one"].__class__ = OtherPatches
    equal = {**sections, "three": sections["one"]}
    assert Family(members, equal).pass_of == {"one": 0, "two": 1, "three": 0}
    assert MaskedObjective.shown.fget(members["two"]) == ("random", 8)


def test_members_that_cannot_share_batches_are_refused():
    with refused("students.b", "students.a", "patch_size"):
        config = family_config(a=DMAE, b={"name": "mae", "decoder": DECODER})
        students = {**config.students, "b": config.students["b"].model_copy(update={"patch_size": 8})}
        build(config.model_copy(update={"students": students}))
    with refused("students.b.objective", "EMA"):
        build(family_config(a=DMAE, b={"name": "sdae", "decoder": DECODER}))
    with refused("students.b", "objective.pairs", "9"):
        build(family_config(a=DMAE, b={**DMAE, "pairs": [[9, 1]]}))
    config = family_config(a=DMAE, b=WHOLE)
    family = build(config)
    check_repeat(family, 1)
    with refused("data.repeat", 4):
        check_repeat(family, 4)
    sections = {name: one.objective for name, one in members_of(config).items()}
    for layer in (nn.Dropout(0.1), DropPath(0.1)):
        family.by_name["b"].student.blocks[0].drop = layer
        with refused("students.b.name", type(layer).__name__):
            Family(family.by_name, sections)
    family.by_name["b"].student.blocks[0].drop = nn.Dropout(0.0)
    Family(family.by_name, sections)
    family.by_name["a"].views = (*family.views[::-1],)
    with refused("students."):
        Family(family.by_name, sections)
    assert isinstance(config.students["a"], StudentConfig)
