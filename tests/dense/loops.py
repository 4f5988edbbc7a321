"""Slow references in float64: convolutions, norms and pooling by loops over every position."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def conv(layer: nn.Conv2d, image: Tensor) -> Tensor:
    """A convolution of stride 1 on one map [C, h, w], padded by zeros."""
    size, pad = layer.kernel_size[0], layer.padding[0]
    _, height, width = image.shape
    padded = torch.zeros(len(image), height + 2 * pad, width + 2 * pad, dtype=image.dtype)
    padded[:, pad : pad + height, pad : pad + width] = image
    result = torch.zeros(layer.out_channels, height, width, dtype=image.dtype)
    for row in range(height):
        for column in range(width):
            seen = padded[:, row : row + size, column : column + size]
            for channel in range(layer.out_channels):
                bias = 0.0 if layer.bias is None else layer.bias[channel]
                result[channel, row, column] = (layer.weight[channel] * seen).sum() + bias
    return result


def twice_as_large(layer: nn.ConvTranspose2d, image: Tensor) -> Tensor:
    """A transposed convolution of size 2 and stride 2 on one map [C, h, w]."""
    _, height, width = image.shape
    result = torch.zeros(layer.out_channels, 2 * height, 2 * width, dtype=image.dtype)
    for row in range(2 * height):
        for column in range(2 * width):
            weight = layer.weight[:, :, row % 2, column % 2]  # [C, C_out]
            result[:, row, column] = image[:, row // 2, column // 2] @ weight + layer.bias
    return result


def norm(layer: nn.LayerNorm, image: Tensor) -> Tensor:
    """A layer norm over the channels of each position of [C, h, w]."""
    result = torch.empty_like(image)
    for row in range(image.shape[1]):
        for column in range(image.shape[2]):
            values = image[:, row, column]
            spread = math.sqrt(((values - values.mean()) ** 2).mean() + layer.eps)
            result[:, row, column] = (values - values.mean()) / spread * layer.weight + layer.bias
    return result


def gelu(image: Tensor) -> Tensor:
    return image * (1 + torch.erf(image / math.sqrt(2))) / 2


def half(image: Tensor) -> Tensor:
    """The largest value of every 2 x 2 positions."""
    result = torch.empty(image.shape[0], image.shape[1] // 2, image.shape[2] // 2, dtype=image.dtype)
    for row in range(result.shape[1]):
        for column in range(result.shape[2]):
            cut = image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            result[:, row, column] = cut.flatten(1).max(dim=1).values
    return result


def rescaled(layers: nn.Module, scale: float, image: Tensor) -> Tensor:
    """One map by the layers of `pyramid.rescale`."""
    if scale == 4:
        first, layer_norm, _, second = layers
        return twice_as_large(second, gelu(norm(layer_norm, twice_as_large(first, image))))
    if scale == 2:
        return twice_as_large(layers, image)
    return image if scale == 1 else half(image)
