"""`adapt` against its formula in loops in float64: `features` plus a Gram anchor to the initial student."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from dmae_ds.objectives.adapt import gram_distance
from dmae_ds.objectives.ema import EmaModule, ema_features
from tests.objectives.small import GRID, build, config_for, make_batch, prepare

LENGTH, TEACHER_DIM, WEIGHT = GRID**2, 12, 1.5
TARGETS = [{"tap": "tokens", "student": "tokens"}]
FAMILIES = {"plain": "vit_tiny_patch16_224", "registers": "vit_small_patch16_dinov3"}
MASKS = {
    "whole": None,
    "drop": {"ratio": 0.75, "by": "drop"},
    "two passes": {"ratio": 0.5, "whole_pass": True, "every": 2},
}


def section(mask: dict | None = None, **more) -> dict:
    targets = list(TARGETS)
    if mask is not None and "whole_pass" in mask:
        targets.append({"name": "masked", "tap": "tokens", "student": "tokens", "where": "masked"})
    return {"name": "adapt", "anchor": WEIGHT, "targets": targets, "mask": mask, **more}


def gram_by_loops(now: torch.Tensor, first: torch.Tensor) -> float:
    """The anchor of patches [N, K, D] of both students, an image and a pair of patches at a time."""

    def cosine(one, other):
        dot = sum(a * b for a, b in zip(one, other, strict=True))
        return dot / math.sqrt(sum(a * a for a in one)) / math.sqrt(sum(b * b for b in other))

    total, count = 0.0, 0
    for mine, theirs in zip(now.tolist(), first.tolist(), strict=True):
        for i in range(len(mine)):
            for j in range(len(mine)):
                total += (cosine(mine[i], mine[j]) - cosine(theirs[i], theirs[j])) ** 2
                count += 1
    return total / count


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mask", MASKS)
def test_the_loss_is_that_of_features_and_the_anchors(family, mask):
    objective = build(section(MASKS[mask]), teacher=True, weights="unused", name=FAMILIES[family])
    anchor = EmaModule(objective)
    with torch.no_grad():
        for number, parameter in enumerate(objective.student.parameters()):
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            )
    batch = prepare(objective, make_batch(4))
    kept = batch.ids_keep.shape[1]
    features = {"tokens": torch.randn(4, 1 + kept, TEACHER_DIM, dtype=torch.float64)}
    anchored = ema_features(objective, anchor, batch, precision="fp32")
    assert not anchored["ema/patches"].requires_grad
    losses = objective(batch, {**features, **anchored})
    now = objective.student(batch.own, batch.ids_keep)[0][:, 1:].detach()
    first = anchor.student(batch.own, batch.ids_keep)[0][:, 1:].detach()
    assert now.shape == (4, kept, objective.student.embed_dim)
    expected = gram_by_loops(now, first)
    assert expected > 1e-4 and losses["anchor"].item() == pytest.approx(expected, rel=1e-9)
    parts = sum(losses[name] for name in losses if name not in ("loss", "anchor"))
    assert losses["loss"].item() == pytest.approx(parts.item() + WEIGHT * expected, rel=1e-9)


def test_the_anchor_pulls_at_nothing_at_first_and_its_gradient_is_that_of_differences():
    patches = torch.randn(2, 5, 3, dtype=torch.float64)
    assert gram_distance(patches, patches.clone()).item() == 0
    moved = (patches + 0.1 * torch.randn(patches.shape, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda tokens: gram_distance(tokens, patches), moved)
    assert gram_distance(3 * patches, patches).item() == pytest.approx(0, abs=1e-12)  # lengths are free
    with torch.autocast("cpu", torch.bfloat16):
        exact = gram_distance(moved.float(), patches.float()).item()
    assert exact == pytest.approx(gram_distance(moved, patches).item(), rel=1e-5)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, ["adapt", "student.weights"]),
        ({"mask": {"ratio": 0.5}}, ["mask.whole_pass"]),
        ({"anchor": 0}, ["anchor"]),
    ],
)
def test_what_has_no_anchor_is_refused(changes, words):
    weights = {} if not changes else {"weights": "unused"}
    with pytest.raises(ValidationError) as raised:
        config_for(section(**changes), teacher=True, **weights)
    assert all(word in str(raised.value) for word in words)
