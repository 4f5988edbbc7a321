"""TF32 and deterministic kernels: what a key sets on GPUs, and that CPUs keep torch's defaults."""

from __future__ import annotations

import os

import pytest
import torch

from dmae_ds.models.numerics import choose_determinism, choose_tf32, fp32_products

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    choose_determinism(False)


@pytest.mark.parametrize("tf32, precision", [(True, "high"), (False, "highest")])
def test_tf32_is_chosen_on_gpus_and_said_there(tf32, precision):
    assert choose_tf32(not tf32, CPU) == ""
    assert torch.get_float32_matmul_precision() == "highest"
    text = choose_tf32(tf32, GPU)
    assert torch.get_float32_matmul_precision() == precision
    assert torch.backends.cudnn.allow_tf32 == tf32
    assert ("TF32" in text) == tf32 and ("tf32=false" in text) == (not tf32)


def test_a_block_has_products_of_its_own():
    choose_tf32(True, GPU)
    with fp32_products(GPU, tf32=False):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "high"
    with fp32_products(CPU, tf32=False):
        assert torch.get_float32_matmul_precision() == "high"


def test_deterministic_kernels_are_strict_and_turned_off_again():
    assert choose_determinism(True) == "deterministic kernels"
    assert torch.are_deterministic_algorithms_enabled()
    # With warn_only, attention's backward would still add in any order.
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert choose_determinism(False) == ""
    assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.deterministic
