"""MoCo-v3 against its formulas in float64, image by image and channel by channel; no code is shared."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from dmae_ds.config.load import load_config
from dmae_ds.config.run import RunConfig
from dmae_ds.data.batch import Batch
from dmae_ds.distributed import collectives
from dmae_ds.distributed.world import World
from dmae_ds.objectives.build import build_objective
from dmae_ds.objectives.mocov3 import GlobalBatchNorm, info_nce
from dmae_ds.objectives.needs import Progress
from dmae_ds.train.checkpoint.folder import CheckpointFolder
from dmae_ds.train.optim import build_optimizer
from dmae_ds.train.preflight import prepare as preflight
from tests.messages import refused

SIZE, GRID, DIM, HIDDEN, OUT, TAU = 8, 4, 12, 6, 5, 0.3


def config_for(**objective) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"dir": "unused"},
            "data": {"train": "unused"},
            "student": {
                "name": "vit_tiny_patch16_224",
                "img_size": SIZE,
                "patch_size": SIZE // GRID,
                "embed_dim": DIM,
                "depth": 2,
                "num_heads": 2,
            },
            "teacher": {
                "name": "vit_tiny_patch16_224",
                "img_size": SIZE,
                "patch_size": SIZE // GRID,
                "embed_dim": 8,
                "depth": 4,
                "num_heads": 2,
                "weights": "unused",
            }
            if "distill" in objective
            else None,
            "objective": {
                "name": "mocov3",
                "hidden_dim": HIDDEN,
                "output_dim": OUT,
                "temperature": TAU,
                **objective,
            },
            "optim": {"weight_decay": 0.05, "betas": [0.9, 0.95]},
        }
    )


def built(num: int, *, seed=0, **objective):
    """Return an objective in float64 with changed weights, `num` images in two views, its EMA teacher."""
    model, _ = build_objective(config_for(**objective))
    model.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor += 0.2 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    views = tuple(
        torch.randint(256, (num, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8) for _ in range(2)
    )
    batch = Batch(images=views[0], noise=None, more_views=views[1:])
    ema = SimpleNamespace(
        student=copy_of(model.student, generator), projector=copy_of(model.projector, generator)
    )
    return model, model.prepare(batch, lambda pixels: pixels.double() / 255), ema


def copy_of(module, generator):
    import copy

    found = copy.deepcopy(module)
    with torch.no_grad():
        for tensor in found.parameters():
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return found


# ---- the reference


def reference_mlp(rows, state, num_layers):
    """Return the outputs of a head for rows, a list of vectors.

    Linear, batch norm over the rows, ReLU; the last layer has no ReLU, and its batch norm no scale and shift.
    """
    for layer in range(num_layers):
        weight = state[f"{3 * layer}.weight"]
        rows = [
            torch.stack([sum(w * x for w, x in zip(line, row, strict=True)) for line in weight])
            for row in rows
        ]
        columns = []
        for channel in range(len(weight)):
            values = [row[channel] for row in rows]
            mean = sum(values) / len(values)
            variance = sum((value - mean) ** 2 for value in values) / len(values)
            scaled = [(value - mean) / (variance + 1e-5) ** 0.5 for value in values]
            if layer < num_layers - 1:
                gain, shift = (
                    state[f"{3 * layer + 1}.weight"][channel],
                    state[f"{3 * layer + 1}.bias"][channel],
                )
                scaled = [value * gain + shift for value in scaled]
                scaled = [value if value > 0 else 0 * value for value in scaled]
            columns.append(torch.stack(scaled))
        rows = [torch.stack([column[number] for column in columns]) for number in range(len(rows))]
    return rows


def reference_unit(row):
    length = sum(value**2 for value in row) ** 0.5
    return row / length if length > 1e-12 else row / 1e-12


def reference_contrast(queries, keys):
    """Return the mean over queries of -log softmax of the matching key, times 2 tau (Algorithm 1)."""
    total = 0.0
    for number, query in enumerate(queries):
        similarities = [sum(a * b for a, b in zip(query, key, strict=True)) / TAU for key in keys]
        largest = max(value.item() for value in similarities)
        total = (
            total
            + largest
            + torch.log(sum(torch.exp(value - largest) for value in similarities))
            - similarities[number]
        )
    return 2 * TAU * total / len(queries)


def reference_loss(model, masked, ema):
    """Return the whole loss from the features of student and EMA teacher, one image at a time."""
    num = len(masked.visible) // 2

    def heads_of(student, projector, predictor):
        found = []
        for view in range(2):
            rows = [
                student(masked.visible[n : n + 1], masked.ids_keep[n : n + 1])[0][0, 0]
                for n in range(view * num, (view + 1) * num)
            ]
            rows = reference_mlp(rows, dict(projector.named_parameters()), 3)
            rows = rows if predictor is None else reference_mlp(rows, dict(predictor.named_parameters()), 2)
            found.append([reference_unit(row) for row in rows])
        return found

    queries = heads_of(model.student, model.projector, model.predictor)
    with torch.no_grad():
        keys = heads_of(ema.student, ema.projector, None)
    return reference_contrast(queries[0], keys[1]) + reference_contrast(queries[1], keys[0])


def found_loss(model, masked, ema, features=None):
    with torch.no_grad():
        keys = model.ema_features(ema, masked)
    return model(masked, {**keys, **(features or {})})


# ---- the loss


@pytest.mark.parametrize("num", [1, 2, 5])
def test_the_loss_and_its_gradients_are_the_formula_s(num):
    model, masked, ema = built(num)
    loss, expected = found_loss(model, masked, ema)["loss"], reference_loss(model, masked, ema)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-9)
    assert (num > 1) == (expected.item() > 0.01)  # the only image of a batch is always found
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, parameters.values(), allow_unused=True)
    references = torch.autograd.grad(expected, parameters.values(), allow_unused=True)
    for name, gradient, reference in zip(parameters, gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-6, atol=1e-9, msg=name)


def test_the_matching_key_is_at_this_rank_s_offset():
    generator = torch.Generator().manual_seed(1)
    rows = torch.nn.functional.normalize(torch.randn(9, OUT, dtype=torch.float64, generator=generator), dim=1)
    queries, keys = rows[:3], rows[3:]
    for own in (0, 3):
        expected = sum(
            -math.log(
                math.exp(float(q @ keys[own + n]) / TAU) / sum(math.exp(float(q @ k) / TAU) for k in keys)
            )
            for n, q in enumerate(queries)
        )
        assert info_nce(queries, keys, offset=own, temperature=TAU).item() == pytest.approx(
            2 * TAU * expected / 3, rel=1e-9
        )


@pytest.fixture
def second_of_two_ranks(monkeypatch):
    """Simulate a second rank, whose rows are the negatives of ours.

    Returns the list of exchanges: (ours, theirs).
    """
    monkeypatch.setattr(collectives, "rank", lambda: 1)
    monkeypatch.setattr(collectives, "gather_rows", lambda rows: torch.cat([-rows, rows]).detach())


def test_keys_of_other_ranks_are_negatives(second_of_two_ranks):
    model, masked, ema = built(4)
    features = model.ema_features(ema, masked)
    with torch.no_grad():
        found = model(masked, features)["loss"].item()
        latent = model.student(masked.visible, masked.ids_keep)[0][:, 0]
        queries = torch.nn.functional.normalize(
            model.predictor(model.projector(latent.unflatten(0, (2, 4)))), dim=-1
        )
    first, second = features["ema/keys"]
    expected = 0.0
    for view, keys in ((queries[0], second), (queries[1], first)):
        for n, query in enumerate(view):
            scores = [(query @ key).item() / TAU for key in (*-keys, *keys)]
            expected += 2 * TAU / 4 * (math.log(sum(map(math.exp, scores))) - scores[4 + n])
    assert found == pytest.approx(expected, rel=1e-6)


def test_batch_norm_takes_the_statistics_of_all_ranks(monkeypatch):
    """Two simulated ranks compute what one rank computes with the rows of both."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(6, 3, dtype=torch.float64, generator=generator)
    expected = torch.nn.functional.batch_norm(rows, None, None, training=True)
    mean = rows.mean(0, keepdim=True)
    answers = iter([mean, (rows - mean).square().mean(0, keepdim=True)])
    monkeypatch.setattr(collectives, "mean_over_ranks_with_gradient", lambda own: next(answers))
    torch.testing.assert_close(GlobalBatchNorm(3, affine=False)(rows[:2]), expected[:2])


