"""Colours are scikit-learn's principal components, for any rotation of the features."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from dmae_ds.evaluate.pca import pca_colours, principal_components

FEATURES = torch.randn(6, 25, 10, generator=torch.Generator().manual_seed(0)) * torch.arange(10, 0, -1) + 3
BRIGHTNESS = torch.randn(6, 25, generator=torch.Generator().manual_seed(1))


def test_scores_equal_scikit_learns():
    rows = FEATURES.flatten(0, 1)
    expected = PCA(3, svd_solver="full").fit_transform(rows.double().numpy())
    scores = principal_components(rows, 3).numpy()
    signs = np.sign((expected * scores).sum(axis=0))
    np.testing.assert_allclose(scores * signs, expected, atol=1e-9)


def test_rotation_sign_and_scale_do_not_change_the_colours():
    colours = pca_colours(FEATURES, BRIGHTNESS)
    assert colours.shape == (6, 25, 3) and colours.dtype == torch.uint8
    rotation = torch.linalg.qr(torch.randn(10, 10, generator=torch.Generator().manual_seed(2)))[0]
    for changed in (-FEATURES, 5 * FEATURES, FEATURES @ rotation):
        assert (pca_colours(changed, BRIGHTNESS).int() - colours.int()).abs().max() <= 1
    assert (pca_colours(FEATURES, -BRIGHTNESS).int() - (255 - colours.int())).abs().max() <= 1


def test_red_is_the_widest_component_and_grows_with_brightness():
    brightness = torch.linspace(0, 1, 150).reshape(6, 25)
    features = torch.stack([-100 * brightness, torch.rand(6, 25), torch.rand(6, 25)], dim=-1)
    red = pca_colours(features, brightness)[..., 0].flatten().int()
    assert (red.diff() >= 0).all() and red[0] == 0 and red[-1] == 255


@pytest.mark.parametrize("features", [torch.ones(2, 9, 5), torch.ones(2, 9, 2)])
def test_constant_features_are_grey(features):
    assert (pca_colours(features, BRIGHTNESS[:2, :9]) == 128).all()
