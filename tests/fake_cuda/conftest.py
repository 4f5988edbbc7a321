"""These tests need a torch that can fake CUDA; others are named, not passed over in silence."""

from __future__ import annotations

import pytest

from dmae_ds.plan.fake_cuda import obstacle


@pytest.fixture(autouse=True, scope="session")
def fake_cuda() -> None:
    """Skip with torch's own reason where it cannot fake CUDA."""
    if obstacle():
        pytest.skip(f"torch cannot fake CUDA here: {obstacle()}")
