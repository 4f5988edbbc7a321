"""Cutting images into patches and back, and the normalisation of pixels on the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into non-overlapping patches; works on any dtype, so uint8 stays uint8.

    images: [N, C, H, W], H and W multiples of patch_size
    Returns [N, L, P, P, C]: L patches in row-major order, each as rows, columns, channels.
    """
    num, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    assert (rows * patch_size, columns * patch_size) == (height, width), (
        f"{height}x{width} is not a grid of {patch_size} px patches"
    )
    # [N, C, H, W] -> [N, C, rows, P, columns, P] -> [N, rows, columns, P, P, C] -> [N, L, P, P, C]
    patches = images.reshape(num, channels, rows, patch_size, columns, patch_size)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(num, rows * columns, patch_size, patch_size, channels)


def unpatchify(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Join patches [N, L, P, P, C] of a grid (rows, columns) to images [N, C, H, W]; undoes `patchify`."""
    num, _, patch_size, _, channels = patches.shape
    rows, columns = grid
    # [N, L, P, P, C] -> [N, rows, columns, P, P, C] -> [N, C, rows, P, columns, P] -> [N, C, H, W]
    images = patches.reshape(num, rows, columns, patch_size, patch_size, channels).permute(0, 5, 1, 3, 2, 4)
    return images.reshape(num, channels, rows * patch_size, columns * patch_size)


class Normalize(nn.Module):
    """Normalise uint8 patches [..., C] to float32 ((x / 255) - mean) / std, as one multiply-add a channel."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        mean, std = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self.register_buffer("scale", (1 / (255 * std)).float(), persistent=False)
        self.register_buffer("shift", (-mean / std).float(), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.addcmul(self.shift, pixels.float(), self.scale)
