"""`features` against its formulas in loops in float64: distances, places, masks, the queue and refusals."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from dmae_ds.config.load import load_config
from dmae_ds.data.batch import Batch
from dmae_ds.distributed import collectives
from dmae_ds.models.patches import Normalize
from dmae_ds.objectives.build import build_objective
from dmae_ds.objectives.feature_mask import draw_mask, num_masked
from dmae_ds.objectives.feature_queue import FeatureQueue
from dmae_ds.objectives.needs import Progress
from tests.messages import refused
from tests.objectives.small import DEPTH, DIM, GRID, build, config_for, make_batch, prepare

LENGTH, TEACHER_DIM = GRID**2, 12
TOKENS = {"tap": "tokens", "student": "tokens"}
CLS = {"name": "cls", "tap": "cls", "student": "cls"}
# {name: (targets, mask)}; together every distance, head, place and way of masking
CASES = {
    "l1": ([{**TOKENS, "distance": "l1", "head": "mlp2"}], None),
    "cosine": ([{**TOKENS, "distance": "cosine", "where": "patches"}], None),
    "l2 of unit vectors": ([{**TOKENS, "distance": "l2", "normalize": "l2", "head": "norm_linear"}], None),
    "blocks": ([{"tap": "block/5", "student": "block/2"}, {**CLS, "weight": 0.5}], None),
    "last block": ([{"tap": "tokens", "student": f"block/{DEPTH}", "distance": "smooth_l1"}], None),
    "mean": ([{"tap": "cls", "student": "mean", "distance": "kl", "temperature": 2.0}], None),
    "one head for CLS": ([{**TOKENS, "cls_head": "cls"}, {**CLS, "weight": 3.0}], None),
    "masked": (
        [{**TOKENS, "where": "masked", "distance": "smooth_l1", "beta": 2.0, "normalize": "standard"}],
        {"ratio": 0.4, "shape": "block"},
    ),
    "visible": ([{**TOKENS, "where": "visible"}], {"ratio": 0.6}),
    "drop": ([{**TOKENS, "distance": "l1"}], {"ratio": 0.75, "by": "drop"}),
    "similarities": (
        [{**TOKENS, "where": "patches", "distance": "kl", "over": "patches", "normalize": "l2"}],
        None,
    ),
    "two passes": (
        [CLS, {**TOKENS, "where": "masked", "weight": 2.0}],
        {"ratio": 0.5, "whole_pass": True, "every": 2},
    ),
}


def section(targets: list[dict], mask: dict | None, **more) -> dict:
    return {"name": "features", "targets": targets, "mask": mask, **more}


def teacher_features(num: int, kept: Tensor) -> dict[str, Tensor]:
    """Random features of whole images, and of the patches that the student sees."""
    generator = torch.Generator().manual_seed(5)
    whole = {
        tap: torch.randn(num, 1 + LENGTH, TEACHER_DIM, generator=generator, dtype=torch.float64)
        for tap in ("tokens", "block/5")
    }
    rows = torch.cat([torch.zeros_like(kept[:, :1]), 1 + kept], dim=1)
    features = {
        tap: torch.stack([one[row] for one, row in zip(t, rows, strict=True)]) for tap, t in whole.items()
    }
    return {**features, "cls": whole["tokens"][:, 0]}


def student_tokens(
    objective, pixels: Tensor, ids: Tensor, masked: Tensor | None, block: int | None
) -> Tensor:
    """The student's tokens of one image by its own modules: [1 + K, D]."""
    student = objective.student
    patches = student.patch_embed.proj(pixels[None])[0]
    if masked is not None:
        patches = torch.stack(
            [objective.mask_token.token if flag else one for one, flag in zip(patches, masked, strict=True)]
        )
    patches = patches + student.pos_embed[0, 1:][ids]
    tokens = torch.cat([student.cls_token[0] + student.pos_embed[0, :1], patches])[None]
    for module in student.blocks[:block]:
        tokens = module(tokens)
    return (student.norm(tokens) if block is None else tokens)[0]


