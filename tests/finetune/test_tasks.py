"""Each supervised distillation trains the student with its teacher, and leaves the teacher unchanged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.task import DistillationTeacher
from torch import nn

from dmae_ds.config.evaluation import DistillConfig, FinetuneOptimConfig
from dmae_ds.config.networks import ModelConfig
from dmae_ds.finetune.contrast import Contrast
from dmae_ds.finetune.network import build_classifier, classifier_kwargs, with_distillation_token
from dmae_ds.finetune.optim import build_adamw, set_lr
from dmae_ds.finetune.tasks import TASKS, build_task, set_training
from tests.messages import refused

STATISTICS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
OTHER = {"mean": (0.2, 0.2, 0.2), "std": (0.3, 0.3, 0.3)}


def network(embed_dim, pool="mean", statistics=STATISTICS, seed=0, **more):
    numbers = {"img_size": 16, "patch_size": 4, "embed_dim": embed_dim, "depth": 2, "num_heads": 2, **more}
    return build_classifier(
        ModelConfig(name="vit_tiny_patch16_224", **numbers),
        classifier_kwargs(pool, 3),
        seed=seed,
        **statistics,
    )


def distill(method, **changes):
    return DistillConfig(
        **{
            "method": method,
            "teacher": "file",
            "temperature": 2.0 if method in ("deit_soft", "logits") else None,
            **changes,
        }
    )


def build(method, *, teacher=None, seed=0, **changes):
    student = network(24, "cls" if method.startswith("deit") else "mean")
    if method.startswith("deit"):
        student, _ = with_distillation_token(student, seed=0)
    teacher = teacher or network(32, statistics=OTHER, seed=1)
    config, contrast = distill(method, **changes), None
    if method == "crd":
        contrast = Contrast(np.arange(12), np.arange(12) % 3, config.crd, seed=0)
    return student, build_task(
        student,
        nn.CrossEntropyLoss(),
        distill=config,
        teacher=teacher,
        seed=seed,
        device=torch.device("cpu"),
        contrast=contrast,
    )


def more_inputs(method, num):
    """CRD's rows of a batch: the first images of the memory, each with its class's and three others."""
    if method != "crd":
        return ()
    places = torch.arange(num)
    return places, torch.stack([places, *((places + step) % 12 for step in (1, 2, 4))], dim=1)


@pytest.mark.parametrize("method", TASKS)
def test_the_teacher_s_loss_alone_trains_the_student_and_not_the_teacher(method):
    teacher = network(32, statistics=OTHER, seed=1).requires_grad_(False)
    nn.init.normal_(teacher.head.weight, std=1.0)
    student, task = build(method, teacher=teacher, task_weight=0.0, weight=1.0)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    optimizer = build_adamw(student, task, FinetuneOptimConfig(layer_decay=1.0, weight_decay=0.0))
    set_lr(optimizer, 2e-3)
    set_training(task)
    assert not teacher.training and student.training
    images = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(12, dtype=torch.int64)
    losses = []
    for _ in range(12):
        loss = task(images, labels, *more_inputs(method, 12))["loss"]
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in task.parameters() if parameter.requires_grad}
    assert not trained & {id(parameter) for parameter in teacher.parameters()}


def test_the_teacher_gets_images_with_its_own_pixel_statistics():
    teacher = network(32, statistics=OTHER, seed=1)
    nn.init.normal_(teacher.head.weight)
    student, task = build("logits", teacher=teacher, task_weight=0.0, weight=1.0)
    set_training(task)
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        seen = (images * 0.5 + 0.5 - 0.2) / 0.3
        expected = 4 * nn.functional.kl_div(
            (student(images) / 2).log_softmax(1),
            (teacher(seen) / 2).log_softmax(1),
            reduction="batchmean",
            log_target=True,
        )
        assert task(images, torch.zeros(4, dtype=torch.int64))["loss"].item() == pytest.approx(
            expected.item(), rel=1e-4
        )


@pytest.mark.parametrize("method", TASKS)
def test_the_labels_loss_has_its_weight(method):
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    values = []
    for task_weight in (0.0, 1.0):
        _, task = build(method, task_weight=task_weight, weight=0.5)
        set_training(task)
        losses = task(images, labels, *more_inputs(method, 4))
        values.append((losses["loss"].item(), losses["task_loss"].item()))
    assert values[1][0] - values[0][0] == pytest.approx(values[1][1], rel=1e-3)


def test_the_projection_is_drawn_from_the_seed():
    weights = [
        next(
            p for name, p in build("features", seed=seed)[1].named_parameters() if "projection.weight" in name
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_distillation_token_is_added_next_to_cls():
    plain = network(24, "cls")
    distilled, model = with_distillation_token(plain, seed=0)
    assert model.name == "deit_base_distilled_patch16_224" and distilled.pos_embed.shape == (1, 18, 24)
    assert (
        torch.equal(distilled.pos_embed[:, 2:], plain.pos_embed[:, 1:])
        and not distilled.pos_embed[:, 1].any()
        and distilled.dist_token.any()
    )
    for name, tensor in plain.state_dict().items():
        if name != "pos_embed":
            assert torch.equal(distilled.state_dict()[name], tensor), name
    dinov2 = ModelConfig(name="vit_small_patch14_dinov2", img_size=28, depth=1, embed_dim=24, num_heads=2)
    model = build_classifier(dinov2, classifier_kwargs("cls", 3), seed=0, **STATISTICS)
    with refused("plain ViT", "distill.method"):
        with_distillation_token(model, seed=0)


@pytest.mark.parametrize("statistics", [STATISTICS, OTHER], ids=["alike", "unlike"])
@pytest.mark.parametrize("method", TASKS)
def test_a_micro_batch_compares_nothing_on_the_device_and_the_teacher_sees_its_own_images(
    method, statistics, monkeypatch
):
    _, task = build(method, teacher=network(32, statistics=statistics, seed=1))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    given = task.student_mean, task.student_std
    expected = DistillationTeacher(task.teacher.model).normalize_input(images, *given)
    assert (expected is images) == (statistics is STATISTICS)
    monkeypatch.setattr(torch, "equal", None)
    assert (task.teacher.normalize_input(images, *given) == expected).all()
    assert torch.isfinite(task(images, torch.tensor([0, 1]), *more_inputs(method, 2))["loss"])
