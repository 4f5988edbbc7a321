"""Activation checkpointing: the same losses and gradients bit for bit, and every block runs twice."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

from dmae_ds.objectives.build import build_objective
from dmae_ds.objectives.ema import EmaModule, ema_features
from dmae_ds.objectives.needs import Progress
from tests.objectives import small

SECTIONS = {
    "dmae": {"name": "dmae", "decoder": small.DECODER},
    "mocov3": {"name": "mocov3", "hidden_dim": 8, "output_dim": 4},
}


def step(section: dict, *, checkpointed: bool, autocast: bool):
    """(loss, gradients, forward passes of each block of student and decoder) of one micro-batch."""
    config = small.config_for(section, teacher=section["name"] == "dmae")
    student = config.student.model_copy(update={"checkpoint_blocks": checkpointed})
    objective, shapes = build_objective(config.model_copy(update={"student": student}))
    objective.start_step(Progress(0, 1, 0.0, 1.0))
    ema = None if objective.ema is None else EmaModule(objective)  # before hooks, which it would copy
    passes = dict.fromkeys(("student.blocks.1", "decoder.blocks.0") if shapes else ("student.blocks.1",), 0)
    for name in passes:
        objective.get_submodule(name).register_forward_pre_hook(
            lambda *_, name=name: passes.update({name: passes[name] + 1})
        )
    raw = small.make_batch(4, sizes=tuple(view.size or small.SIZE for view in objective.views))
    batch = objective.prepare(raw, lambda pixels: pixels.float() / 255 - 0.5)
    features = {}
    if shapes:
        tokens = (len(batch.visible), 1 + batch.ids_keep.shape[1], shapes[""].embed_dim)
        features = {tap: torch.linspace(-1, 1, math.prod(tokens)).view(tokens) for tap in objective.taps}
    if ema is not None:
        features |= ema_features(objective, ema, batch, precision="fp32")
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        loss = objective(batch, features)["loss"]
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in objective.named_parameters()}, passes


@pytest.mark.parametrize("name, autocast", [("dmae", False), ("dmae", True), ("mocov3", False)])
def test_losses_and_gradients_are_those_without_it_and_blocks_run_twice(name, autocast):
    plain, checkpointed = (
        step(SECTIONS[name], checkpointed=checkpointed, autocast=autocast) for checkpointed in (False, True)
    )
    assert torch.equal(plain[0], checkpointed[0])
    assert all(torch.equal(plain[1][key], checkpointed[1][key]) for key in plain[1])
    assert set(plain[2].values()) == {1} and set(checkpointed[2].values()) == {2}
