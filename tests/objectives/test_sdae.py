"""SdAE against its formulas in float64: networks, folds, cosine and EMA written out (reference.py)."""

from __future__ import annotations

import math

import pytest
import torch

from dmae_ds.config.load import load_config
from dmae_ds.config.objectives import SdaeConfig
from dmae_ds.objectives.needs import Progress
from dmae_ds.objectives.sdae import cosine_distance, cut, standardize_tokens
from dmae_ds.objectives.spread import spread
from dmae_ds.plan.geometry import measure
from tests.messages import refused
from tests.objectives import reference
from tests.objectives.small import (
    DECODER,
    DEPTH,
    GRID,
    HEADS,
    PATCH,
    Stepper,
    build,
    config_for,
    make_batch,
    prepare,
    weights_of,
)


def section(**keys) -> dict:
    return {"name": "sdae", "decoder": DECODER, **keys}


def encode(state, image, places):
    return reference.encode(state, image, places, size=PATCH, heads=HEADS, depth=DEPTH, grid=GRID)[0]


def reference_loss(weights, ema, batch, *, visible: int, sees: str, folds: int, size: int, over: str):
    """Return the loss (Sec. 2, Eq. 3, Eq. 4), image by image.

    weights, ema: of the objective, and of its EMA teacher
    """
    apart = []
    for image, noise in zip(batch.images, batch.noise.tolist(), strict=True):
        order = sorted(range(len(noise)), key=noise.__getitem__)
        keep, masked = order[:visible], order[visible:]
        latent = encode(reference.part(weights, "student"), image, keep)
        predicted = reference.decode(
            reference.part(weights, "decoder"),
            latent,
            keep,
            heads=DECODER["num_heads"],
            depth=DECODER["depth"],
            grid=GRID,
        )
        for fold in range(folds):
            places = masked[fold * size : (fold + 1) * size]
            with torch.no_grad():
                if sees == "all":
                    whole = encode(reference.part(ema, "student"), image, order)
                    tokens = [whole[1 + order.index(place)] for place in places]
                else:
                    tokens = list(encode(reference.part(ema, "student"), image, places)[1:])
            targets = []
            for token in tokens:
                mean = sum(token) / len(token)
                variance = sum((value - mean) ** 2 for value in token) / (len(token) - 1)
                targets.append([(value - mean) / math.sqrt(variance + 1e-6) for value in token])
            guesses = [predicted[place] for place in places]
            pairs = zip(guesses, targets, strict=True)
            if over == "tokens":
                pairs = (
                    ([guess[c] for guess in guesses], [target[c] for target in targets])
                    for c in range(len(targets[0]))
                )
            for guess, target in pairs:
                product = sum(a * b for a, b in zip(guess, target, strict=True))
                apart.append(
                    1 - product / (sum(a * a for a in guess) ** 0.5 * sum(b * b for b in target) ** 0.5)
                )
    return sum(apart) / len(apart)


