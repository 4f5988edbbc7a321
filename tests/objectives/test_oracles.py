"""Objectives, teacher, decoder and AdamW against numbers computed with the published DMAE and MAE code.

Everything goes through the builders that a run uses. The key third of `attn.qkv.bias` is left out after
AdamW: its gradient is zero in exact arithmetic, so AdamW turns rounding noise into steps of +-lr.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dmae_ds.config.run import RunConfig
from dmae_ds.data.batch import Batch
from dmae_ds.models.patches import patchify
from dmae_ds.models.positions import sincos_positions
from dmae_ds.train.learning_rate import learning_rate
from dmae_ds.train.networks import build_objective, build_teacher
from dmae_ds.train.optim import build_optimizer

PAIRS = {"single": [(3, 6)], "multi": [(2, 4), (4, 8)]}  # the oracles count blocks from 0
HEAD = {"fc-1layer": "linear", "mlp-1layer": "mlp2"}
CASES = [
    f"{pairs}.{head}.{distance}.{norm}"
    for pairs in PAIRS
    for head in HEAD
    for distance in ("L1", "L2")
    for norm in ("l2norm", "raw")
] + ["single.fc-1layer.L1.l2norm.normpix"]
HEADS_IN_PUBLISHED_CODE = "aligned_feature_projection_heads."
TINY = {"img_size": 32, "patch_size": 4}


@pytest.fixture(scope="module")
def base(oracles):
    return load_file(oracles / "dmae_img32_base.safetensors")


@pytest.fixture(scope="module")
def steps(oracles):
    return load_file(oracles / "dmae_img32_steps.safetensors")


@pytest.fixture(scope="module")
def mae(oracles):
    return load_file(oracles / "mae_img32.safetensors")


def metadata_of(oracles, file: str, key: str):
    with safe_open(oracles / f"{file}.safetensors", framework="pt") as opened:
        return json.loads(opened.metadata()[key])


@pytest.fixture(scope="module")
def teacher_file(base, tmp_path_factory):
    """Write the oracle's whole teacher with its decoder in the published file's layout."""
    path = tmp_path_factory.mktemp("teacher") / "mae_pretrain.pth"
    torch.save(
        {
            "model": {
                name.removeprefix("teacher."): tensor
                for name, tensor in base.items()
                if name.startswith("teacher.")
            }
        },
        path,
    )
    return path


def config_for(objective: dict, teacher_file=None) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"dir": "unused"},
            "data": {"train": "unused"},
            "student": {"name": "vit_tiny_patch16_224", **TINY, "embed_dim": 48, "depth": 4, "num_heads": 3},
            "teacher": teacher_file
            and {
                "name": "vit_tiny_patch16_224",
                **TINY,
                "embed_dim": 64,
                "depth": 8,
                "num_heads": 4,
                "weights": str(teacher_file),
                "format": "mae",
            },
            "objective": {"decoder": {"depth": 2, "embed_dim": 32, "num_heads": 4}, **objective},
            "optim": {"weight_decay": 0.05, "betas": [0.9, 0.95]},
        }
    )


def dmae_config(case: str, teacher_file) -> RunConfig:
    pairs, head, distance, norm = case.split(".")[:4]
    return config_for(
        {
            "name": "dmae",
            "pairs": PAIRS[pairs],
            "head": HEAD[head],
            "distance": distance.lower(),
            "normalize": {"l2norm": "l2", "raw": "none"}[norm],
            "norm_pix": case.endswith("normpix"),
        },
        teacher_file,
    )


def our_name(name: str) -> str:
    """Return our name of a parameter of the published model."""
    if name.startswith(HEADS_IN_PUBLISHED_CODE):
        return our_head(name.removeprefix(HEADS_IN_PUBLISHED_CODE))
    if name == "mask_token":
        return "decoder.mask_token"
    return f"decoder.{name.removeprefix('decoder_')}" if name.startswith("decoder_") else f"student.{name}"


def our_head(name: str) -> str:
    """Return our name of a head's parameter: <j>.weight, <j>.fc1.weight, ... -> heads.<j>.<layer>.weight."""
    number, _, rest = name.partition(".")
    layer = {"fc1": "0", "fc2": "2"}.get(rest.split(".")[0], "0")
    return f"heads.{number}.{layer}.{rest.split('.')[-1]}"


