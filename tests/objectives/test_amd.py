"""AMD's losses against their formula in float64, image by image; what it trains, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from dmae_ds.config.imitation import AmdConfig
from dmae_ds.objectives.amd import Amd, AmdBatch
from dmae_ds.objectives.build import build_objective
from tests.messages import refused
from tests.objectives import reference, small

SUPERSET = {"sees": "superset", "mask_ratio": 0.5}  # 8 of 16 patches; the student sees 4


def amd(**changes):
    return {"name": "amd", "mask_ratio": 0.75, "decoder": small.DECODER, **changes}


def mean_of(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def distance_of(kind: str, one: torch.Tensor, other: torch.Tensor) -> float:
    entries = {
        "l2": lambda d: d * d,
        "l1": abs,
        "smooth_l1": lambda d: d * d / 2 if abs(d) < 1 else abs(d) - 0.5,
    }
    return mean_of(entries[kind](d) for d in (one - other).flatten().tolist())


def formula(objective: Amd, images, masked: AmdBatch, features: dict) -> dict[str, list[float]]:
    """Each part of the loss for each image; their means are the objective's."""
    state = {name: tensor.detach() for name, tensor in objective.state_dict().items()}
    config, size, found = objective.config, small.PATCH, {}
    for n, image in enumerate(images):
        keep, rest = masked.ids_keep[n].tolist(), masked.ids_masked[n].tolist()
        latent, after = reference.encode(
            reference.part(state, "student"),
            image,
            keep,
            size=size,
            heads=small.HEADS,
            depth=small.DEPTH,
            grid=small.GRID,
        )
        decoder = {"heads": small.DECODER["num_heads"], "depth": small.DECODER["depth"], "grid": small.GRID}
        decoded = reference.decode(reference.part(state, "decoder"), latent, keep, **decoder)
        errors = []
        for place in rest:
            pixels = reference.patch_of(image, place, size=size).permute(1, 2, 0)
            if config.pixels == "patch":
                variance = ((pixels - pixels.mean()) ** 2).sum() / (pixels.numel() - 1)
                target = (pixels - pixels.mean()) / (variance + 1e-6).sqrt()
            else:
                target = pixels = pixels * reference.STD + reference.MEAN  # from 0 to 1
                if config.pixels == "channel":
                    mean = pixels.mean((0, 1))
                    variance = ((pixels - mean) ** 2).sum((0, 1)) / (size * size - 1)
                    target = (pixels - mean) / (variance.sqrt() + 1e-6)
            errors.append(distance_of("l2", decoded[place], target.flatten()))
        found.setdefault("pixel", []).append(mean_of(errors))
        shared = config.projection == "shared"
        for number, (mine, theirs) in enumerate(objective.direct):
            projected = after[mine - 1] @ state[f"direct_maps.{number}.weight"].T
            target = features[f"block/{theirs}"][n][: 1 + len(keep)]
            found.setdefault(f"align/{mine}-{theirs}", []).append(
                distance_of(config.distance, projected, target)
            )
        for number, (mine, theirs) in enumerate(objective.generative):
            maps = "direct_maps" if shared else "generative_maps"
            rows = list(after[mine - 1] @ state[f"{maps}.{number}.weight"].T)
            generator = reference.part(state, f"generators.{number}")
            further = rest[: features[f"block/{theirs}"].shape[1] - len(rows)]
            rows += [generator["mask_token"][0, 0]] * len(further)
            codes = [reference.position_of(*divmod(place, small.GRID), 12) for place in (*keep, *further)]
            rows = torch.stack([rows[0], *(row + code for row, code in zip(rows[1:], codes, strict=True))])
            for block in range(config.generator.depth):
                rows = reference.block(rows, generator, f"blocks.{block}", config.generator.num_heads or 1)
            target = features[f"block/{theirs}"][n][-len(further) :]
            found.setdefault(f"align/{mine}-{theirs}-generated", []).append(
                distance_of(config.distance, rows[-len(further) :], target)
            )
    return found


