"""G2SD's generic stage against its formula in loops in float64, with a teacher built as in a run."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch

from dmae_ds.config.run import RunConfig
from dmae_ds.data.batch import Batch
from dmae_ds.models.patches import Normalize
from dmae_ds.objectives.build import build_objective
from dmae_ds.teacher.build import load_frozen_teacher
from dmae_ds.train.optim import build_optimizer
from tests.messages import refused

NAME = "vit_tiny_patch16_224"
TEACHER = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
STUDENT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
MEAN = STD = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def whole_mae(tmp_path_factory):
    """Write a file as MAE publishes them: encoder with norm, decoder (width 20, 4 blocks), prediction."""
    generator = torch.Generator().manual_seed(3)
    encoder = timm.create_model(NAME, num_classes=0, **TEACHER).state_dict()
    decoder = timm.create_model(NAME, num_classes=0, **{**TEACHER, "embed_dim": 20, "depth": 4}).state_dict()
    shapes = {name: tensor.shape for name, tensor in encoder.items()}
    shapes |= {
        f"decoder_{name}": tensor.shape
        for name, tensor in decoder.items()
        if name.startswith(("blocks.", "norm.", "pos_embed"))
    }
    shapes |= {
        "mask_token": (1, 1, 20),
        "decoder_embed.weight": (20, 24),
        "decoder_embed.bias": (20,),
        "decoder_pred.weight": (192, 20),
        "decoder_pred.bias": (192,),
    }
    path = tmp_path_factory.mktemp("teacher") / "mae.pth"
    torch.save(
        {
            "model": {
                name: 0.3 * torch.randn(shape, generator=generator)
                + ("norm" in name and name.endswith("weight"))
                for name, shape in shapes.items()
            }
        },
        path,
    )
    return path


def recipe(whole_mae, **objective) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"dir": "unused"},
            "student": {"name": NAME, **STUDENT},
            "data": {"train": "unused", "mean": MEAN, "std": STD},
            "teacher": {
                "name": NAME,
                **TEACHER,
                "weights": str(whole_mae),
                "format": "mae",
                "decoder_depth": 4,
                "decoder_embed_dim": 20,
                "decoder_num_heads": 2,
            },
            "objective": {
                "name": "g2sd_generic",
                "decoder": {"depth": 2, "embed_dim": 12, "num_heads": 2},
                **objective,
            },
            "optim": {"global_batch": 256, "base_lr": 1e-2, "epochs": 30},
        }
    )


def build(whole_mae, *, num: int = 3, **objective):
    config = recipe(whole_mae, **objective)
    built, shapes = build_objective(config)
    shape = shapes[""]
    teacher = load_frozen_teacher(
        config.teacher,
        taps=built.taps,
        whole_blocks=shape.depth,
        mean=MEAN,
        std=STD,
        device=torch.device("cpu"),
    )
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (num, 3, 32, 32), generator=generator, dtype=torch.uint8)
    masked = built.prepare(Batch(images, torch.rand(num, 16, generator=generator)), Normalize(MEAN, STD))
    return config, built, teacher, masked


def smooth_l1(difference):
    """Return smooth-L1 with beta 2: d^2 / 4 below 2, |d| - 1 above."""
    size = abs(difference)
    return size**2 / 4 if float(size.detach()) < 2 else size - 1


def mean_of(entries):
    return sum(entries) / len(entries)


def reference(objective, masked, features, *, target, tokens, norm_pix=False):
    """Return the loss, entry by entry in float64, from the network's outputs."""
    objective = objective.double()
    latent, _ = objective.student(masked.visible.double(), masked.ids_keep)
    # what follows the decoder is written out: linear, GELU, linear
    first, _, second = objective.head
    decoded = objective.decoder(latent, masked.ids_keep, masked.ids_masked)
    hidden = decoded @ first.weight.T + first.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    predicted = hidden @ second.weight.T + second.bias
    num_visible = masked.ids_keep.shape[1]
    ((_, taught),) = features.items()
    generic, pixel = [], []
    for image in range(len(predicted)):
        for token in range(predicted.shape[1]):
            place = token - 1 - num_visible  # among the masked patches
            if place < 0 and (tokens == "masked" or target != "features"):
                continue
            if target == "features":
                row = [float(value) for value in taught[image, token]]
                mean = mean_of(row)
                variance = mean_of([(value - mean) ** 2 for value in row])
                wanted = [(value - mean) / math.sqrt(variance + 1e-6) for value in row]
            else:
                wanted = [float(value) for value in taught[image, place].reshape(-1)]
            generic += [
                smooth_l1(predicted[image, token, channel] - value) for channel, value in enumerate(wanted)
            ]
            if target == "reconstruction_and_pixels":
                own = [float(value) for value in masked.masked[image, place].reshape(-1)]
                if norm_pix:
                    mean = mean_of(own)
                    deviation = math.sqrt(sum((value - mean) ** 2 for value in own) / (len(own) - 1) + 1e-6)
                    own = [(value - mean) / deviation for value in own]
                pixel += [
                    (predicted[image, token, channel] - value) ** 2 for channel, value in enumerate(own)
                ]
    return mean_of(generic) + (mean_of(pixel) if pixel else 0.0)