def slow_distance(target, predicted: list[Tensor], wanted: list[Tensor]) -> Tensor:
    """The distance of vectors of one image, in loops: (sum, number of entries it is a mean over)."""
    if target.normalize == "l2":
        predicted, wanted = ([row / row.norm() for row in rows] for rows in (predicted, wanted))
    if target.normalize == "standard":
        wanted = [(row - row.mean()) / (row.var(unbiased=True) + 1e-6).sqrt() for row in wanted]
    temperature = target.temperature or 0.07
    total, count = 0.0, 0
    for p, w in zip(predicted, wanted, strict=True):
        if target.distance == "kl":
            if target.over == "patches":
                p, w = (
                    torch.stack([row @ other for other in rows])
                    for row, rows in ((p, predicted), (w, wanted))
                )
            p, w = torch.softmax(p / temperature, 0), torch.softmax(w / temperature, 0)
            total, count = total + sum(b * (b.log() - a.log()) for a, b in zip(p, w, strict=True)), count + 1
        elif target.distance == "cosine":
            total, count = total + 1 - (p @ w) / (p.norm() * w.norm()), count + 1
        else:
            for a, b in zip(p, w, strict=True):
                gap, beta = (a - b).abs(), target.beta or 1.0
                small = gap**2 / (2 * beta) if gap < beta else gap - beta / 2
                total = total + {"l1": gap, "l2": gap**2, "smooth_l1": small}[target.distance]
                count += 1
    return total, count


