"""Which kernels compute a run: what the recipe says, or what is clearly faster; an impossible wish is one line."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from dmae_ds.config.load import load_config
from dmae_ds.distributed import collectives
from dmae_ds.distributed.world import World, threads_per_rank
from dmae_ds.errors import UserError
from dmae_ds.models.onednn import OneDnnLinear
from dmae_ds.train import kernels

CPU = torch.device("cpu")


@pytest.fixture
def choose(monkeypatch):
    monkeypatch.setattr(collectives, "raise_on_all_ranks", lambda step: step())
    monkeypatch.setattr(collectives, "broadcast_from_main", lambda value: value)

    def choose(*overrides, speedup=1.0, device=CPU, zero_stage=2, large=True, before=None):
        monkeypatch.setattr(kernels, "onednn_speedup", lambda: speedup)
        config = load_config("digits_mae", ["data.train=t", *overrides])
        network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        said = kernels.choose_kernels(
            config, network, None, device, zero_stage=zero_stage, large=large, before=before
        )
        changed = sum(isinstance(layer, OneDnnLinear) for layer in network)
        assert said.linear == ("onednn" if changed else "torch")
        return said.text, changed

    return choose


@pytest.mark.parametrize("speedup, large, changed", [(1.9, True, 2), (1.1, True, 0), (1.9, False, 0)])
def test_auto_takes_what_is_clearly_faster_where_it_pays_to_look(choose, speedup, large, changed):
    said, found = choose(speedup=speedup, large=large)
    assert found == changed and ("1.90 times as fast" in said) == bool(changed)


@pytest.mark.parametrize(
    "before, speedup, large, changed",
    [("onednn", 1.0, True, 2), ("onednn", 1.0, False, 2), ("torch", 1.9, True, 0), (None, 1.9, True, 2)],
)
def test_auto_comes_to_the_same_when_a_run_goes_on(choose, before, speedup, large, changed):
    said, found = choose(before=before, speedup=speedup, large=large)
    assert found == changed and ("as before" in said) == (before == "onednn")


@pytest.mark.parametrize("before, linear, changed", [("onednn", "torch", 0), ("torch", "onednn", 2)])
def test_what_the_recipe_says_goes_before_what_was(choose, before, linear, changed):
    assert choose(f"linear={linear}", before=before)[1] == changed


@pytest.mark.parametrize("overrides, where", [([], {"zero_stage": 3}), (["precision=bf16_autocast"], {})])
def test_what_was_is_left_where_it_can_not_be(choose, overrides, where):
    assert choose(*overrides, **where, before="onednn") == ("", 0)


@pytest.mark.parametrize(
    "overrides, where",
    [
        (["linear=torch"], {}),
        (["precision=bf16_autocast"], {}),
        ([], {"zero_stage": 3}),
        ([], {"device": torch.device("cuda")}),
    ],
)
def test_auto_leaves_alone_what_oneDNN_is_not_for(choose, overrides, where):
    assert choose(*overrides, speedup=9.0, **where) == ("", 0)


@pytest.mark.parametrize(
    "overrides, where, words",
    [
        (["precision=bf16_autocast"], {}, "is for precision fp32, found bf16_autocast"),
        (["compile=true"], {}, "and compile=true exclude each other"),
        ([], {"zero_stage": 3}, "ZeRO 3 takes away"),
        ([], {"device": torch.device("cuda")}, "is for CPUs"),
    ],
)
def test_a_wish_that_can_not_be_met_is_one_line(choose, overrides, where, words):
    with pytest.raises(UserError, match=words):
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
def test_ranks_share_the_cores_unless_somebody_says_otherwise(environment, local_size, threads, monkeypatch):
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert threads_per_rank(World(size=local_size, local_size=local_size)) == threads