CASES = {
    "paper": ({}, dict(visible=4, sees="folds", folds=3, size=4, over="channels"), 3),
    "published code": (
        {"cosine_over": "tokens"},
        dict(visible=4, sees="folds", folds=3, size=4, over="tokens"),
        3,
    ),
    "folds that don't divide": (
        {"folds": 5},
        dict(visible=4, sees="folds", folds=5, size=2, over="channels"),
        2,
    ),
    "folds that don't divide, over tokens": (
        {"folds": 5, "cosine_over": "tokens"},
        dict(visible=4, sees="folds", folds=5, size=2, over="tokens"),
        2,
    ),
    "a fold a patch": ({"folds": 12}, dict(visible=4, sees="folds", folds=12, size=1, over="channels"), 1),
    "masked": (
        {"teacher_sees": "masked"},
        dict(visible=4, sees="masked", folds=1, size=12, over="channels"),
        2,
    ),
    "the whole image": (
        {"teacher_sees": "all"},
        dict(visible=4, sees="all", folds=1, size=12, over="channels"),
        2,
    ),
    "the whole image, over tokens": (
        {"teacher_sees": "all", "cosine_over": "tokens"},
        dict(visible=4, sees="all", folds=1, size=12, over="tokens"),
        2,
    ),
    "a crop": ({"teacher_sees": "crop"}, dict(visible=4, sees="crop", folds=1, size=4, over="channels"), 2),
    "one masked patch": (
        {"teacher_sees": "masked", "mask_ratio": 0.06},
        dict(visible=15, sees="masked", folds=1, size=1, over="channels"),
        1,
    ),
    "one visible patch": (
        {"mask_ratio": 0.94, "folds": 4},
        dict(visible=1, sees="folds", folds=4, size=3, over="channels"),
        1,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_loss_and_its_gradients_are_those_of_the_formula(case):
    keys, expected, num = CASES[case]
    objective, batch = build(section(**keys)), make_batch(num)
    ema = build(section(**keys), seed=1)
    masked = prepare(objective, batch)
    sees, folds, size = (expected[name] for name in ("sees", "folds", "size"))
    shown = {"folds": f"{folds} folds of {size}", "all": "whole image"}.get(sees, str(size))
    assert all(words in objective.describe() for words in (shown, expected["over"]))
    with torch.no_grad():
        features = objective.ema_features(ema, masked)
    parts = objective(masked, features)
    weights = weights_of(objective)
    loss = reference_loss(weights, weights_of(ema), batch, **expected)
    assert parts["loss"].item() == pytest.approx(loss.item(), rel=1e-10) and parts["cosine"] == parts["loss"]
    parts["loss"].backward()
    found = torch.autograd.grad(loss, list(weights.values()))
    for (name, parameter), gradient in zip(objective.named_parameters(), found, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-10, msg=name)


def test_three_steps_through_the_builders_are_the_formulas(rate=0.01, num_steps=3):
    keys, expected, _ = CASES["paper"]
    objective = build(section(**keys, momentum_every="step", momentum=[0.5, 0.9]))
    stepper = Stepper(objective, num_steps=num_steps, epochs=2.0, lr=rate)
    weights = weights_of(objective)
    ema = {name: value.detach().clone() for name, value in weights.items()}
    adam = reference.AdamW(weights, betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(num_steps):
        batch = make_batch(2, seed=step)
        loss = reference_loss(weights, ema, batch, **expected)
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        adam.step(gradients, dict.fromkeys(weights, rate))
        weights = adam.weights = {
            name: value.detach().requires_grad_() for name, value in adam.weights.items()
        }
        eta = 0.9 + (0.5 - 0.9) * (1 + math.cos(math.pi * step / num_steps)) / 2
        ema = {name: eta * ema[name] + (1 - eta) * value.detach() for name, value in weights.items()}  # Eq. 7
        assert stepper.step(step, [batch]) == pytest.approx(loss.item(), rel=1e-9)
    for name, parameter in objective.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[name].detach(), rtol=1e-7, atol=1e-9, msg=name)
    for name, parameter in stepper.keeper.module.named_parameters():
        torch.testing.assert_close(parameter.detach(), ema[name], rtol=1e-7, atol=1e-9, msg=name)
    assert not torch.equal(ema["student.blocks.0.mlp.fc1.weight"], weights["student.blocks.0.mlp.fc1.weight"])


def test_the_momentum_moves_from_the_first_to_the_last_number_once_an_epoch_or_once_a_step():
    by_epoch, by_step = build(section()), build(section(momentum_every="step"))
    at = [Progress(step, 40, step / 10, 4.0) for step in range(40)]
    expected = [0.99 - 0.03 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert [by_epoch.ema.momentum(progress) for progress in at] == pytest.approx(
        [expected[step // 10] for step in range(40)]
    )
    assert [by_step.ema.momentum(progress) for progress in at[::10]] == pytest.approx(expected)
    assert by_step.ema.momentum(at[5]) > by_step.ema.momentum(at[4]) and (
        by_epoch.ema.every,
        by_step.ema.every,
    ) == ("epoch", "step")


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"folds": 13}, ["objective.folds", 13, 12, "objective.mask_ratio"]),
        ({"mask_ratio": 0.06}, ["objective.folds", 3, 1, "objective.mask_ratio", 0.06]),
        ({"folds": 12, "cosine_over": "tokens"}, ["objective.cosine_over", "tokens", "channels"]),
        (
            {"mask_ratio": 0.06, "teacher_sees": "masked", "cosine_over": "tokens"},
            ["objective.cosine_over", "tokens", "channels"],
        ),
    ],
)
def test_folds_that_are_too_many_or_too_small_are_refused(keys, words):
    with refused(*words):
        build(section(**keys))


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"folds": 3, "teacher_sees": "all"}, ["folds", "teacher_sees", "all"]),
        ({"crop_ratio": 0.5}, ["crop_ratio", "teacher_sees", "folds", "crop"]),
        ({"norm_pix": True}, ["norm_pix"]),
    ],
)
def test_options_without_effect_are_refused(keys, words):
    with pytest.raises(ValueError) as raised:
        config_for(section(**keys))
    assert not [word for word in words if word not in str(raised.value)]


def test_the_published_masks_are_cut_as_in_the_paper():
    def cut_of(**keys):
        return cut(SdaeConfig(name="sdae", **keys), 147)

    assert [
        cut_of(),
        cut_of(folds=2),
        cut_of(folds=4),
        cut_of(teacher_sees="crop"),
        cut_of(teacher_sees="masked"),
    ] == [(3, 49), (2, 73), (4, 36), (1, 49), (1, 147)]


def test_equal_tokens_have_no_spread_and_a_finite_loss():
    alike = standardize_tokens(torch.ones(2, 3, 5))
    assert alike.abs().max() == 0 and torch.isfinite(
        cosine_distance(torch.randn(2, 3, 5), alike, over="channels", fold_size=3)
    )
    assert (
        spread(torch.randn(1, 5).expand(6, -1)).item() == pytest.approx(0, abs=1e-6)
        and spread(torch.zeros(6, 5)).item() == 1
    )
    assert spread(torch.eye(4)).item() == pytest.approx(3 / 4)


@pytest.mark.slow
def test_the_less_the_ema_teacher_sees_at_once_the_less_a_step_computes():
    """A crop is cheapest, then three folds, all masked patches, and the whole image, as in Table 1.

    The times there are 1.12, 1.28, 1.38 and 1.50 of MAE's.
    """

    def flops(recipe: str, *overrides: str) -> int:
        geometry = measure(load_config(recipe, list(overrides)), 1)
        return (
            geometry.student.forward_flops
            + geometry.student.backward_flops
            + (0 if geometry.ema is None else geometry.ema.flops)
        )

    costs = [
        flops("mae_vit_base"),
        *(
            flops("sdae_vit_base", f"objective.teacher_sees={sees}")
            for sees in ("crop", "folds", "masked", "all")
        ),
    ]
    assert costs == sorted(costs) and len(set(costs)) == 5
    assert [cost / costs[0] for cost in costs[1:]] == pytest.approx([1.15, 1.44, 1.45, 1.60], abs=0.01)