# ---- three optimiser steps through the builders


@pytest.mark.parametrize("frozen", [True, False])
def test_three_steps_are_those_of_the_formula_s_gradients(frozen):
    model, masked, ema = built(3, freeze_patch_projection=frozen)
    other, _, _ = built(3, freeze_patch_projection=frozen)
    other_ema = SimpleNamespace(
        student=copy_of(ema.student, torch.Generator()), projector=copy_of(ema.projector, torch.Generator())
    )
    for mine, theirs in ((ema.student, other_ema.student), (ema.projector, other_ema.projector)):
        theirs.load_state_dict(mine.state_dict())
    assert frozen != any("patch_embed" in name for name, _ in model.named_parameters())
    optimizers = [build_optimizer(network, config_for().optim) for network in (model, other)]
    for step in range(3):
        for network, network_ema, optimizer, loss_of in (
            (model, ema, optimizers[0], lambda *a: found_loss(*a)["loss"]),
            (other, other_ema, optimizers[1], reference_loss),
        ):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2
            optimizer.zero_grad()
            loss_of(network, masked, network_ema).backward()
            optimizer.step()
            m = 1 - 0.01 * 0.5 * (1 + math.cos(math.pi * step / 3))
            assert network.ema.momentum(
                Progress(step=step, num_steps=3, epoch=0.0, epochs=1.0)
            ) == pytest.approx(m, rel=1e-12)
            with torch.no_grad():
                for part in network.ema.parts:
                    for mine, theirs in zip(
                        getattr(network_ema, part).parameters(),
                        getattr(network, part).parameters(),
                        strict=True,
                    ):
                        mine.copy_(m * mine + (1 - m) * theirs)
    start, _, _ = built(3, freeze_patch_projection=frozen)
    for (name, mine), theirs, first in zip(
        model.named_parameters(), other.parameters(), start.parameters(), strict=True
    ):
        if not name.endswith(
            "attn.qkv.bias"
        ):  # its key third has no gradient but rounding, which AdamW turns into steps of +-lr
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6, msg=name)
            assert not torch.equal(mine, first), name


