"""A rank that waits for others or for its GPU is told from one that works, by its Python frames."""

from __future__ import annotations

import _thread
import contextlib
import functools
import sys
import threading
import time

import pytest
import torch

from dmae_ds.distributed.waiting import LAUNCH_S, WaitDetector

BOUND_S = 30  # a bound on hangs

LINES = [
    # (line, waits on a GPU, waits on a CPU)
    ("torch.cuda.synchronize()", True, True),
    ("value.item()", True, True),
    ("event.wait()", True, True),
    ("event.synchronize()", True, True),
    ("value.isinf()", True, False),
    ("value.to('cpu')", True, False),
    ("x = float(value)", True, False),
    ("if value: pass", True, False),
    ("x = not value", True, False),
    ("if value.x or value: pass", True, False),
    ("lock.acquire()", False, False),
    ("print('x', end='') or lock.acquire()", False, False),
]


class Blocks:
    """A value whose methods wait in C code for a lock, as a tensor's wait for its GPU."""

    def __init__(self, lock):
        names = ("__bool__", "__float__", "item", "wait", "synchronize", "isinf", "to")
        wait = functools.partial(next, iter(lock.acquire, None))  # takes an argument, or none
        self.value = type("Value", (), {"x": False, **{name: wait for name in names}})()


@contextlib.contextmanager
def standing_in(path, line, monkeypatch, *, start=None):
    """Run a line of a file in a thread until it waits; gives the thread's ident."""
    lock, begun = threading.Lock(), threading.Event()
    lock.acquire()
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_synchronize", lock.acquire, raising=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"def run(torch, value, event, lock, idents, begun):\n    begun()\n    {line}\n")
    names = {}
    exec(compile(path.read_text(), str(path), "exec"), names)
    value, idents = Blocks(lock).value, []

    def run():
        idents.append(threading.get_ident())
        with contextlib.suppress(TypeError):  # `__float__` gives no float once the lock is free
            names["run"](torch, value, value, lock, idents, begun.set)

    if start is None:
        threading.Thread(target=run, daemon=True).start()
    else:
        start(run, ())
    assert begun.wait(BOUND_S)
    try:
        yield idents[0]
    finally:
        lock.release()
        while idents[0] in sys._current_frames():
            time.sleep(0.01)


def found(detector: WaitDetector, *, waits: bool) -> bool:
    """Whether a thread is found waiting, as it should be or not; it may not have reached its line yet."""
    for _ in range(100 * BOUND_S if waits else 5):
        if detector.waits(sys._current_frames(), now=0.0):
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize(("line", "on_gpu", "on_cpu"), LINES, ids=[line for line, _, _ in LINES])
def test_where_a_rank_stands_tells_whether_it_waits(tmp_path, monkeypatch, line, on_gpu, on_cpu):
    with standing_in(tmp_path / "lines.py", line, monkeypatch) as ident:
        assert found(WaitDetector(main=ident, on_gpu=True), waits=on_gpu) == on_gpu
        assert found(WaitDetector(main=ident, on_gpu=False), waits=on_cpu) == on_cpu


def test_a_hook_in_a_thread_of_autograd_is_looked_at_and_a_thread_of_the_loader_is_not(tmp_path, monkeypatch):
    detector = WaitDetector(main=threading.get_ident(), on_gpu=True)
    with standing_in(tmp_path / "a.py", "value.item()", monkeypatch, start=_thread.start_new_thread):
        assert found(detector, waits=True)
    with standing_in(tmp_path / "b.py", "value.item()", monkeypatch):
        assert not found(detector, waits=False)


@pytest.mark.parametrize(
    ("file", "on_gpu", "waits"),
    [
        ("torch/nn/linear.py", True, True),
        ("torch/nn/linear.py", False, False),
        ("torch/utils/data/loader.py", True, False),
        ("elsewhere/save.py", True, False),
    ],
)
def test_a_launch_that_takes_long_waits_for_the_gpu(tmp_path, monkeypatch, file, on_gpu, waits):
    with standing_in(tmp_path / file, "lock.acquire()", monkeypatch) as ident:
        detector = WaitDetector(main=ident, on_gpu=on_gpu)
        assert not found(detector, waits=False)
        assert detector.waits(sys._current_frames(), now=LAUNCH_S + 1) == waits
