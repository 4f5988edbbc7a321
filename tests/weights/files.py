"""Small weights files for tests."""

from __future__ import annotations

import torch


def tensors() -> dict[str, torch.Tensor]:
    """Three tensors, always the same."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (5, 7), "b": (3,), "c": (2, 2, 4)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
