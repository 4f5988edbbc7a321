"""A vision transformer and MAE's decoder, written from their formulas, one image at a time.

It computes in the dtype of the weights and shares no code with the project: weights come as a state dict,
attention is a loop over heads, patches are cut one by one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MEAN, STD = 0.5, 0.25  # of the pixels, 0 to 1


def patch_of(image: Tensor, place: int, *, size: int) -> Tensor:
    """Return the normalised pixels [3, size, size] of each patch of an image uint8 [3, S, S], row by row."""
    row, column = divmod(place, image.shape[2] // size)
    pixels = image[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
    return (pixels.double() / 255 - MEAN) / STD


def position_of(row: float, column: float, dim: int) -> Tensor:
    """Return [dim]: sines and cosines of the column, then of the row, rounded to float32 as stored."""
    angles = [[place / 10000 ** (k / (dim / 4)) for k in range(dim // 4)] for place in (column, row)]
    return torch.tensor(
        [value for half in angles for value in (*map(math.sin, half), *map(math.cos, half))]
    ).double()


def layer_norm(rows: Tensor, state: dict[str, Tensor], prefix: str) -> Tensor:
    mean = rows.mean(dim=1, keepdim=True)
    variance = ((rows - mean) ** 2).mean(dim=1, keepdim=True)
    return (rows - mean) / (variance + 1e-6) ** 0.5 * state[f"{prefix}.weight"] + state[f"{prefix}.bias"]


def linear(rows: Tensor, state: dict[str, Tensor], prefix: str) -> Tensor:
    return rows @ state[f"{prefix}.weight"].T + state[f"{prefix}.bias"]


def gelu(rows: Tensor) -> Tensor:
    return rows * 0.5 * (1 + torch.erf(rows / 2**0.5))


def block(rows: Tensor, state: dict[str, Tensor], prefix: str, heads: int) -> Tensor:
    dim = rows.shape[1]
    qkv = linear(layer_norm(rows, state, f"{prefix}.norm1"), state, f"{prefix}.attn.qkv")
    found = []
    for head in range(heads):
        q, k, v = (
            qkv[:, part * dim + head * dim // heads : part * dim + (head + 1) * dim // heads]
            for part in range(3)
        )
        found.append(torch.softmax(q @ k.T / (dim / heads) ** 0.5, dim=1) @ v)
    rows = rows + linear(torch.cat(found, dim=1), state, f"{prefix}.attn.proj")
    hidden = gelu(linear(layer_norm(rows, state, f"{prefix}.norm2"), state, f"{prefix}.mlp.fc1"))
    return rows + linear(hidden, state, f"{prefix}.mlp.fc2")


def encode(
    state: dict[str, Tensor],
    image: Tensor,
    places: list[int],
    *,
    size: int,
    heads: int,
    depth: int,
    grid: int,
) -> tuple[Tensor, list[Tensor]]:
    """Return (tokens after the final norm, the residual stream after each block), each [1 + places, D].

    grid: patches on a side of the network's own images; a smaller one is laid over it, patch centres on patch
        centres
    """
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    own = image.shape[2] // size
    tokens = [state["cls_token"][0, 0]]
    for place in places:
        row, column = ((side + 0.5) * grid / own - 0.5 for side in divmod(place, own))
        patch = patch_of(image, place, size=size)
        tokens.append(
            torch.stack([(kernel * patch).sum() for kernel in weight])
            + bias
            + position_of(row, column, len(bias))
        )
    rows, after = torch.stack(tokens), []
    for number in range(depth):
        rows = block(rows, state, f"blocks.{number}", heads)
        after.append(rows)
    return layer_norm(rows, state, "norm"), after


def decode(
    state: dict[str, Tensor], latent: Tensor, places: list[int], *, heads: int, depth: int, grid: int
) -> Tensor:
    """Return the decoder's output [grid * grid, ...] for all patches, in row-major order.

    latent: [1 + K, D] of CLS and the patches at `places`
    """
    embedded = linear(latent, state, "embed")
    tokens = [embedded[0]]
    for place in range(grid * grid):
        token = embedded[1 + places.index(place)] if place in places else state["mask_token"][0, 0]
        tokens.append(token + position_of(*map(float, divmod(place, grid)), embedded.shape[1]))
    rows = torch.stack(tokens)
    for number in range(depth):
        rows = block(rows, state, f"blocks.{number}", heads)
    return linear(layer_norm(rows, state, "norm"), state, "pred")[1:]


def part(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the entries whose names start with "name.", without that prefix."""
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


class AdamW:
    """AdamW by its formula, entry for entry, without decay of biases and 1-D tensors."""

    def __init__(self, weights: dict[str, Tensor], *, betas: tuple[float, float], weight_decay: float):
        self.weights, self.betas, self.decay, self.steps = weights, betas, weight_decay, 0
        self.first, self.second = (
            {name: torch.zeros_like(value) for name, value in weights.items()} for _ in range(2)
        )

    def step(self, gradients: dict[str, Tensor], rates: dict[str, float]) -> None:
        self.steps += 1
        (b1, b2), n = self.betas, self.steps
        for name, weight in self.weights.items():
            decay = self.decay if weight.ndim > 1 and not name.endswith(".bias") else 0.0
            self.first[name] = b1 * self.first[name] + (1 - b1) * gradients[name]
            self.second[name] = b2 * self.second[name] + (1 - b2) * gradients[name] ** 2
            update = self.first[name] / (1 - b1**n) / ((self.second[name] / (1 - b2**n)) ** 0.5 + 1e-8)
            self.weights[name] = weight - rates[name] * decay * weight - rates[name] * update
