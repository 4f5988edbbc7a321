"""CKA follows its definition and is invariant to rotation, scale and shift."""

import numpy as np
import pytest
import torch

from dmae_ds.evaluate.cka import cka_grid, u_centred_gram
from tests.messages import refused


def make(num, width, seed):
    return torch.randn(num, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def hsic_of_song(first, second):
    """Song et al. 2012, Eq. 4, from Gram matrices with a diagonal of zeros."""
    K, L = ((features @ features.T).numpy() for features in (first, second))
    np.fill_diagonal(K, 0)
    np.fill_diagonal(L, 0)
    n, one = len(K), np.ones(len(K))
    product = (
        np.trace(K @ L)
        + (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (one @ K @ L @ one)
    )
    return product / (n * (n - 3))


def plain_cka(first, second):
    """Kornblith et al. 2019, Eq. 4 with centred linear kernels."""
    first, second = (features - features.mean(0) for features in (first, second))
    return ((first.T @ second).norm() ** 2 / ((first.T @ first).norm() * (second.T @ second).norm())).item()


@pytest.mark.parametrize("num, width, other", [(4, 2, 3), (9, 1, 30), (25, 7, 7), (60, 40, 12)])
def test_cka_equals_its_definition_by_gram_matrices(num, width, other):
    first, second = make(num, width, 0) + 1.5, make(num, other, 1)
    second[:, 0] += 2 * first[:, 0]
    expected = hsic_of_song(first, second) / np.sqrt(
        hsic_of_song(first, first) * hsic_of_song(second, second)
    )
    assert cka_grid([first], [second]).item() == pytest.approx(expected, rel=1e-9)


def test_many_tokens_of_narrow_features_give_the_plain_estimate():
    first = make(2000, 6, 0)
    second = torch.cat([first[:, :3], make(2000, 4, 1)], dim=1)
    assert cka_grid([first], [second]).item() == pytest.approx(plain_cka(first, second), abs=5e-3)


def test_independent_wide_features_are_near_zero_where_the_plain_estimate_is_not():
    first, second = make(200, 300, 0), make(200, 500, 1)
    assert plain_cka(first, second) > 0.6
    assert abs(cka_grid([first], [second]).item()) < 0.05


def test_rotation_scale_and_shift_change_nothing_but_the_scale_of_one_direction_does():
    first, second = make(50, 8, 0), make(50, 8, 1) + make(50, 8, 0)
    expected = cka_grid([first], [second]).item()
    rotation = torch.linalg.qr(make(8, 8, 2))[0]
    for changed in (second @ rotation, 7.5 * second, second + 100, -second):
        assert cka_grid([first], [changed]).item() == pytest.approx(expected, rel=1e-9)
    assert cka_grid([first], [first @ rotation * 3 - 1]).item() == pytest.approx(1)
    stretched = second * torch.tensor([5.0] + 7 * [1.0])
    assert cka_grid([first], [stretched]).item() != pytest.approx(expected, rel=1e-2)


def test_the_grid_has_a_row_per_feature_and_swapping_the_arguments_transposes_it():
    features = [make(30, width, width) for width in (2, 5, 9)]
    grid = cka_grid(features[:2], features)
    assert grid.shape == (2, 3) and grid[0, 0] == pytest.approx(1) and grid[1, 1] == pytest.approx(1)
    assert torch.allclose(cka_grid(features, features[:2]), grid.T)


def test_float32_features_and_constant_features():
    first = make(40, 6, 0)
    assert cka_grid([first.float()], [first.float() * 2]).item() == pytest.approx(1, abs=1e-6)
    assert cka_grid([first], [torch.ones(40, 3)]).item() == 0


def test_centred_grams_have_rows_that_sum_to_zero_and_three_tokens_are_refused():
    gram = u_centred_gram(make(12, 5, 0))
    assert gram.sum(dim=0).abs().max() < 1e-12 and gram.diagonal().abs().max() == 0
    with refused(3, 4, error=ValueError):
        cka_grid([make(3, 2, 0)], [make(3, 2, 1)])
