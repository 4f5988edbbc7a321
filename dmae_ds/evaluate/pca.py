"""Patch features as colours: their first three principal components as red, green and blue."""

from __future__ import annotations

import torch
from torch import Tensor

NUM_COLOURS = 3


def principal_components(features: Tensor, num: int) -> Tensor:
    """Scores [M, num] float64 of rows [M, D] on the first components, widest first; zeros beyond the rank."""
    features = features.double()
    centred = features - features.mean(dim=0)
    left, sizes, _ = torch.linalg.svd(centred, full_matrices=False)
    scores = left[:, :num] * sizes[:num]
    return torch.nn.functional.pad(scores, (0, num - scores.shape[1]))


def pca_colours(features: Tensor, brightness: Tensor) -> Tensor:
    """Each patch's colour [N, L, 3] uint8, fitted over all N images, so that a colour means the same in each.

    features: [N, L, D]; brightness: [N, L], of the patches
    A component's sign is arbitrary, so each is given the sign with which it grows with brightness: then the
    colours of two networks can be compared. The range of a colour is from its 2nd to its 98th percentile.
    """
    scores = principal_components(features.flatten(0, 1), NUM_COLOURS)  # [N * L, 3]
    light = brightness.flatten().double()
    agreement = scores.T @ (light - light.mean())  # [3]
    scores = scores * torch.where(agreement < 0, -1.0, 1.0)
    low, high = (torch.quantile(scores, share, dim=0) for share in (0.02, 0.98))
    spread = high - low
    shares = torch.where(spread > 1e-9, (scores - low) / spread.clamp(min=1e-9), torch.full_like(scores, 0.5))
    return (255 * shares.clamp(0, 1)).round().to(torch.uint8).unflatten(0, features.shape[:2])