OPTIONS = {
    "defaults": {},
    "other pairs": {
        "direct": [[1, 3]],
        "generative": [[4, 8], [2, 1]],
        "generator": {"depth": 1, "num_heads": 3},
    },
    "shared maps": {"projection": "shared", "pixels": "channel", "distance": "smooth_l1"},
    "weights": {"pixel_weight": 0.5, "direct_weight": 2.0, "generative_weight": 3.0, "pixels": "raw"},
    "frozen mask tokens": {"train_mask_tokens": False, "distance": "l1"},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_the_loss_is_the_formula(case):
    objective = small.build(amd(**OPTIONS[case]), teacher=SUPERSET)
    batch = small.make_batch(2)
    masked = small.prepare(objective, batch)
    generator = torch.Generator().manual_seed(1)
    features = {
        tap: torch.randn(2, 1 + 8, 12, generator=generator, dtype=torch.float64) for tap in objective.taps
    }
    with torch.no_grad():
        out = objective(masked, features)
        parts = formula(objective, batch.images, masked, features)
    assert set(out) == {"loss", *parts}
    for name, values in parts.items():
        assert out[name].item() == pytest.approx(mean_of(values), rel=1e-6), name
    direct, generated = (
        mean_of(
            mean_of(values)
            for name, values in parts.items()
            if name.startswith("align/") and name.endswith("-generated") == ends
        )
        for ends in (False, True)
    )
    config = objective.config
    expected = config.pixel_weight * mean_of(parts["pixel"])
    expected += config.direct_weight * direct + config.generative_weight * generated
    assert out["loss"].item() == pytest.approx(expected, rel=1e-6)


def test_every_weight_is_trained_and_mask_tokens_have_no_decay():
    published = AmdConfig(name="amd")
    assert (published.mask_ratio, published.decoder.depth, published.generator.depth) == (0.9, 4, 2)
    objective = small.build(amd(), teacher=SUPERSET)
    assert objective.pairs == ((2, 4), (4, 8)) and objective.taps == ("block/4", "block/8")
    masked = small.prepare(objective, small.make_batch(2))
    features = {tap: torch.randn(2, 9, 12, dtype=torch.float64) for tap in objective.taps}
    objective(masked, features)["loss"].backward()
    assert not [name for name, p in objective.named_parameters() if p.grad is None or not p.grad.any()]
    shares = objective.gradient_shares()
    assert set(shares) == {"share/2", "share/4"} and all(0 < share < 1 for share in shares.values())
    tokens = {name for name, _ in objective.named_parameters() if name.endswith("mask_token")}
    assert len(tokens) == 3 and tokens == set(objective.no_weight_decay)
    frozen = small.build(amd(train_mask_tokens=False, projection="shared"), teacher=SUPERSET)
    assert {name for name, _ in frozen.named_parameters() if name.endswith("mask_token")} == {
        "decoder.mask_token"
    }
    # In the state all the same, or a resumed run would go on with others; the maps are there once.
    state = frozen.state_dict()
    assert "generators.1.mask_token" in state and not [name for name in state if "generative_maps" in name]


@pytest.mark.parametrize("pixels", ["patch", "channel", "raw"])
def test_a_reconstruction_is_in_normalised_pixels(pixels):
    objective = small.build(amd(pixels=pixels), teacher=SUPERSET)
    masked = small.prepare(objective, small.make_batch(2))
    latent = torch.randn(2, 5, small.DIM, dtype=torch.float64)
    loss = objective.pixel_loss(latent, masked)
    error = objective.reconstruct(latent, masked) - masked.masked
    scale = {"patch": (2, 3, 4), "channel": (2, 3)}
    if pixels == "raw":
        units = torch.tensor(1 / reference.STD)
    else:
        units = masked.masked.std(dim=scale[pixels], keepdim=True)
    assert loss.item() == pytest.approx(((error / units) ** 2).mean().item(), rel=1e-4)
    assert objective.norm_pix == (pixels != "raw")


def test_one_dimensional_positions_are_those_of_all_networks():
    objective = small.build(amd(positions="1d"), teacher=SUPERSET)
    for network in (objective.student, objective.decoder, *objective.generators):
        dim, codes = network.pos_embed.shape[2], network.pos_embed[0]
        assert not codes[0].any()
        for place in (0, 7, 15):
            for channel in range(dim):
                angle = place / 10000 ** (channel // 2 * 2 / dim)
                expected = math.cos(angle) if channel % 2 else math.sin(angle)
                assert codes[1 + place, channel].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("objective", "teacher", "words"),
    [
        ({}, {"sees": "all"}, ("teacher.sees=superset", "teacher.mask_ratio")),
        ({}, {**SUPERSET, "mask_ratio": 0.8}, ("teacher.mask_ratio", 3, 4)),
        ({"mask_ratio": 0.5}, SUPERSET, ("teacher.mask_ratio", 8)),
        ({"direct": [[5, 1]]}, SUPERSET, ("objective.direct", 5, 4)),
        ({"generative": [[1, 9]]}, SUPERSET, ("objective.generative", 9, 8)),
        ({"generative": [[1, 2], [1, 2]]}, SUPERSET, ("objective.generative", "twice")),
        ({"generator": {"num_heads": 5}}, SUPERSET, ("objective.generator.num_heads 5", 12)),
    ],
)
def test_what_does_not_fit_is_refused(objective, teacher, words):
    with refused(*words):
        build_objective(small.config_for(amd(**objective), teacher=teacher))


def test_maps_are_shared_by_as_many_pairs_of_both():
    with pytest.raises(ValueError, match="projection=shared"):
        AmdConfig(**amd(projection="shared", direct=[[1, 1]]))
