"""DINO against its formulas in float64: networks, head, centre, pairs of views and EMA (reference.py)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dmae_ds.objectives.dino import move_centre, view_cross_entropy
from dmae_ds.objectives.needs import Progress, View
from tests.messages import refused
from tests.objectives import reference
from tests.objectives.small import (
    DEPTH,
    GRID,
    HEADS,
    PATCH,
    SIZE,
    Stepper,
    build,
    config_for,
    make_batch,
    prepare,
    weights_of,
)

LOCAL = 8  # px


def section(**keys) -> dict:
    small = {
        "num_prototypes": 6,
        "hidden_dim": 10,
        "bottleneck_dim": 5,
        "local_crops": 2,
        "local_size": LOCAL,
        "teacher_temperature_warmup_epochs": 1.5,
    }
    return {"name": "dino", **small, **keys}


def encode(state, image):
    """Return (CLS after the final norm, the residual stream after each block)."""
    tokens, after = reference.encode(
        state,
        image,
        list(range((image.shape[2] // PATCH) ** 2)),
        size=PATCH,
        heads=HEADS,
        depth=DEPTH,
        grid=GRID,
    )
    return tokens[0], after


def logits_of(weights, image):
    """Return one product with each prototype."""
    hidden = encode(reference.part(weights, "student"), image)[0][None]
    head = reference.part(weights, "head")
    for layer in ("layers.0", "layers.2", "layers.4"):
        hidden = reference.linear(hidden if layer == "layers.0" else reference.gelu(hidden), head, layer)
    row = hidden[0] / sum(value**2 for value in hidden[0]) ** 0.5
    return torch.stack(
        [
            sum(a * b for a, b in zip(row, prototype, strict=True)) / sum(b * b for b in prototype) ** 0.5
            for prototype in head["prototypes.weight"]
        ]
    )


def softmax(values):
    top = max(value.item() for value in values)
    exponentials = [torch.exp(value - top) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def reference_loss(weights, ema, batch, *, centre, temperature: float):
    """Return the loss (Eq. 3) and the EMA teacher's logits of all global crops, whose mean Eq. 4 takes."""
    total, seen, terms = 0.0, [], 0
    for number in range(len(batch.images)):
        student = [logits_of(weights, view[number]) for view in batch.views]
        with torch.no_grad():
            teacher = [logits_of(ema, view[number]) for view in batch.views[:2]]
        seen += teacher
        for t, target in enumerate(teacher):
            p = softmax((target - centre) / temperature)
            for v, guess in enumerate(student):
                if v != t:
                    q = softmax(guess / 0.1)
                    total, terms = total - sum(a * torch.log(b) for a, b in zip(p, q, strict=True)), terms + 1
    return total / terms, seen


def sizes(num_local: int) -> tuple[int, ...]:
    return (SIZE, SIZE) + (LOCAL,) * num_local


@pytest.mark.parametrize("num, num_local", [(3, 2), (1, 2), (2, 0), (2, 1)])
def test_the_loss_and_its_gradients_are_those_of_the_formula(num, num_local):
    keys = {"local_crops": num_local} if num_local else {"local_crops": 0, "local_size": 96}
    objective, ema, batch = (
        build(section(**keys)),
        build(section(**keys), seed=1),
        make_batch(num, sizes=sizes(num_local)),
    )
    ema.state = {name: tensor.double() for name, tensor in objective.ema_state().items()}
    ema.state["centre"] += torch.linspace(-0.1, 0.1, 6)
    objective.start_step(Progress(0, 30, 0.75, 3.0))  # half of the warm-up
    masked = prepare(objective, batch)
    with torch.no_grad():
        features = objective.ema_features(ema, masked)
    parts = objective(masked, features)
    weights = weights_of(objective)
    loss, _ = reference_loss(
        weights, weights_of(ema), batch, centre=torch.linspace(-0.1, 0.1, 6), temperature=0.055
    )
    assert (
        parts["loss"].item() == pytest.approx(loss.item(), rel=1e-7)
        and parts["cross_entropy"] == parts["loss"]
    )
    parts["loss"].backward()
    found = torch.autograd.grad(loss, list(weights.values()))
    for (name, parameter), gradient in zip(objective.named_parameters(), found, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-8, msg=name)


