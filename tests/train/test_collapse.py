"""Effective rank of known spectra, and a monitor that observes the student and changes nothing."""

import math

import pytest
import torch

from dmae_ds.models.vit import build_student
from dmae_ds.objectives.spread import spread
from dmae_ds.train.collapse import MIN_ROWS, CollapseMonitor, effective_rank

SHAPE = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2}


def with_spectrum(variances, num):
    """Draw [num, len(variances)]: centred orthogonal columns with these variances."""
    draw = torch.randn(num, len(variances), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    directions = torch.linalg.qr(draw - draw.mean(dim=0))[0]
    return directions * torch.tensor(variances, dtype=torch.float64).sqrt()


@pytest.mark.parametrize("num", [40, 9])  # more rows than columns, and fewer
@pytest.mark.parametrize(
    "variances, rank",
    [
        ([1.0] * 8, 8),
        ([1.0] + [0.0] * 11, 1),
        ([2.0, 2.0, 2.0] + [0.0] * 9, 3),
        ([0.5, 0.25, 0.25], math.exp(0.5 * math.log(2) + 0.5 * math.log(4))),
    ],
)
def test_effective_rank_of_known_spectra(variances, rank, num):
    features = with_spectrum([variance for variance in variances if variance], num)
    features = torch.nn.functional.pad(features, (0, len(variances) - features.shape[1]))
    assert effective_rank(features).item() == pytest.approx(rank, rel=1e-3)
    generator = torch.Generator().manual_seed(1)
    square = torch.randn(len(variances), len(variances), dtype=torch.float64, generator=generator)
    rotation = torch.linalg.qr(square)[0]
    assert effective_rank(1e-3 * features @ rotation + 0.01).item() == pytest.approx(rank, rel=1e-2)


def test_one_point_has_rank_one_in_spite_of_rounding():
    point = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    noise = 1e-7 * torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    assert effective_rank(point + noise).item() == 1
    assert effective_rank(noise).item() > 10
    assert effective_rank(point).item() == 1 and effective_rank(torch.zeros(5, 4)).item() == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_feature_that_is_not_finite_has_no_rank_and_raises_nothing(bad):
    features = torch.ones(20, 4)
    features[3, 1] = bad
    assert math.isnan(effective_rank(features).item())


@pytest.fixture
def student():
    return build_student("vit_tiny_patch16_224", SHAPE, generator=torch.Generator().manual_seed(0)).train()


def run(student, num, seed=0, taps=(2,)):
    patches = torch.randn(num, 4, 4, 4, 3, generator=torch.Generator().manual_seed(seed))
    return student(patches, torch.arange(4).expand(num, -1), taps)


def test_the_micro_batches_of_a_step_are_measured_together(student):
    monitor = CollapseMonitor(student)
    monitor.active = True
    outputs = [run(student, 12, seed) for seed in (0, 1)]
    found = monitor.measure()
    latent = torch.cat([latent for latent, _ in outputs])
    tapped = torch.cat([tapped[2] for _, tapped in outputs])
    assert list(found) == ["rank/mean", "rank/cls", "spread/mean", "spread/cls", "norm/2", "norm/3"]
    assert found["rank/mean"].item() == pytest.approx(
        effective_rank(latent[:, 1:].mean(dim=1)).item(), rel=1e-4
    )
    assert found["rank/cls"].item() == pytest.approx(effective_rank(latent[:, 0]).item(), rel=1e-4)
    assert found["spread/cls"].item() == pytest.approx(spread(latent[:, 0]).item(), rel=1e-4)
    assert found["norm/2"].item() == pytest.approx(tapped.norm(dim=-1).mean().item(), rel=1e-5)
    last = student.blocks[2](tapped)  # the residual stream, before the final norm
    assert found["norm/3"].item() == pytest.approx(last.norm(dim=-1).mean().item(), rel=1e-5)
    assert monitor.measure() == {} and not any(value.requires_grad for value in found.values())


def test_few_images_have_no_rank_and_a_tapped_last_block_has_one_norm(student):
    monitor = CollapseMonitor(student)
    monitor.active = True
    run(student, MIN_ROWS - 1, taps=(3,))
    assert list(monitor.measure()) == ["norm/3"]
    run(student, MIN_ROWS)
    assert "rank/mean" in monitor.measure()


def test_an_inactive_monitor_and_an_evaluation_measure_nothing(student):
    monitor = CollapseMonitor(student)
    run(student, 20)
    assert monitor.measure() == {}
    monitor.active = True
    run(student.eval(), 20)
    assert monitor.measure() == {}


def test_monitoring_changes_no_bit_of_output_or_gradient(student):
    def step():
        student.zero_grad()
        latent, tapped = run(student, 20)
        (latent.square().sum() + tapped[2].abs().sum()).backward()
        return [latent.detach(), *(parameter.grad.clone() for parameter in student.parameters())]

    before = step()
    monitor = CollapseMonitor(student)
    monitor.active = True
    state = torch.random.get_rng_state()
    assert all(torch.equal(one, other) for one, other in zip(before, step(), strict=True))
    monitor.measure()
    assert torch.equal(state, torch.random.get_rng_state())
