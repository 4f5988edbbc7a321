"""Bytes, memory and seconds of loading a cut teacher on this machine, compared with the least that it needs.

    dmae-ds bench teacher-load [--name vit_huge_patch14_224] [--stages 1 2 4] [--folder DIR]

A whole MAE file is made as .pth and as .safetensors; then every stage of every pipeline length is loaded by
its own process. This takes minutes. Seconds belong to one machine; the ratios are what to look at.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Iterator

from dmae_ds.bench.measure import Load, measure
from dmae_ds.bench.random_files import mae_shapes, make_files, num_bytes
from dmae_ds.errors import RunFailed, UserError
from dmae_ds.output.table import text_table
from dmae_ds.output.units import MIB
from dmae_ds.teacher.frozen import meta_teacher
from dmae_ds.teacher.stages import held_blocks

MAX_READ = 1.02  # bytes read / bytes needed: the file's header (names, shapes, places) is read too
MAX_PEAK = 1.10  # (peak - PEAK_CONSTANT) / bytes kept
PEAK_CONSTANT = 64 * MIB  # allocator and thread pools, for a teacher of any size

Loads = dict[tuple[str, int, int, str], Load]  # (container, P, stage, its blocks), both counted from 1


def bench_teacher_load(name: str, *, last_block: int | None, stages: list[int], folder: Path | None) -> str:
    """Measure every stage of every length in `stages`; returns the table and the two verdicts, to print.

    last_block: the deepest tapped block, counted from 1; None: three quarters of the depth, as in recipes
    folder: a folder for the two files, which stay there and are used again; None: a temporary one
    Raises UserError for an unknown network, an impossible cut, a folder that can't be written, and off Linux.
    """
    if sys.platform != "linux" or not os.access("/proc/self/io", os.R_OK):
        raise UserError(
            "bench teacher-load requires Linux's /proc/self/io, which can't be read here; run it on Linux"
        )
    shapes, depth = mae_shapes(name), meta_teacher(name, {}).depth
    last_block = max(1, depth * 3 // 4) if last_block is None else last_block
    if not 1 <= last_block <= depth:
        raise UserError(f"--last-block {last_block} is not a block of {name}; choose from 1 to {depth}")
    cuts = {num_stages: held_blocks(last_block, num_stages) for num_stages in stages}
    loads = {}
    with _open_folder(folder) as place:
        for path in make_files(place, name, shapes):
            for num_stages, cut in cuts.items():
                for stage, blocks in enumerate(cut, start=1):
                    row = (path.suffix, num_stages, stage, f"{blocks.start + 1}-{blocks.stop}")
                    loads[row] = _measure_in_process(path, name, last_block, blocks)
    title = (
        f"{name}: blocks 1-{last_block} of {depth} in fp32, from a whole MAE file of "
        f"{num_bytes(shapes) / MIB:.0f} MiB"
    )
    return "\n\n".join([title, table(loads), verdicts(loads)])


@contextmanager
def _open_folder(folder: Path | None) -> Iterator[Path]:
    """Give the folder of the files. Raises UserError for every error of the file system in it."""
    try:
        if folder is None:
            with TemporaryDirectory(prefix="dmae-ds-bench-") as temporary:
                yield Path(temporary)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            yield folder
    except OSError as error:
        raise UserError(
            f"the weights files can't be written: {error}; choose a writable --folder with enough space"
        ) from None


def _measure_in_process(path: Path, name: str, last_block: int, blocks: range) -> Load:
    """Run `measure` in a new process, so that its peak memory is that of the load."""
    words = json.dumps([str(path), name, last_block, blocks.start, blocks.stop])
    command = [
        sys.executable,
        "-c",
        "from dmae_ds.bench.teacher_load import measure_here; measure_here()",
        words,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RunFailed(
            f"measuring blocks {blocks.start + 1}-{blocks.stop} of {path} ended with exit code "
            f"{done.returncode}; "
            "its own message is above"
        )
    return Load(**json.loads(done.stdout.splitlines()[-1]))


def measure_here() -> None:
    """Run `measure` in the new process of `_measure_in_process`."""
    path, name, last_block, first, stop = json.loads(sys.argv[1])
    print(
        json.dumps(asdict(measure(Path(path), name=name, last_block=last_block, blocks=range(first, stop))))
    )


def _ratios(load: Load) -> tuple[float, ...]:
    return load.read / load.needed, load.disk / load.needed, load.peak / load.kept, load.load_s / load.floor_s


def table(loads: Loads) -> str:
    """One row a stage, then the worst of each ratio for every container and length, in aligned columns."""
    heads = ("file", "P", "stage", "blocks")
    sizes = ("needed", "read", "disk", "kept", "peak")
    ratios = ("read/needed", "disk/needed", "peak/kept", "load/floor")
    rows = [(*heads, *sizes, "load", "floor", *ratios)]
    rows += [("", "", "", "", *["MiB"] * 5, "s", "s", *[""] * 4)]
    worst: dict[tuple[str, int], tuple[float, ...]] = {}
    for (container, num_stages, stage, blocks), load in loads.items():
        sizes = [f"{size / MIB:.1f}" for size in (load.needed, load.read, load.disk, load.kept, load.peak)]
        seconds = [f"{load.load_s:.2f}", f"{load.floor_s:.2f}"]
        ratios = _ratios(load)
        cells = [*sizes, *seconds, *(f"{ratio:.3f}" for ratio in ratios)]
        rows.append((container, f"{num_stages}", f"{stage}", blocks, *cells))
        highest = worst.get((container, num_stages), ratios)
        worst[container, num_stages] = tuple(map(max, ratios, highest))
    for (container, num_stages), ratios in worst.items():
        rows.append((container, f"{num_stages}", "worst", *[""] * 8, *(f"{ratio:.3f}" for ratio in ratios)))
    return "\n".join(text_table(rows))


def verdicts(loads: Loads) -> str:
    """Whether both limits are kept, and a warning where the columns of the disk are meaningless."""
    reads = {row: load.read / load.needed for row, load in loads.items()}
    peaks = {row: (load.peak - PEAK_CONSTANT) / load.kept for row, load in loads.items()}
    most, highest = max(reads, key=reads.get), max(peaks, key=peaks.get)
    is_read, is_peak = reads[most] <= MAX_READ, peaks[highest] <= MAX_PEAK
    lines = [
        f"bytes read within 2% of needed: {'yes' if is_read else 'NO'}, {reads[most]:.4f} at most "
        f"({_name(most)})",
        f"peak within 10% of kept plus 64 MiB: {'yes' if is_peak else 'NO'}, "
        f"{loads[highest].peak / MIB:.0f} MiB for "
        f"{loads[highest].kept / MIB:.0f} kept where it is closest ({_name(highest)})",
    ]
    if not all(load.was_cold for load in loads.values()):
        lines.append(
            "the files stayed in the page cache (a file system in memory?): the columns disk, load and "
            "floor mean nothing"
        )
    return "\n".join(lines)


def _name(row: tuple[str, int, int, str]) -> str:
    container, num_stages, stage, _ = row
    return f"{container}, P {num_stages}, stage {stage}"
