"""Kernels of a run: those of the recipe, or those that are clearly faster; what is impossible is refused."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from dmae_ds.config.load import load_config
from dmae_ds.distributed import collectives
from dmae_ds.distributed.world import World, threads_per_rank
from dmae_ds.models.onednn import OneDnnLinear
from dmae_ds.train import kernels
from tests.messages import refused

CPU = torch.device("cpu")


@pytest.fixture
def choose(monkeypatch):
    monkeypatch.setattr(collectives, "raise_on_all_ranks", lambda step: step())
    monkeypatch.setattr(collectives, "broadcast_from_main", lambda value: value)

    def choose(*overrides, speedup=1.0, device=CPU, zero_stage=2, large=True, previous=None):
        monkeypatch.setattr(kernels, "onednn_speedup", lambda: speedup)
        config = load_config("digits_mae", ["data.train=t", *overrides])
        network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        chosen = kernels.choose_kernels(
            config, [network, None], device, zero_stage=zero_stage, is_large=large, previous=previous
        )
        num_changed = sum(isinstance(layer, OneDnnLinear) for layer in network)
        assert chosen.linear == ("onednn" if num_changed else "torch")
        return chosen.text, num_changed

    return choose


@pytest.mark.parametrize("speedup, large, changed", [(1.9, True, 2), (1.1, True, 0), (1.9, False, 0)])
def test_auto_times_large_networks_and_takes_what_is_clearly_faster(choose, speedup, large, changed):
    text, num_changed = choose(speedup=speedup, large=large)
    assert num_changed == changed and ("1.90" in text) == bool(changed)


@pytest.mark.parametrize(
    "previous, speedup, large, changed",
    [("onednn", 1.0, True, 2), ("onednn", 1.0, False, 2), ("torch", 1.9, True, 0), (None, 1.9, True, 2)],
)
def test_auto_keeps_the_kernels_of_the_run_that_is_resumed(choose, previous, speedup, large, changed):
    text, num_changed = choose(previous=previous, speedup=speedup, large=large)
    assert num_changed == changed and ("as before" in text) == (previous == "onednn")


@pytest.mark.parametrize("previous, linear, changed", [("onednn", "torch", 0), ("torch", "onednn", 2)])
def test_the_recipe_goes_before_the_previous_choice(choose, previous, linear, changed):
    assert choose(f"linear={linear}", previous=previous)[1] == changed


@pytest.mark.parametrize("overrides, where", [([], {"zero_stage": 3}), (["precision=bf16_autocast"], {})])
def test_the_previous_choice_is_dropped_where_it_is_impossible(choose, overrides, where):
    assert choose(*overrides, **where, previous="onednn") == ("", 0)


@pytest.mark.parametrize(
    "overrides, where",
    [
        (["linear=torch"], {}),
        (["precision=bf16_autocast"], {}),
        ([], {"zero_stage": 3}),
        ([], {"device": torch.device("cuda")}),
    ],
)
def test_auto_does_not_use_onednn_where_it_is_impossible(choose, overrides, where):
    assert choose(*overrides, speedup=9.0, **where) == ("", 0)


@pytest.mark.parametrize(
    "overrides, where, words",
    [
        (["precision=bf16_autocast"], {}, ["precision", "fp32", "bf16_autocast"]),
        (["compile=true"], {}, ["compile=true"]),
        ([], {"zero_stage": 3}, ["ZeRO 3"]),
        ([], {"device": torch.device("cuda")}, ["CPU"]),
    ],
)
def test_impossible_kernels_are_refused(choose, overrides, where, words):
    with refused("linear=onednn", "linear=auto", *words):
        choose("linear=onednn", *overrides, **where)


@pytest.mark.parametrize(
    "environment, local_size, threads",
    [
        ({}, 1, 6),
        ({}, 2, 3),
        ({}, 9, 1),
        ({"OMP_NUM_THREADS": "4"}, 2, 4),
        ({"OMP_NUM_THREADS": "1"}, 2, 1),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 2, 3),
    ],
)
def test_ranks_share_the_cores_unless_a_variable_is_set(environment, local_size, threads, monkeypatch):
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert threads_per_rank(World(size=local_size, local_size=local_size)) == threads