def test_the_loss_of_one_prototype_is_zero_and_a_view_is_paired_with_every_other():
    assert view_cross_entropy(torch.randn(4, 3, 1), torch.ones(2, 3, 1), temperature=0.1).item() == 0
    logits, targets = torch.randn(3, 1, 4).double(), torch.rand(2, 1, 4).double()
    logs = [torch.log(torch.stack(softmax(row[0] / 0.5))) for row in logits]
    pairs = [-(targets[t, 0] * logs[v]).sum().item() for t, v in ((0, 1), (0, 2), (1, 0), (1, 2))]
    assert view_cross_entropy(logits, targets, temperature=0.5).item() == pytest.approx(
        sum(pairs) / 4, rel=1e-12
    )


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_four_steps_through_the_builders_are_the_formulas_for_every_accumulation(
    micro_batches, rate=0.01, num_steps=4
):
    """The last layer is held for the first two steps; the temperature warms up over the first three."""
    objective = build(section(momentum=0.6))
    stepper = Stepper(objective, num_steps=num_steps, epochs=2.0, lr=rate)
    stepper.keeper.module.state = {
        name: tensor.double() for name, tensor in stepper.keeper.module.state.items()
    }
    weights = weights_of(objective)
    held = weights["head.prototypes.weight"].detach().clone()
    ema = {name: value.detach().clone() for name, value in weights.items()}
    adam, centre = (
        reference.AdamW(weights, betas=(0.9, 0.95), weight_decay=0.05),
        torch.zeros(6, dtype=torch.float64),
    )
    for step in range(num_steps):
        batches = [
            make_batch(2 // micro_batches, sizes=sizes(2), seed=10 * step + number)
            for number in range(micro_batches)
        ]
        temperature = 0.04 + 0.03 * min(1, 0.5 * step / 1.5)
        losses, seen = zip(
            *(
                reference_loss(weights, ema, batch, centre=centre, temperature=temperature)
                for batch in batches
            ),
            strict=True,
        )
        loss, seen = sum(losses) / micro_batches, list(itertools.chain(*seen))
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        rates = {name: 0.0 if step < 2 and name == "head.prototypes.weight" else rate for name in weights}
        adam.step(gradients, rates)
        weights = adam.weights = {
            name: value.detach().requires_grad_() for name, value in adam.weights.items()
        }
        m = 1 - 0.4 * (1 + math.cos(math.pi * step / num_steps)) / 2
        ema = {name: m * ema[name] + (1 - m) * value.detach() for name, value in weights.items()}
        centre = 0.9 * centre + 0.1 * sum(seen) / len(seen)  # Eq. 4
        assert stepper.step(step, batches) == pytest.approx(loss.item(), rel=1e-7)
        assert torch.equal(dict(objective.named_parameters())["head.prototypes.weight"].detach(), held) == (
            step < 2
        )
    for name, parameter in objective.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[name].detach(), rtol=1e-6, atol=1e-7, msg=name)
    for name, parameter in stepper.keeper.module.named_parameters():
        torch.testing.assert_close(parameter.detach(), ema[name], rtol=1e-6, atol=1e-7, msg=name)
    state = stepper.keeper.module.state
    move_centre(state, 0.9)  # as the next step will
    torch.testing.assert_close(state["centre"], centre, rtol=1e-7, atol=1e-9)
    assert centre.abs().max() > 0.01 and state["micro_batches"] == 0


def test_the_centre_does_not_move_without_logits():
    state = {"centre": torch.tensor([0.5]), "logits": torch.zeros(1), "micro_batches": torch.zeros(())}
    move_centre(state, 0.9)
    assert state["centre"].item() == 0.5


