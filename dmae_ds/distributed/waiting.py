"""Judge from a rank's Python frames whether it waits for others: in a collective, or for its GPU.

On NCCL a collective waits on the GPU, and the host stands where it next needs the GPU: in a synchronisation,
where it reads a value, or in front of a full queue of launches. There may be no Python frame of its own for
that, so the innermost frame's file, line and instruction are looked at.
"""

from __future__ import annotations

import dis
import functools
import itertools
import os
import re
import threading
from types import CodeType, FrameType
from typing import Iterator

# No launch takes so long, unless the GPU's queue is full.
LAUNCH_S = 10.0
_COLLECTIVES = (f"{os.sep}torch{os.sep}distributed{os.sep}", f"{os.sep}deepspeed{os.sep}comm{os.sep}")
# Calls in which the host waits for a collective; on a GPU, for the kernels before it too.
_CALLS = re.compile(r"\.(wait|synchronize|_cuda_synchronize)\(|\.(item|tolist|cpu)\(\)")
_READS_OF_A_GPU = re.compile(
    r"\.(numpy|isinf|isnan|isfinite|nonzero|equal|any|all)\(|\b(float|int|bool)\("
    r"|\.to\((device=)?[\"']cpu|\.run_backward\("
)
_SYNCHRONIZE = f"{os.sep}torch{os.sep}cuda{os.sep}"
_LAUNCHES = tuple(f"{os.sep}{name}{os.sep}" for name in ("torch", "deepspeed", "timm"))
# Work on the disk, for data or for the compiler, in the same folders.
_NO_LAUNCHES = tuple(
    os.sep + name.replace("/", os.sep)
    for name in ("torch/utils/data/", "torch/serialization.py", "torch/_inductor/", "torch/_dynamo/")
)


class WaitDetector:
    """Judges a rank's frames, once a second.

    main: ident of the thread that trains
    on_gpu: whether tensors are on a GPU, so that reading one waits for the kernels and collectives before it
    """

    def __init__(self, *, main: int, on_gpu: bool):
        self.main, self.on_gpu = main, on_gpu
        self._stack: list[tuple[CodeType, int]] = []  # functions and the instructions they stand at
        self._since = 0.0

    def waits(self, frames: dict[int, FrameType], *, now: float) -> bool:
        """Whether a thread of this rank waits for other ranks or for the GPU.

        frames: of `sys._current_frames`
        now: seconds of any steady clock
        """
        trains = {self.main, *_threads_of_autograd(frames)} if self.on_gpu else {self.main}
        waits = [self._thread_waits(frame, trains=ident in trains) for ident, frame in frames.items()]
        return self._launch_waits(frames.get(self.main), now) or any(waits)

    def _thread_waits(self, frame: FrameType, *, trains: bool) -> bool:
        code = frame.f_code
        if any(folder in code.co_filename for folder in _COLLECTIVES):
            return True
        if _SYNCHRONIZE in code.co_filename and code.co_name == "synchronize":
            return True
        if not trains:
            return False
        line = _line(code.co_filename, frame.f_lineno)
        if _CALLS.search(line):
            return True
        return self.on_gpu and bool(_READS_OF_A_GPU.search(line) or _asks_whether(code, frame.f_lasti))

    def _launch_waits(self, frame: FrameType | None, now: float) -> bool:
        """Whether the rank has stood in one call of torch for so long that it must wait for the GPU."""
        stack = [] if frame is None else list(_functions(frame))
        if stack != self._stack:
            self._stack, self._since = stack, now
        if not self.on_gpu or frame is None or now - self._since < LAUNCH_S:
            return False
        filename = frame.f_code.co_filename
        return any(part in filename for part in _LAUNCHES) and not any(
            part in filename for part in _NO_LAUNCHES
        )


def _functions(frame: FrameType | None) -> Iterator[tuple[CodeType, int]]:
    # Frames themselves are not kept: they would keep tensors alive.
    while frame is not None:
        yield frame.f_code, frame.f_lasti
        frame = frame.f_back


def _threads_of_autograd(frames: dict[int, FrameType]) -> set[int]:
    """Threads that Python has not started: a backward pass on a GPU calls hooks in one."""
    started = {
        thread.ident for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread)
    }
    return set(frames) - started


def _asks_whether(code: CodeType, instruction: int) -> bool:
    """Whether an instruction takes a value's truth, as `if overflow:` does; this reads a tensor."""
    if instruction < 0:  # a frame that is just being entered
        return False
    name = dis.opname[code.co_code[instruction]]
    return name == "UNARY_NOT" or ("JUMP" in name and ("IF_TRUE" in name or "IF_FALSE" in name))


@functools.lru_cache(maxsize=1024)
def _line(filename: str, number: int | None) -> str:
    """A line of a source file, "" where there is none; linecache is not safe in a second thread."""
    if not number:  # a frame that is just being entered
        return ""
    try:
        with open(filename, encoding="utf-8", errors="replace") as file:
            return next(itertools.islice(file, number - 1, None), "")
    except OSError:
        return ""