# ---- with DMAE's term


def test_with_distillation_the_term_is_added_for_both_views_whole():
    model, masked, ema = built(3, distill={"alpha": 0.5})
    assert (
        model.taps == ("block/3",)
        and masked.visible.shape[1] == model.student.num_patches
        and masked.masked.shape[1] == 0
    )
    target = torch.randn(6, 17, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    parts = found_loss(model, masked, ema, {"block/3": target})
    projected = model.heads[0](model.student(masked.visible, masked.ids_keep, taps=[1])[1][1])
    align = (
        sum(abs(a - b) for a, b in zip(projected.flatten().tolist(), target.flatten().tolist(), strict=True))
        / target.numel()
    )
    assert parts["align/1-3"].item() == pytest.approx(align, rel=1e-5)
    assert parts["loss"].item() == pytest.approx(
        reference_loss(model, masked, ema).item() + 0.5 * align, rel=1e-5
    )
    parts["loss"].backward()
    assert 0 < model.gradient_shares()["share/1"].item() < 1


def test_accumulation_is_refused_and_a_whole_batch_resumes_on_fewer_ranks(digits, tmp_path):
    recipe = [f"run.dir={tmp_path}", f"data.train={digits / 'train'}", f"data.val={digits / 'val'}"]
    with refused("mocov3", "optim.micro_batch", 32):
        preflight(load_config("digits_mocov3", [*recipe, "optim.micro_batch=32"]), World(), resume="never")
    folder = CheckpointFolder(tmp_path)
    folder.begin(3)
    two = preflight(load_config("digits_mocov3", recipe), World(rank=0, size=2), resume="never")
    folder.commit(3, {**two.identity, "step": 3, "position": 192}, {})
    one = preflight(load_config("digits_mocov3", recipe), World(), resume="auto")
    assert (two.micro_batch, one.micro_batch, one.accumulation, one.resume_from.name) == (
        32,
        64,
        1,
        "step-00000003",
    )


def test_the_projection_is_frozen_but_saved():
    model, _, _ = built(2)
    assert "student.patch_embed.proj.weight" in model.state_dict() and not any(
        "patch_embed" in name for name, _ in model.named_parameters()
    )


def test_a_collapsed_momentum_encoder_shows_in_its_tokens_and_not_in_its_keys():
    model, masked, ema = built(4)
    assert 0.01 < found_loss(model, masked, ema)["target/spread"].item() <= 0.75
    ema.student.norm.weight.data *= (
        1e-6  # what is left of the tokens is the norm's shift, equal for all images
    )
    features = model.ema_features(ema, masked)
    keys = features["ema/keys"][0]
    assert (
        abs(model(masked, features)["target/spread"].item()) < 1e-6
        and keys.mean(0).norm() < 0.5 * keys.norm(dim=1).mean()
    )
