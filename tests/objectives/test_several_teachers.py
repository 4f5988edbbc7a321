"""`features` with several teachers: heads of each one's width, weights, and teacher dropping."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dmae_ds.config.features import FeaturesConfig
from dmae_ds.data.transforms import sample_rng
from dmae_ds.objectives.build import build_objective
from dmae_ds.objectives.teacher_drop import DROP_STREAM
from tests.messages import refused
from tests.objectives.small import GRID, build, config_for, make_batch, prepare
from tests.objectives.test_features import slow_distance, student_tokens

LENGTH = GRID**2
# Of other widths, one without CLS, one of another patch size; heads of every kind of distance.
TEACHERS = {
    "wide": {"embed_dim": 20, "weight": 2.0},
    "plain": {"name": "vit_base_patch16_siglip_224", "embed_dim": 12},
    "fine": {"embed_dim": 6, "img_size": 8, "patch_size": 2, "weight": 0.5},
}
TARGETS = [
    {"tap": "wide:cls", "student": "cls", "distance": "cosine", "weight": 3.0},
    {"tap": "wide:tokens", "distance": "smooth_l1", "beta": 0.5},
    {"tap": "plain:tokens", "distance": "l1", "head": "mlp2"},
    {"tap": "plain:pooled", "student": "mean", "distance": "kl", "temperature": 0.5},
    {"tap": "fine:block/3", "student": "block/2", "distance": "l2", "normalize": "l2", "where": "patches"},
]
WIDTHS, HAS_CLS = {"wide": 20, "plain": 12, "fine": 6}, {"wide": 1, "plain": 0, "fine": 1}


def section(**more) -> dict:
    return {"name": "features", "targets": TARGETS, **more}


def keyed_batch(num: int, first: int = 0):
    """Images with sample ids and epochs, which key the draws."""
    ids = torch.arange(num)
    batch = dataclasses.replace(make_batch(8), sample_ids=torch.arange(8) + 40, epochs=torch.arange(8) // 4)
    rows = ids + first
    return dataclasses.replace(
        batch,
        **{name: getattr(batch, name)[rows] for name in ("images", "noise", "sample_ids", "epochs")},
    )


def features_of(num: int = 8) -> dict[str, torch.Tensor]:
    """Random features of all teachers, [num, ...] float64."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for target in TARGETS:
        name, place = target["tap"].split(":")
        tokens = () if place in ("cls", "pooled") else (HAS_CLS[name] + LENGTH,)
        shape = (num, *tokens, WIDTHS[name])
        found[target["tap"]] = torch.randn(shape, generator=generator, dtype=torch.float64)
    return found


def slow_terms(objective, batch, features) -> list[dict[str, torch.Tensor]]:
    """Distances of each image, {label: distance}, in loops."""
    images = []
    for image in range(len(batch.visible)):
        parts = {}
        for term in objective.terms:
            target = term.target
            block = int(target.student[6:]) if "/" in target.student else None
            tokens = student_tokens(objective, batch.visible[image], batch.ids_keep[image], None, block)
            wanted = features[target.tap][image]
            if target.is_vector:
                rows, wanted = [tokens[0] if target.student == "cls" else tokens[1:].mean(0)], [wanted]
            else:
                without_cls = target.where == "patches" or not HAS_CLS[target.teacher]
                rows, wanted = list(tokens[without_cls:]), list(wanted[-(LENGTH + 1 - without_cls) :])
            total, count = slow_distance(target, [term.head(row) for row in rows], wanted)
            parts[target.label] = total / count
        images.append(parts)
    return images


