"""The process group: one of one rank leaves no trace, and on GPUs each rank has its own."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

from dmae_ds.distributed import process_group
from dmae_ds.distributed.own_gpu import choose_gpu
from dmae_ds.distributed.world import World
from dmae_ds.errors import UserError
from tests.messages import refused


@pytest.mark.parametrize("error", [None, UserError("a mistake")])
def test_a_group_of_one_leaves_no_trace_in_the_environment(monkeypatch, error):
    """An evaluation that follows in the same process must not find a launcher's variables."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "7")
    before = dict(os.environ)
    try:
        with process_group.joined(World(), timeout_s=60):
            assert os.environ["RANK"] == os.environ["LOCAL_RANK"] == "0"
            if error:
                raise error
    except UserError as raised:
        assert raised is error
    assert dict(os.environ) == before and not distributed.is_initialized()


def test_a_rank_without_a_gpu_of_its_own_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    assert process_group._set_device(World(rank=1, size=4, local_rank=1, local_size=4)).index == 1
    for local_rank in (2, 3):
        with refused("2 here", "or its own alone"):
            process_group._set_device(World(rank=local_rank, size=4, local_rank=local_rank, local_size=4))


@pytest.mark.parametrize("has_gpus", [False, True])
def test_ranks_of_a_node_share_its_cores_with_and_without_gpus(monkeypatch, has_gpus):
    threads, current = [], []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpus)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    device = process_group._set_device(World(rank=3, size=4, local_rank=3, local_size=4))
    assert threads == [3]
    assert device == torch.device("cuda:3" if has_gpus else "cpu") and current == (
        [device] if has_gpus else []
    )


@pytest.fixture
def fake_gpus(monkeypatch):
    """Let one GPU be found; gives the options with which a process group would be made."""
    options = {}
    uuid = SimpleNamespace(uuid="GPU-1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda num: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: uuid)
    monkeypatch.setattr(distributed, "init_process_group", lambda **given: options.update(given))
    monkeypatch.setattr(process_group, "Heartbeat", lambda **given: options.update(watch=given))
    monkeypatch.setattr(process_group, "_watch", None)
    monkeypatch.setattr(process_group, "_backend", "gloo")
    monkeypatch.setattr(process_group, "_environment_before", {})
    return options


def test_nccl_knows_its_gpu_and_its_watchdog_comes_after_the_heartbeat(monkeypatch, fake_gpus):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    device = process_group.start(World(), timeout_s=30)
    assert device == fake_gpus["device_id"] == torch.device("cuda", 0) and fake_gpus["backend"] == "nccl"
    assert fake_gpus["timeout"] == process_group.timeout() > timedelta(seconds=90)


@pytest.mark.parametrize("other_gpu", ["GPU-1", "GPU-2"])
def test_a_rank_takes_the_only_gpu_that_it_sees_unless_another_has_it(monkeypatch, fake_gpus, other_gpu):
    store = distributed.HashStore()
    store.set("gpu/2", other_gpu)
    monkeypatch.setattr(distributed, "rendezvous", lambda *_, **__: iter([(store, 3, 4)]))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    world = World(rank=3, size=4, local_rank=1, local_size=2)
    if other_gpu == "GPU-1":
        with pytest.raises(UserError, match=r"rank 3 .* rank 2 .*GPU-1"):
            process_group.start(world)
        return
    assert process_group.start(world) == torch.device("cuda", 0)
    assert os.environ["LOCAL_RANK"] == "0"  # DeepSpeed takes the GPU of this number
    assert fake_gpus["store"] is store and fake_gpus["watch"]["local_rank"] == 1
    assert store.get("gpu/3") == b"GPU-1" and fake_gpus["watch"]["on_gpu"]


def test_a_rank_beyond_the_visible_gpus_is_refused():
    assert choose_gpu(World(5, 8, 1, 4), num_visible=2) == 1
    with pytest.raises(UserError, match=r"rank 7 .*2 here"):
        choose_gpu(World(7, 8, 3, 4), num_visible=2)


@pytest.mark.parametrize("value", ["cpu", "gpu"])
def test_a_variable_hides_the_gpus(value):
    """Also where a launcher lists them, as DeepSpeed's does."""
    program = (
        "import os, sys; from dmae_ds.cli.main import main;"
        "print(repr(os.environ['CUDA_VISIBLE_DEVICES'])); sys.exit(main(['train']))"  # without a recipe
    )
    environment = {**os.environ, "DMAE_DS_DEVICE": value, "CUDA_VISIBLE_DEVICES": "0,1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout.startswith("''" if value == "cpu" else "'0,1'")
    assert ("DMAE_DS_DEVICE" in done.stderr) == (value == "gpu")
