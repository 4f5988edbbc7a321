"""Standardised targets, compared with their definitions."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from dmae_ds.teacher.targets import STATS_VERSION, LayerNorm, build_target, hadamard, phi_s_matrix, read_stats
from dmae_ds.tools.teacher_stats import Moments
from tests.messages import refused

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokens():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, generator=generator) * torch.logspace(-1, 1, 12)
    return torch.randn(4000, 12, generator=generator) @ mixing + 5


@pytest.fixture(scope="module")
def stats(tokens):
    moments = Moments()
    for part in tokens.split(700):
        moments.add(part.reshape(-1, 4, 12) if len(part) % 4 == 0 else part)
    return {"block/2.mean": moments.mean(), "block/2.covariance": moments.covariance()}


def test_one_pass_gives_the_mean_and_covariance_of_all(tokens, stats):
    torch.testing.assert_close(stats["block/2.mean"], tokens.double().mean(0))
    torch.testing.assert_close(stats["block/2.covariance"], torch.cov(tokens.double().T, correction=0))


def test_zscore_gives_every_channel_mean_0_and_variance_1(tokens, stats):
    found = build_target("zscore", ("block/2",), stats, CPU)("block/2", tokens[None])[0]
    torch.testing.assert_close(found.mean(0), torch.zeros(12), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.var(0, correction=0), torch.ones(12), rtol=0, atol=1e-3)


def test_phi_s_gives_every_channel_variance_1_by_one_rotation_and_one_scale(tokens, stats):
    found = build_target("phi_s", ("block/2",), stats, CPU)("block/2", tokens[None])[0]
    torch.testing.assert_close(found.mean(0), torch.zeros(12), rtol=0, atol=1e-3)
    torch.testing.assert_close(found.var(0, correction=0), torch.ones(12), rtol=0, atol=1e-3)
    # Distances between tokens keep their ratios: no direction was stretched more than another.
    ratios = torch.cdist(found[:50], found[50:100]) / torch.cdist(tokens[:50], tokens[50:100])
    assert ratios.std() < 1e-4 * ratios.mean()
    rotation = phi_s_matrix(stats["block/2.covariance"])
    torch.testing.assert_close(
        rotation @ rotation.T / (rotation @ rotation.T).diagonal().mean(), torch.eye(12), rtol=0, atol=1e-5
    )


def test_a_channel_that_never_changes_stays_zero(stats):
    covariance = stats["block/2.covariance"].clone()
    covariance[3, :] = covariance[:, 3] = 0
    target = build_target("zscore", ("block/2",), {**stats, "block/2.covariance": covariance}, CPU)
    assert torch.all(target("block/2", torch.randn(1, 5, 12))[..., 3] == 0)


def test_layer_norm_standardises_each_token_by_itself(tokens):
    found = LayerNorm()("block/2", tokens.bfloat16()[None])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.mean(-1), torch.zeros(1, 4000), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.var(-1, correction=0), torch.ones(1, 4000), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "width", [1, 2, 4, 12, 28, 48, 192, 384, 768, 1024, 1152, 1280, 1408, 1536, 1664, 4096]
)
def test_hadamard_matrices_are_orthogonal_with_entries_of_one_size(width):
    matrix = hadamard(width)
    assert torch.all((matrix.abs() * width**0.5 - 1).abs() < 1e-9)
    product = matrix @ matrix.T if width <= 1024 else matrix[:64] @ matrix.T
    torch.testing.assert_close(
        product, torch.eye(width, dtype=torch.float64)[: len(product)], rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("width", [3, 6, 52])
def test_a_width_without_a_known_hadamard_matrix_is_refused(width):
    with refused(f"order {width}", "teacher.standardize=phi_s", "zscore"):
        hadamard(width)


def test_statistics_that_are_missing_damaged_or_of_other_taps_are_refused(tmp_path):
    path = tmp_path / "w.stats.safetensors"
    with refused("teacher.standardize", path, "dmae-ds teacher stats"):
        read_stats(path, ("block/2",))
    tensors = {"block/1.mean": torch.zeros(3), "block/1.covariance": torch.eye(3)}
    save_file(tensors, path, metadata={"about": json.dumps({"version": STATS_VERSION, "taps": ["block/1"]})})
    assert torch.equal(read_stats(path, ("block/1",))[0]["block/1.covariance"], torch.eye(3))
    with refused(path, "block/1", "block/2", "dmae-ds teacher stats"):
        read_stats(path, ("block/2",))
    save_file(
        tensors, path, metadata={"about": json.dumps({"version": STATS_VERSION + 1, "taps": ["block/1"]})}
    )
    with refused(path, "version 2", "dmae-ds teacher stats"):
        read_stats(path, ("block/1",))
    path.write_bytes(path.read_bytes()[:-5])
    with refused(path, "dmae-ds teacher stats"):
        read_stats(path, ("block/1",))
