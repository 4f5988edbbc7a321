"""What a GPU would not like of a step, seen on fake CUDA tensors: mixed devices, reads, copies, waits.

`Watch` sees every operator between the step and torch's FakeTensorMode, and every call that makes the host
wait. A step without a finding queues its kernels and never looks back.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from pathlib import Path
from typing import Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dmae_ds.plan.python_engine import patched
from dmae_ds.plan.trace import launches_kernel

# Operators whose result depends on values, so that the host must read them.
READS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique",
    "unique_",
    "equal.default",
    "is_nonzero",
)
HARNESS = ("watch.py", "accelerator.py", "python_engine.py")
OURS = ("/dmae_ds/", "/deepspeed/", "/tests/")
COMPREHENSIONS = ("<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>")
# Numbers that a fake tensor has no value for, so that a step goes on after a read is noted.
ANSWERS = {"item": 1.0, "__bool__": False, "__float__": 1.0, "__int__": 1, "tolist": []}


class Watch(TorchDispatchMode):
    """Counts kernels and collectives, and keeps findings: {text: count}.

    findings: mixed devices, copies between host and device, reads of values
    pinned_copies: from pinned memory to the device, without a wait
    waits: of the host for the device, by caller
    collectives, sent: number and bytes, by operation and dtype
    host_operators: those that run on the CPU alone
    """

    def __init__(self):
        super().__init__()
        self.kernels: Counter = Counter()
        self.collectives: Counter = Counter()
        self.sent: Counter = Counter()
        self.findings: Counter = Counter()
        self.waits: Counter = Counter()
        self.pinned_copies: Counter = Counter()
        self.host_operators: Counter = Counter()

    @property
    def num_kernels(self) -> int:
        return sum(self.kernels.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        inputs = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        before = {tensor.device.type for tensor in inputs}
        if "cuda" in before and any(read in name for read in READS):
            self.findings[f"read: {name} by {caller()}"] += 1
        if is_boolean_index(name, inputs):
            self.findings[f"read: boolean {name} by {caller()}"] += 1
        is_copy = name.startswith(("_to_copy", "copy_"))
        if before >= {"cpu", "cuda"} and not is_copy:
            self.findings[f"mixed devices: {name} by {caller()}"] += 1
        out = func(*args, **(kwargs or {}))
        outputs = [value for value in tree_iter(out) if isinstance(value, Tensor)]
        devices = before | {tensor.device.type for tensor in outputs}
        if name.startswith("c10d."):
            self._note_collective(name, inputs)
        elif devices == {"cuda"}:
            if launches_kernel(func, {tensor.untyped_storage()._cdata for tensor in inputs}, outputs):
                self.kernels[name] += 1
        elif devices >= {"cpu", "cuda"} and (is_copy or not before >= {"cpu", "cuda"}):
            waits = not (is_from_pinned(inputs) and is_copy and is_non_blocking(args, kwargs))
            (self.findings if waits else self.pinned_copies)[f"copy: {name} by {caller()}"] += 1
        elif devices == {"cpu"}:
            self.host_operators[name] += 1
        return out

    def _note_collective(self, name: str, inputs: list[Tensor]) -> None:
        dtype = str(inputs[0].dtype).removeprefix("torch.") if inputs else ""
        operation = f"{name.split('.')[1].strip('_')} {dtype}".strip()
        self.collectives[operation] += 1
        self.sent[operation] += max((tensor.nbytes for tensor in inputs), default=0)

    @contextlib.contextmanager
    def watching(self) -> Iterator[Watch]:
        """Watch a block, its calls that wait included."""
        waiting = [(torch.cuda, "synchronize", lambda *_, **__: self.wait("device"))]
        for owner in (torch.cuda.Event, torch.cuda.Stream):
            if isinstance(owner, type):  # in driver.py they are replaced, and note their waits themselves
                kind = owner.__name__.lower()
                waiting.append((owner, "synchronize", lambda *_, kind=kind, **__: self.wait(kind)))
        with patched([*waiting, *self._answers()]), self:
            yield self

    def wait(self, kind: str) -> None:
        """Note a wait of the host."""
        self.waits[f"{kind} by {caller()}"] += 1

    def _answers(self) -> list[tuple]:
        """Replacements of what reads a tensor: the read is noted and answered."""

        def answering(name: str, answer):
            real = getattr(Tensor, name)

            def read(tensor, *args, **kwargs):
                if not isinstance(tensor, FakeTensor):
                    return real(tensor, *args, **kwargs)
                if tensor.device.type == "cuda":
                    self.findings[f"read: {name} by {caller()}"] += 1
                return answer

            return read

        return [(Tensor, name, answering(name, answer)) for name, answer in ANSWERS.items()]


def is_from_pinned(inputs: list[Tensor]) -> bool:
    """Whether what lies on the host is in pinned memory (fake_cuda.py marks it)."""
    on_host = [tensor for tensor in inputs if tensor.device.type == "cpu"]
    return bool(on_host) and all(getattr(tensor, "is_pinned_in_fake_cuda", False) for tensor in on_host)


def is_non_blocking(args: tuple, kwargs: dict | None) -> bool:
    """Whether a copy was asked not to wait; `copy_` takes it as its third argument."""
    return bool((kwargs or {}).get("non_blocking", len(args) > 2 and args[2]))


def is_boolean_index(name: str, inputs: list[Tensor]) -> bool:
    """Whether an operator indexes by a mask, whose number of ones the host must know."""
    if not name.startswith(("index.", "index_put")):
        return False
    return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in inputs[1:])


def caller() -> str:
    """File and function of ours, or of DeepSpeed, that is at work: "engine.py train_micro_batch".

    A comprehension counts as the function around it: from Python 3.12 on it has no frame of its own.
    """
    for frame in reversed(traceback.extract_stack()):
        name = Path(frame.filename).name
        ours = any(part in frame.filename for part in OURS) and name not in HARNESS
        if ours and frame.name not in COMPREHENSIONS:
            return f"{name} {frame.name}"
    return "?"