@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_with_distill_both_global_crops_imitate_the_teacher_s_blocks_whole(alpha):
    objective, batch = build(section(distill={"alpha": alpha}), teacher=True), make_batch(2, sizes=sizes(2))
    ema = build(section(distill={}), teacher=True, seed=1)
    ema.state = {name: tensor.double() for name, tensor in objective.ema_state().items()}
    assert objective.taps == ("block/6",) and objective.pairs == [(3, 6)]
    objective.start_step(Progress(0, 30, 3.0, 3.0))
    masked = prepare(objective, batch)
    assert (
        masked.masked.shape == (4, 0, PATCH, PATCH, 3)
        and masked.ids_keep.tolist() == [list(range(GRID**2))] * 4
    )
    target = torch.randn(4, 1 + GRID**2, 12, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        features = {"block/6": target, **objective.ema_features(ema, masked)}
    parts = objective(masked, features)
    weights = weights_of(objective)
    loss, _ = reference_loss(weights, weights_of(ema), batch, centre=torch.zeros(6), temperature=0.07)
    apart = []
    for row, (view, number) in enumerate((view, number) for view in (0, 1) for number in (0, 1)):
        tokens = encode(reference.part(weights, "student"), batch.views[view][number])[1][2]
        hidden = reference.gelu(reference.linear(tokens, reference.part(weights, "heads.0"), "0"))
        apart += (
            (reference.linear(hidden, reference.part(weights, "heads.0"), "2") - target[row])
            .abs()
            .flatten()
            .tolist()
        )
    align = sum(apart) / len(apart)  # Eq. 2
    assert parts["align/3-6"].item() == pytest.approx(align, rel=1e-6)
    assert parts["loss"].item() == pytest.approx(loss.item() + alpha * align, rel=1e-6)
    parts["loss"].backward()
    assert 0 < objective.gradient_shares()["share/3"] < 1


def test_views_are_two_large_and_several_small_crops():
    objective = build(section(local_crops=3))
    assert objective.views == (
        View(photometric="dino1"),
        View(photometric="dino2"),
        *[View(size=8, scale=(0.05, 0.25), photometric="dino_local")] * 3,
    )
    assert {view.photometric for view in build(section(photometric=False)).views} == {"none"}


def test_an_ema_teacher_with_equal_targets_for_all_images_has_no_spread():
    objective, batch = build(section()), make_batch(4, sizes=sizes(2))
    masked = prepare(objective, batch)
    for targets, expected in (
        (torch.full((2, 4, 6), 1 / 6), 0.0),
        (torch.eye(6)[0].expand(2, 4, -1), 0.0),
        (torch.eye(6)[:4].expand(2, -1, -1), 0.75),
    ):
        assert objective(masked, {"ema/targets": targets})["target/spread"].item() == pytest.approx(
            expected, abs=1e-6
        )


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"local_scale": [0.5, 0.2]}, ["local_scale", "[0.5, 0.2]", "1"]),
        ({"local_crops": 0}, ["local_size", "local_crops"]),
        ({"teacher_temperature": [0.04, 0.04]}, ["teacher_temperature", "[0.04, 0.04]", "warmup_epochs"]),
        ({"teacher_temperature_warmup_epochs": 0}, ["teacher_temperature", "warmup_epochs 0"]),
        (
            {"teacher_temperature_warmup_epochs": 101},
            ["objective.teacher_temperature_warmup_epochs", "101", "optim.epochs", "100"],
        ),
    ],
)
def test_options_without_effect_are_refused(keys, words):
    with pytest.raises(ValueError) as raised:
        config_for(section(**keys))
    assert not [word for word in words if word not in str(raised.value)]


def test_crops_of_part_of_a_patch_are_refused():
    with refused("objective.local_size", 10, "patch_size", 4):
        build(section(local_size=10))
