"""A DeepSpeed accelerator that says "cuda" and has no device, and torch's fake process group of 8 ranks.

It patches torch and DeepSpeed for good, so it belongs into a process of its own (driver.py).
"""

from __future__ import annotations

import contextlib
import os
from typing import Callable

os.environ.update(
    DS_ACCELERATOR="cpu", RANK="0", LOCAL_RANK="0", WORLD_SIZE="8", MASTER_ADDR="localhost", MASTER_PORT="0"
)

import torch
from torch import distributed, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

WORLD_SIZE = 8
note_wait: list[Callable[[str], None]] = [lambda kind: None]  # the last one is told what the host waits for


class Nothing:
    """A stream or event: whoever waits for it with the host is noted."""

    def __init__(self, kind: str = "stream"):
        self._kind = kind

    def synchronize(self, *args) -> None:
        note_wait[-1](self._kind)

    def query(self) -> bool:
        return True

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        pass

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def install() -> None:
    """Join the fake process group as rank 0 of 8, and make DeepSpeed believe in a GPU."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD_SIZE)
    import deepspeed
    from deepspeed.accelerator import real_accelerator, set_accelerator
    from deepspeed.runtime.zero import partitioned_param_coordinator

    real_accelerator.ds_accelerator = None
    set_accelerator(_accelerator())
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # ZeRO-3 compares what it saw with the other ranks, in the first step only.
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda ints: None
    nn.Module._apply = _apply
    torch.Tensor.record_stream = lambda tensor, stream: None
    torch.cuda.current_device = lambda: 0
    torch.cuda.set_device = lambda device: None
    torch.cuda.Stream = lambda *args, **kwargs: Nothing("stream")
    torch.cuda.Event = lambda *args, **kwargs: Nothing("event")
    torch.cuda.current_stream = lambda *args: Nothing("stream")
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.synchronize = lambda *args: note_wait[-1]("device")


_apply_for_real = nn.Module._apply


def _apply(module: nn.Module, function, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` that keeps the objects of fake parameters, as the real one does those of others."""
    if not any(isinstance(parameter, FakeTensor) for parameter in module.parameters()):
        return _apply_for_real(module, function, recurse)
    for child in module.children():
        child._apply(function)
    for parameter in module._parameters.values():
        if parameter is not None:
            value = function(parameter.data)
            if value.dtype != parameter.dtype or value.device != parameter.device:
                parameter.data = value
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def _accelerator():
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    answers = {
        "is_synchronized_device": False,
        "use_host_timers": False,
        "resolves_data_dependency": False,
        "handles_memory_backpressure": False,
        "set_device": None,
        "current_device": 0,
        "current_device_name": "cuda:0",
        "device_count": WORLD_SIZE,
        "is_bf16_supported": True,
        "is_fp16_supported": True,
        "is_available": True,
        "total_memory": 80 << 30,
        "available_memory": 80 << 30,
    }

    class FakeCuda(CPU_Accelerator):
        def __init__(self):
            super().__init__()
            self._name, self._communication_backend_name = "cuda", "nccl"

        def device_name(self, device_index=None) -> str:
            return "cuda" if device_index is None else f"cuda:{device_index}"

        def device(self, device_index=None):
            return contextlib.nullcontext()

        def synchronize(self, device_index=None) -> None:
            note_wait[-1]("device")

        def Stream(self, *args, **kwargs):
            return Nothing("stream")

        def stream(self, stream):
            return contextlib.nullcontext()

        def current_stream(self, device_index=None):
            return Nothing("stream")

        def default_stream(self, device_index=None):
            return Nothing("stream")

        @property
        def Event(self):
            return lambda *args, **kwargs: Nothing("event")

        def on_accelerator(self, tensor) -> bool:
            return tensor.device.type == "cuda"

        def pin_memory(self, tensor, align_bytes=1):
            return tensor

    for name, value in answers.items():
        setattr(FakeCuda, name, lambda self, *args, value=value: value)
    return FakeCuda()