CASES = {
    "all tokens": {},
    "masked tokens": {"tokens": "masked"},
    "last block": {"decoder_block": 4},
    "one masked patch": {"mask_ratio": 1 / 16, "tokens": "masked"},
    "one visible patch": {"mask_ratio": 15 / 16},
    "reconstruction": {"target": "reconstruction"},
    "with pixels": {"target": "reconstruction_and_pixels"},
    "with normalised pixels": {"target": "reconstruction_and_pixels", "norm_pix": True, "mask_ratio": 1 / 16},
}


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_the_formula(whole_mae, case):
    changes = CASES[case]
    num = 1 if "one" in case else 3
    _, objective, teacher, masked = build(whole_mae, num=num, **changes)
    features = teacher.features(masked)
    with torch.no_grad():
        for parameter in objective.head.parameters():  # some differences above 2, some below
            parameter.mul_(5)
        found = objective(masked, features)
        keys = {
            "target": changes.get("target", "features"),
            "tokens": changes.get("tokens", "all"),
            "norm_pix": changes.get("norm_pix", False),
        }
        expected = reference(copy.deepcopy(objective), masked, features, **keys)
    assert float(found["loss"]) == pytest.approx(float(expected), rel=1e-6)
    assert float(found["loss"]) == pytest.approx(
        float(found["generic"]) + float(found.get("pixel", 0.0)), rel=1e-6
    )


def test_three_optimiser_steps_follow_the_formula_s_gradients(whole_mae):
    config, objective, teacher, masked = build(whole_mae, num=2)
    features = teacher.features(masked)
    optimizer = build_optimizer(objective, config.optim)
    losses = []
    for _ in range(3):
        ema = copy.deepcopy(objective)
        expected = reference(ema, masked, features, target="features", tokens="all")
        expected.backward()
        optimizer.zero_grad()
        found = objective(masked, features)["loss"]
        found.backward()
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
        for (name, ours), theirs in zip(objective.named_parameters(), ema.parameters(), strict=True):
            scale = float(theirs.grad.abs().max())
            torch.testing.assert_close(
                ours.grad.double(),
                theirs.grad,
                rtol=0,
                atol=max(1e-5 * scale, 1e-8),
                msg=lambda text, name=name: f"{name}: {text}",
            )
        optimizer.step()
        losses.append(found.item())
    assert losses[2] < losses[1] < losses[0]


def test_only_the_blocks_up_to_the_tap_are_made(whole_mae):
    _, objective, teacher, _ = build(whole_mae)
    assert objective.taps == ("decoder/2",)  # half of four
    assert len(teacher.top.decoder_blocks) == 2 and not hasattr(teacher.top, "decoder_pred")
    assert "upper decoder blocks" in teacher.parts.describe_dropped()
    assert not hasattr(objective.decoder, "norm")
    config = recipe(whole_mae)
    config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"decoder_depth": 1})})
    assert build_objective(config)[0].taps == ("decoder/1",)  # of one block, that one


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": "reconstruction", "tokens": "all"}, ["tokens", "all", "reconstruction", "masked"]),
        ({"target": "reconstruction", "decoder_block": 1}, ["decoder_block", "reconstruction", "features"]),
        ({"norm_pix": True}, ["norm_pix", "features", "reconstruction_and_pixels"]),
    ],
)
def test_options_without_effect_are_refused(whole_mae, changes, words):
    with pytest.raises(ValueError) as raised:
        recipe(whole_mae, **changes)
    assert not [word for word in words if word not in str(raised.value)]


def test_a_decoder_block_that_the_teacher_does_not_have_is_refused(whole_mae):
    with refused("objective.decoder_block", 5, "teacher.decoder_depth", 4):
        build_objective(recipe(whole_mae, decoder_block=5))


def test_patches_of_another_size_have_features_and_no_pixels(whole_mae):
    config = recipe(whole_mae, target="reconstruction")
    small = config.student.model_copy(update={"img_size": 16, "patch_size": 4})
    with refused("objective.target", "reconstruction", 8, 4, "features"):
        build_objective(config.model_copy(update={"student": small}))
    build_objective(recipe(whole_mae).model_copy(update={"student": small}))
