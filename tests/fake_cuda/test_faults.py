"""The watch sees what it is there for: each planted fault turns a step that had no finding red."""

from __future__ import annotations

import pytest
import torch

from dmae_ds.models.vit import MaskedViT
from dmae_ds.objectives import dino, mae, masked, mocov3
from tests.fake_cuda import step as steps
from tests.fake_cuda.step import watch_step

_move_centre, _build_optimizer, _forward = dino.move_centre, steps.build_optimizer, MaskedViT.forward


def ids_on_the_cpu(count, grid, device):
    return torch.arange(grid[0] * grid[1]).expand(count, -1)


def value_read_for_the_log(objective):
    gradient = next(objective.parameters()).grad
    return {"share/1": torch.tensor(gradient.norm().item(), device=gradient.device)}


def number_read_by_a_condition(patches):
    return patches if patches.isfinite().all() else torch.zeros_like(patches)


def boolean_index(patches):
    return patches[patches.isfinite()].view(patches.shape)


def constant_on_the_cpu(patches):
    return patches - torch.zeros(patches.shape[1], 1, 1, 1)


def scalar_on_the_cpu(patches):
    return patches * torch.tensor(2.0)


def constant_copied_in_every_step(patches):
    return patches - torch.zeros(patches.shape[1], 1, 1, 1).to(patches.device)


def pinned_constant_copied_blocking(patches):
    return patches - torch.zeros(patches.shape[1], 1, 1, 1).pin_memory().to(patches.device)


def indices_on_the_cpu(patches):
    return patches[torch.arange(len(patches))]


def loss_copied_to_the_host(objective):
    return {"share/1": next(objective.parameters()).grad.norm().cpu()}


def order_found_on_the_cpu(noise, kept):
    order = torch.argsort(noise.cpu(), dim=1).to(noise.device)
    return order[:, :kept], order[:, kept:]


def centre_from_the_cpu(state, momentum):
    _move_centre(state, momentum)
    state["centre"].copy_(torch.ones(state["centre"].shape))


def optimizer_that_counts_on_the_cpu(objective, config):
    """As a checkpoint of other ranks was loaded once."""
    optimizer = _build_optimizer(objective, config)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}
    return optimizer


def device_wide_wait(student, *args, **kwargs):
    torch.cuda.synchronize()
    return _forward(student, *args, **kwargs)


def wait_for_a_stream(student, *args, **kwargs):
    torch.cuda.Stream.synchronize(None)
    return _forward(student, *args, **kwargs)


# (fault, recipe, owner and name of what it replaces, a word of what must be found)
FAULTS = [
    (ids_on_the_cpu, "digits_mocov3", (mocov3, "all_places"), "mixed devices"),
    (value_read_for_the_log, "digits_mae", (mae.Mae, "gradient_shares"), "read: "),
    (number_read_by_a_condition, "digits_mae", (mae, "normalize_patches"), "read: "),
    (boolean_index, "digits_mae", (mae, "normalize_patches"), "read: boolean"),
    (constant_on_the_cpu, "digits_mae", (mae, "normalize_patches"), "mixed devices"),
    (scalar_on_the_cpu, "digits_mae", (mae, "normalize_patches"), "mixed devices"),
    (constant_copied_in_every_step, "digits_mae", (mae, "normalize_patches"), "copy: "),
    (pinned_constant_copied_blocking, "digits_mae", (mae, "normalize_patches"), "copy: "),
    (indices_on_the_cpu, "digits_mae", (mae, "normalize_patches"), "mixed devices"),
    (loss_copied_to_the_host, "digits_mae", (mae.Mae, "gradient_shares"), "copy: "),
    (order_found_on_the_cpu, "digits_mae", (masked, "keep_random"), "copy: "),
    (centre_from_the_cpu, "digits_dino", (dino, "move_centre"), "copy: "),
    (
        optimizer_that_counts_on_the_cpu,
        "digits_mae",
        (steps, "build_optimizer"),
        "optimiser state step on cpu",
    ),
    (device_wide_wait, "digits_mae", (MaskedViT, "forward"), "device by"),
    (wait_for_a_stream, "digits_mae", (MaskedViT, "forward"), "stream by"),
]


@pytest.mark.parametrize(
    "fault, recipe, replaced, word", FAULTS, ids=[fault.__name__ for fault, *_ in FAULTS]
)
def test_a_planted_fault_is_found(fault, recipe, replaced, word, monkeypatch):
    overrides = ["objective.norm_pix=true"] if recipe == "digits_mae" else []
    monkeypatch.setattr(*replaced, fault)
    found = watch_step(recipe, *overrides).findings
    assert any(text.startswith(word) for text in found), found


def test_without_a_fault_nothing_is_found():
    for recipe in ("digits_mae", "digits_mocov3", "digits_dino"):
        assert watch_step(recipe).findings == {}


def test_a_copy_from_pinned_memory_that_does_not_wait_is_fine(monkeypatch):
    def shifted(patches):
        shift = torch.zeros(patches.shape[1], 1, 1, 1).pin_memory()
        return patches - shift.to(patches.device, non_blocking=True)

    monkeypatch.setattr(mae, "normalize_patches", shifted)
    assert watch_step("digits_mae", "objective.norm_pix=true").findings == {}


def test_nothing_stays_replaced():
    """Other tests of this process find torch as it was."""
    before = (torch.Tensor.backward, torch.Tensor.item, torch.nn.functional.scaled_dot_product_attention)
    watch_step("digits_mae")
    after = (torch.Tensor.backward, torch.Tensor.item, torch.nn.functional.scaled_dot_product_attention)
    assert before == after and not torch.is_autocast_enabled("cuda")
    weight = torch.ones(2, requires_grad=True)
    (weight * 3).sum().backward()
    assert weight.grad.tolist() == [3, 3]