def slow_loss(objective, batch, features: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss and its parts, image by image."""
    config, parts = objective.config, {}
    for term in objective.terms:
        target, total, count = term.target, 0.0, 0
        with_mask = config.mask is not None and config.mask.by == "tokens"
        in_masked_pass = with_mask and (not config.mask.whole_pass or target.where in ("masked", "visible"))
        every = config.mask.every if in_masked_pass else 1
        block = int(target.student[6:]) if "/" in target.student else None
        for row, image in enumerate(range(0, len(batch.visible), every)):
            ids, masked = batch.ids_keep[image], None
            if in_masked_pass:
                masked = torch.tensor([place in batch.places[row].tolist() for place in range(LENGTH)])
            tokens = student_tokens(objective, batch.visible[image], ids, masked, block)
            if target.is_vector:
                vector = tokens[0] if target.student == "cls" else tokens[1:].mean(0)
                predicted, wanted = [term.head(vector)], [features[target.tap][image]]
            else:
                head_of_cls = term.head
                for other in objective.terms:
                    if other.target.label == target.cls_head:
                        head_of_cls = other.head
                rows = range(1, len(tokens)) if target.where != "all" else range(len(tokens))
                if target.where in ("masked", "visible"):
                    rows = [1 + n for n in range(LENGTH) if bool(masked[n]) == (target.where == "masked")]
                predicted = [(term.head if n else head_of_cls)(tokens[n]) for n in rows]
                wanted = [features[target.tap][image][n] for n in rows]
            more, entries = slow_distance(target, predicted, wanted)
            total, count = total + more, count + entries
        parts[target.label] = total / count
    loss = sum(term.target.weight * parts[term.target.label] for term in objective.terms)
    return {"loss": loss, **parts}


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_the_formula(name):
    targets, mask = CASES[name]
    objective = build(section(targets, mask), teacher=True)
    batch = prepare(objective, make_batch(4))
    features = teacher_features(4, batch.ids_keep)
    losses, expected = objective(batch, features), slow_loss(objective, batch, features)
    assert losses.keys() == expected.keys()
    for part, value in expected.items():
        torch.testing.assert_close(losses[part].detach(), value.detach(), rtol=1e-9, atol=0)
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(losses["loss"], parameters, allow_unused=True)
    slow = torch.autograd.grad(expected["loss"], parameters, allow_unused=True)
    for one, other in zip(found, slow, strict=True):
        assert one is not None and other is not None  # every parameter is trained
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-12)


def test_a_queue_of_past_targets_is_compared_and_moves_on():
    target = {**CLS, "distance": "kl", "over": "queue", "normalize": "l2"}
    objective = build(section([target], None), teacher=True)
    assert len(objective.terms[0].queue.rows) == 8192
    objective.terms[0].queue = FeatureQueue(6, TEACHER_DIM, torch.Generator().manual_seed(0)).double()
    (rows,) = objective.memory().values()
    assert rows.shape == (6, TEACHER_DIM) and "queue" not in " ".join(objective.state_dict())
    past, head = [row.clone() for row in rows], objective.terms[0].head
    for step in range(4):
        objective.start_step(Progress(step, 9, 0.0, 1.0))
        batch = prepare(objective, make_batch(4, seed=step))
        wanted = torch.randn(4, TEACHER_DIM, dtype=torch.float64)
        losses = objective(batch, {"cls": wanted})
        expected = 0.0
        units = [row / row.norm() for row in wanted]
        for image, unit in enumerate(units):
            tokens = student_tokens(objective, batch.visible[image], batch.ids_keep[image], None, None)
            vector = head(tokens[0])
            scores = [
                torch.stack([one @ row for row in past]) / 0.07 for one in (vector / vector.norm(), unit)
            ]
            p, w = (torch.softmax(score, 0) for score in scores)
            expected = expected + sum(b * (b.log() - a.log()) for a, b in zip(p, w, strict=True)) / 4
        torch.testing.assert_close(losses["cls"], expected.detach(), rtol=1e-8, atol=0)
        losses["loss"].backward()
        for place, unit in enumerate(units):
            past[(4 * step + place) % 6] = unit
        torch.testing.assert_close(objective.memory()["queue/cls"], torch.stack(past), rtol=1e-12, atol=0)
    # Evaluation compares with the queue, and leaves it as it is.
    before = objective.memory()["queue/cls"]
    objective.eval()
    objective(batch, {"cls": wanted})
    assert objective.memory()["queue/cls"] is before


@pytest.mark.parametrize("ranks, accumulation", [(1, 4), (2, 2), (4, 1)])
def test_the_queue_is_the_same_for_every_cut_of_the_batch(monkeypatch, ranks, accumulation):
    """Three steps of eight images, of which the queue holds eleven."""
    steps = torch.randn(3, 8, 5)
    expected = FeatureQueue(11, 5, torch.Generator().manual_seed(0))
    for number, rows in enumerate(steps):
        expected.start_step(Progress(number, 9, 0.0, 1.0))
        expected.push(rows)
    queue = FeatureQueue(11, 5, torch.Generator().manual_seed(0))
    monkeypatch.setattr(collectives, "world_size", lambda: ranks)
    for number, rows in enumerate(steps):
        queue.start_step(Progress(number, 9, 0.0, 1.0, accumulation=accumulation))
        before = queue.past().clone()
        pieces = rows.view(ranks, accumulation, -1, 5)
        for micro in range(accumulation):
            gathered = pieces[:, micro].flatten(0, 1)
            monkeypatch.setattr(collectives, "gather_rows", lambda mine, gathered=gathered: gathered)
            queue.push(pieces[0, micro])
            assert torch.equal(queue.past(), before)
    assert torch.equal(queue.rows, expected.rows)


@pytest.mark.parametrize("grid, masked", [((4, 4), 6), ((14, 14), 78), ((2, 7), 5)])
def test_blocks_are_rectangles_and_every_image_has_as_many_masked_patches(grid, masked):
    length = grid[0] * grid[1]
    noise = torch.rand(64, length, generator=torch.Generator().manual_seed(1))
    keep, places = draw_mask(noise, masked, shape="block", grid=grid)
    assert places.shape == (64, masked)
    everything = torch.cat([keep, places], dim=1).sort(dim=1).values
    assert torch.equal(everything, torch.arange(length).expand(64, -1))
    random = draw_mask(noise, masked, shape="random", grid=grid)[1]

    def touching(ids: Tensor) -> float:
        """Pairs of masked patches that are next to each other in a row, a mean over images."""
        flags = torch.zeros(64, length, dtype=torch.bool).scatter(1, ids, True).view(64, *grid)
        return (flags[:, :, 1:] & flags[:, :, :-1]).sum().item() / 64

    assert touching(places) > 1.2 * touching(random)
    alone, _ = draw_mask(noise[7:8], masked, shape="block", grid=grid)
    assert torch.equal(alone[0], keep[7])  # a mask depends on its own noise alone


def test_patches_of_a_changed_colour_are_the_students_alone():
    objective = build(section([TOKENS], None, photometric="jitter"), teacher=True)
    first, second = objective.views
    assert (second.copy_of, second.photometric) == (0, "jitter") and first.photometric == "none"
    batch = prepare(objective, make_batch(2, sizes=(16, 16)))
    assert not torch.equal(batch.own, batch.visible)
    features = teacher_features(2, batch.ids_keep)
    changed = objective(batch, features)["loss"]
    batch.own = batch.visible
    assert not torch.isclose(changed, objective(batch, features)["loss"])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"targets": []}, ["targets"]),
        ({"targets": [{"tap": "logits"}]}, ["tap", "'logits'", "pooled"]),
        ({"targets": [{**TOKENS, "student": "block/0"}]}, ["student", "'block/0'", "mean"]),
        ({"targets": [{"tap": "cls"}]}, ["tap cls", "student tokens"]),
        ({"targets": [TOKENS, TOKENS]}, ["tokens", "name"]),
        ({"targets": [{**TOKENS, "beta": 1.0}]}, ["beta", "smooth_l1", "l2"]),
        ({"targets": [{**TOKENS, "over": "queue", "distance": "kl"}]}, ["over=queue", "tokens"]),
        ({"targets": [{**TOKENS, "over": "patches", "distance": "kl"}]}, ["over=patches", "where all"]),
        ({"targets": [{**TOKENS, "cls_head": "token"}]}, ["cls_head token"]),
        ({"targets": [{**TOKENS, "where": "masked"}]}, ["where=masked", "objective.mask"]),
        ({"mask": {"every": 2}}, ["every 2", "whole_pass"]),
        ({"mask": {"by": "drop", "whole_pass": True}}, ["whole_pass", "by=tokens"]),
        ({"mask": {"whole_pass": True}}, ["whole_pass", "masked"]),
        (
            {"targets": [{**CLS, "distance": "kl", "over": "queue", "queue_size": 63}]},
            ["queue_size 63", "optim.global_batch 64"],
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, words):
    settings = {"targets": [TOKENS], **changes}
    with refused(*words):
        load_config("digits_features", [f"objective.{key}={json.dumps(settings[key])}" for key in settings])


@pytest.mark.parametrize(
    "targets, mask, words",
    [
        ([{"tap": "block/9", "student": "tokens"}], None, ["block/9", "block/8"]),
        ([{"tap": "block/5", "student": "block/5"}], None, ["student block/5", "4 blocks"]),
        ([{"tap": "block/5", "student": "block/2"}], None, ["block/2", "block/4"]),
        ([{"tap": "pooled", "student": "cls"}], None, ["'pooled'"]),
        ([TOKENS], {"ratio": 0.01}, ["objective.mask.ratio 0.01", "0 of 16"]),
    ],
)
def test_what_the_networks_lack_is_refused(targets, mask, words):
    with refused(*words):
        build(section(targets, mask), teacher=True)


def test_students_with_registers_rotary_positions_or_without_cls_are_trained():
    """Registers are in no target; a student without CLS has no target of its own CLS."""
    more = ["teacher.weights=unused"]
    for name, in_front in (("vit_small_patch16_dinov3", 5), ("vit_base_patch16_siglip_224", 0)):
        targets = [TOKENS] if in_front else [TOKENS, {**CLS, "student": "mean"}]
        overrides = [f"student.name={name}", f"objective.targets={json.dumps(targets)}", *more]
        objective, _ = build_objective(load_config("digits_features", overrides))
        assert objective.student.num_prefix == in_front
        images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        batch = objective.prepare(Batch(images, torch.rand(2, 64)), Normalize((0.5,) * 3, (0.5,) * 3))
        losses = objective(batch, {"tokens": torch.randn(2, 65, 128), "cls": torch.randn(2, 128)})
        losses["loss"].backward()
        assert objective.terms[0].head[0].weight.grad.abs().sum() > 0
    with refused("student=cls", "student=mean"):
        siglip = ["student.name=vit_base_patch16_siglip_224", *more]
        build_objective(load_config("digits_features", siglip))


def test_a_recipe_knows_its_group_of_images_and_what_a_student_sees():
    proteus = config_for(section(*CASES["two passes"]), teacher=True).objective
    assert proteus.mix_group_size == 2 and proteus.dropped_share == 0 and proteus.judged_by == "mean"
    dropped = config_for(section(*CASES["drop"]), teacher=True).objective
    assert dropped.mix_group_size == 1 and dropped.dropped_share == 0.75
    assert config_for(section([CLS], None), teacher=True).objective.judged_by == "cls"
    assert num_masked(196, 0.4) == 78 and math.isclose(78 / 196, 0.4, abs_tol=0.01) and DIM