@pytest.mark.parametrize("drop", [0.0, 0.6])
def test_the_loss_is_the_formula(drop):
    objective = build(section(teacher_drop=drop), teachers=TEACHERS)
    assert {term.target.tap: term.head[-1].out_features for term in objective.terms} == {
        target["tap"]: WIDTHS[target["tap"].split(":")[0]] for target in TARGETS
    }
    batch, features = prepare(objective, keyed_batch(8)), features_of()
    losses = objective(batch, features)
    images, total, kept = slow_terms(objective, batch, features), 0.0, dict.fromkeys(TEACHERS, 0)
    weights = {name: numbers.get("weight", 1.0) for name, numbers in TEACHERS.items()}
    names = sorted(TEACHERS)
    for image, parts in enumerate(images):
        of_teacher = {
            name: sum(
                weights[name] * term.target.weight * parts[term.target.label]
                for term in objective.terms
                if term.target.teacher == name
            )
            for name in names
        }
        draws = sample_rng(objective.drop_seed, image // 4, 40 + image, DROP_STREAM).random(3)
        worst = max(names, key=lambda name: of_teacher[name].item())
        stay = [name for name, draw in zip(names, draws, strict=True) if draw >= drop or name == worst]
        scale = sum(weights.values()) / sum(weights[name] for name in stay)
        total = total + scale * sum(of_teacher[name] for name in stay) / len(images)
        for name in stay:
            kept[name] += 1
    torch.testing.assert_close(losses["loss"], total, rtol=1e-9, atol=0)
    for label in images[0]:
        mean = sum(parts[label] for parts in images) / len(images)
        torch.testing.assert_close(losses[label], mean.detach(), rtol=1e-9, atol=0)
    if drop:  # some are dropped, and none always
        assert all(kept[name] > 0 for name in names) and sum(kept.values()) < 3 * len(images)
        assert {name: round(losses[f"kept/{name}"].item() * 8) for name in names} == kept
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(losses["loss"], parameters, allow_unused=True)
    for one, other in zip(found, torch.autograd.grad(total, parameters, allow_unused=True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-12)


def test_dropping_is_the_same_for_images_in_other_batches_and_changes_no_initial_weight():
    objective = build(section(teacher_drop=0.5), teachers=TEACHERS)
    features = features_of()
    whole = objective(prepare(objective, keyed_batch(8)), features)["loss"]
    halves = [
        objective(
            prepare(objective, keyed_batch(4, first)),
            {tap: tensor[first : first + 4] for tap, tensor in features.items()},
        )["loss"]
        for first in (0, 4)
    ]
    torch.testing.assert_close(sum(halves) / 2, whole, rtol=1e-12, atol=0)
    without, with_drops = (
        build_objective(config_for(section(teacher_drop=drop), teachers=TEACHERS))[0].state_dict()
        for drop in (0.0, 0.5)
    )
    assert without.keys() == with_drops.keys()
    assert all(torch.equal(without[name], with_drops[name]) for name in without)


@pytest.mark.parametrize(
    "teachers, more, words",
    [
        ({"fine": {"img_size": 32}}, {}, ["teachers.fine", "16x16", "4x4", "teachers.fine.img_size=8"]),
        ({"wide": {"name": "vit_base_patch16_siglip_224"}}, {}, ["'cls'", "teachers.wide.name", "pooled"]),
        ({"fine": {"depth": 2}}, {}, ["block/3", "teachers.fine", "block/2"]),
        ({"fine": {"decoder_depth": 2}}, {}, ["teachers.fine.decoder_depth"]),
        ({"wide": {"sees": "superset", "mask_ratio": 0.5}}, {}, ["teachers.wide.sees"]),
        ({"idle": {}}, {}, ["teachers.idle"]),
    ],
)
def test_a_teacher_that_does_not_fit_is_named(teachers, more, words):
    changed = {name: {**TEACHERS.get(name, {}), **numbers} for name, numbers in teachers.items()}
    with refused(*words):
        build_objective(config_for(section(**more), teachers={**TEACHERS, **changed}), device="meta")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"targets": TARGETS[:2]}, ["teacher_drop", "several teachers"]),
        (
            {
                "mask": {"every": 2, "whole_pass": True},
                "targets": [*TARGETS, {"tap": "fine:tokens", "where": "masked"}],
            },
            ["teacher_drop", "mask.every 2", "objective.mask.every=1"],
        ),
    ],
)
def test_dropping_requires_all_losses_of_several_teachers(changes, words):
    with pytest.raises(ValueError) as error:
        FeaturesConfig(**{**section(teacher_drop=0.5), **changes})
    assert all(word in str(error.value) for word in words)


def test_cls_goes_through_a_head_of_its_own_teacher():
    targets = [
        {"name": "vector", "tap": "wide:cls", "student": "cls"},
        {"tap": "fine:tokens", "cls_head": "vector"},
    ]
    with pytest.raises(ValueError) as error:
        FeaturesConfig(name="features", targets=targets)
    assert all(word in str(error.value) for word in ("cls_head vector", "fine:tokens"))