def load_weights(objective, tensors: dict, prefix: str, heads: str | None = None) -> None:
    state = {
        our_name(name.removeprefix(prefix)): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    if heads:
        state |= {
            our_head(name.removeprefix(heads)): tensor
            for name, tensor in tensors.items()
            if name.startswith(heads)
        }
    # The fixed positional embeddings must be the published ones before they are overwritten.
    for name, buffer in objective.named_buffers():
        torch.testing.assert_close(buffer, state[name], rtol=0, atol=1e-6)
    objective.load_state_dict(state, strict=True)


def batch_of(objective, tensors: dict, step: int):
    return objective.prepare(
        Batch(tensors["images"][step].float(), tensors["noise"][step]), torch.nn.Identity()
    )


def drop_key_bias(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return (
        torch.cat([tensor[: len(tensor) // 3], tensor[2 * len(tensor) // 3 :]])
        if name.endswith("attn.qkv.bias")
        else tensor
    )


@pytest.fixture(scope="module")
def teacher(base, teacher_file):
    """Build the real teacher with taps at every block that the cases use."""
    config = dmae_config("multi.fc-1layer.L1.raw", teacher_file)
    _, shape = build_objective(config)
    return build_teacher(config, shape, tuple(f"block/{block}" for block in range(1, 9)), torch.device("cpu"))


def test_mask_keeps_the_published_patches(base, teacher_file):
    objective, _ = build_objective(dmae_config("single.fc-1layer.L1.raw", teacher_file))
    batch = batch_of(objective, base, 0)
    assert torch.equal(batch.ids_keep, base["ids_keep"].long())
    shuffled = torch.cat([batch.ids_keep, batch.ids_masked], dim=1)
    assert torch.equal(shuffled.argsort(dim=1), base["ids_restore"].long())


def test_teacher_features_are_the_published_ones_at_every_block(base, teacher, teacher_file):
    objective, _ = build_objective(dmae_config("single.fc-1layer.L1.raw", teacher_file))
    features = teacher.features(batch_of(objective, base, 0))
    for block in range(1, 9):
        torch.testing.assert_close(
            features[f"block/{block}"], base[f"feat.teacher.block{block - 1}"], rtol=1e-5, atol=1e-5
        )


def test_student_features_projections_and_prediction_are_the_published_ones(base, teacher_file):
    objective, _ = build_objective(dmae_config("multi.mlp-1layer.L1.raw", teacher_file))
    load_weights(objective, base, "student.", "heads.multi.mlp-1layer.")
    batch = batch_of(objective, base, 0)
    with torch.no_grad():
        latent, tapped = objective.student(batch.visible, batch.ids_keep, taps=range(1, 5))
        predicted = objective.decoder(latent, batch.ids_keep, batch.ids_masked).flatten(2)
        projected = [
            head(tapped[block]) for (block, _), head in zip(objective.pairs, objective.heads, strict=True)
        ]
    torch.testing.assert_close(latent, base["feat.student.final_norm"], rtol=1e-5, atol=1e-5)
    for block in range(1, 5):
        torch.testing.assert_close(
            tapped[block], base[f"feat.student.block{block - 1}"], rtol=1e-5, atol=1e-5
        )
    for (block, _), tokens in zip(objective.pairs, projected, strict=True):
        torch.testing.assert_close(
            tokens, base[f"proj.multi.mlp-1layer.student_block{block - 1}"], rtol=1e-5, atol=1e-5
        )
    masked = base["feat.student.decoder_pred"].gather(1, batch.ids_masked[..., None].expand(-1, -1, 48))
    torch.testing.assert_close(predicted, masked, rtol=1e-5, atol=1e-5)


def test_every_case_of_the_oracle_is_tested(steps):
    assert sorted(name.removesuffix(".total") for name in steps if name.endswith(".total")) == sorted(CASES)


@pytest.mark.parametrize("case", CASES)
def test_three_steps_of_dmae_are_the_published_ones(case, base, steps, teacher, teacher_file, oracles):
    config = dmae_config(case, teacher_file)
    objective, _ = build_objective(config)
    pairs, head = case.split(".")[:2]
    load_weights(objective, base, "student.", f"heads.{pairs}.{head}.")
    names = [
        our_name(name) for name in metadata_of(oracles, "dmae_img32_steps", "names")[f"{case}.param_names"]
    ]
    run_three_steps(
        objective,
        config,
        base,
        {key.removeprefix(f"{case}."): value for key, value in steps.items() if key.startswith(f"{case}.")},
        names,
        lambda batch: teacher.features(batch),
        ["recon", "distill", "total"],
    )


def run_three_steps(objective, config, data, expected, names, features_of, losses) -> None:
    optimizer = build_optimizer(objective, config.optim)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    parameters = dict(objective.named_parameters())
    assert sorted(names) == sorted(parameters)
    for step in range(3):
        batch = batch_of(objective, data, step)
        parts = objective(batch, features_of(batch))
        found = {
            "total": [parts["loss"]],
            "recon": [parts["pixel"]],
            "loss": [parts["loss"]],
            "distill": [v for k, v in parts.items() if k.startswith("align/")],
        }
        for name in losses:
            torch.testing.assert_close(
                torch.stack(found[name]).double().detach().squeeze(),
                expected[name][step].squeeze(),
                rtol=1e-6,
                atol=0,
            )
        optimizer.zero_grad()
        parts["loss"].backward()
        gradients = torch.stack([parameters[name].grad.double().norm() for name in names])
        torch.testing.assert_close(gradients.norm(), expected["grad_norm_global"][step], rtol=1e-5, atol=0)
        if step == 0:
            torch.testing.assert_close(gradients, expected["grad_norm_step1"], rtol=1e-4, atol=1e-7)
        optimizer.step()
    if "param_norm_after3" in expected:
        norms = torch.stack([parameters[name].detach().double().norm() for name in names])
        keep = torch.tensor([not name.endswith("attn.qkv.bias") for name in names])
        torch.testing.assert_close(norms[keep], expected["param_norm_after3"][keep], rtol=2e-4, atol=0)
    compare_after_three(
        parameters, {name: tensor for name, tensor in expected.items() if name.startswith("after3.")}
    )


def compare_after_three(parameters: dict, expected: dict) -> None:
    for key, tensor in expected.items():
        name = our_name(key.removeprefix("after3."))
        found, tensor = drop_key_bias(name, parameters[name].detach()), drop_key_bias(name, tensor)
        assert (found - tensor).abs().max() <= 2e-4 * tensor.abs().max(), name
    assert not expected or len(expected) == len(parameters)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_three_steps_of_mae_are_the_published_ones(norm_pix, mae, oracles):
    config = config_for({"name": "mae", "norm_pix": norm_pix})
    objective, _ = build_objective(config)
    load_weights(objective, mae, "model.")
    prefix = "normpix." if norm_pix else "pix."
    expected = {key.removeprefix(prefix): value for key, value in mae.items() if key.startswith(prefix)}
    names = [our_name(name) for name in metadata_of(oracles, "mae_img32", "grad_names")]
    run_three_steps(objective, config, mae, expected, names, lambda batch: {}, ["loss"])


def test_mae_latent_and_prediction_are_the_published_ones(mae):
    objective, _ = build_objective(config_for({"name": "mae"}))
    load_weights(objective, mae, "model.")
    batch = batch_of(objective, mae, 0)
    assert torch.equal(batch.ids_keep, mae["ids_keep"].long())
    with torch.no_grad():
        latent, _ = objective.student(batch.visible, batch.ids_keep)
        predicted = objective.decoder(latent, batch.ids_keep, batch.ids_masked).flatten(2)
    torch.testing.assert_close(latent, mae["latent"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        predicted, mae["pred"].gather(1, batch.ids_masked[..., None].expand(-1, -1, 48)), rtol=1e-5, atol=1e-5
    )


def test_patches_are_cut_as_published(mae):
    torch.testing.assert_close(
        patchify(mae["images"][0].float(), 4).flatten(2), mae["patchify"], rtol=0, atol=0
    )


@pytest.mark.parametrize("dim, grid", [(32, 8), (48, 14), (64, 16)])
def test_positional_embeddings_are_the_published_ones(dim, grid, mae):
    torch.testing.assert_close(
        sincos_positions(dim, (grid, grid))[0], mae[f"sincos.dim{dim}.grid{grid}"], rtol=0, atol=1e-6
    )


def test_weight_decay_groups_are_the_published_ones(mae, oracles):
    objective, _ = build_objective(config_for({"name": "mae"}))
    optimizer = build_optimizer(objective, config_for({"name": "mae"}).optim)
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    groups = {
        group["weight_decay"]: sorted(names[id(parameter)] for parameter in group["params"])
        for group in optimizer.param_groups
    }
    for weight_decay, key in ((0.05, "decay"), (0.0, "no_decay")):
        assert groups[weight_decay] == sorted(
            our_name(name) for name in metadata_of(oracles, "mae_img32", key)
        )


def test_learning_rates_are_the_published_ones(oracles):
    table = json.loads((oracles / "finetune_schedules.json").read_text())["lr_dmae_pretrain_100ep"]
    config = RunConfig.model_fields["optim"].default
    assert (config.epochs, config.warmup_epochs, config.min_lr) == tuple(
        table["cfg"][key] for key in ("epochs", "warmup_epochs", "min_lr")
    )
    for epoch, lr in table["values"]:
        assert learning_rate(config, epoch) == pytest.approx(lr, rel=1e-9, abs=1e-15)
