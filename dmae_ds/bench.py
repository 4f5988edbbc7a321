"""What the load of a cut teacher costs on this machine, as ratios to what it can't do without.

    dmae-ds bench teacher-load [--name vit_huge_patch14_224] [--stages 1 2 4] [--folder DIR]

A whole MAE file of random weights, encoder and decoder, is made once as .pth and once as .safetensors. Then every stage
of every pipeline length is loaded in a process of its own, from a file that the page cache has let go, and the kernel's
own counters say what that took (Linux alone has them). The floor of the seconds is a plain sequential read of as many
bytes, in the same process, just before. Seconds belong to one machine and one minute; the ratios are what to look at.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Iterator

import torch
from timm.models.vision_transformer import Block

from dmae_ds.errors import RunFailed, UserError
from dmae_ds.models.vit import build_timm_vit
from dmae_ds.teacher.containers import open_container
from dmae_ds.teacher.fit import block_of
from dmae_ds.teacher.formats import open_weights
from dmae_ds.teacher.frozen import fill, meta_teacher
from dmae_ds.teacher.stages import split_blocks

MIB = 1 << 20
MAX_READ = 1.02  # of the bytes needed: what the file says of itself (names, shapes, places) is read too
MAX_PEAK = 1.10  # of the bytes kept
PEAK_CONSTANT = 64 * MIB  # allocator and thread pools, whatever the teacher's size
DECODER_DEPTH, DECODER_DIM, DECODER_HEADS = 8, 512, 16  # of the published MAE files

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Load:
    """What one process took to load one stage; bytes and seconds.

    read: asked of the kernel; disk: what of it came from the disk, read-ahead included
    peak: resident memory above what the process had before; floor_s: a plain read of `needed` bytes
    """

    needed: int
    read: int
    disk: int
    kept: int
    peak: int
    load_s: float
    floor_s: float
    floor_disk: int

    @property
    def ratios(self) -> tuple[float, float, float, float]:
        return self.read / self.needed, self.disk / self.needed, self.peak / self.kept, self.load_s / self.floor_s

    @property
    def peak_of_kept(self) -> float:
        """Without the constant that any load is allowed."""
        return (self.peak - PEAK_CONSTANT) / self.kept


def bench_teacher_load(name: str, *, last_block: int | None, stages: list[int], folder: Path | None) -> str:
    """Measure every stage of every length in `stages`; returns the table and the two verdicts, to print.

    last_block: the deepest tapped block, counted from 1 (default: three quarters of the depth, as in a recipe)
    folder: where the two files are made and left, or found from an earlier time; None: made and removed again
    Raises UserError for a network or a cut that there isn't, a folder that can't be written, and off Linux.
    """
    if sys.platform != "linux" or not os.access("/proc/self/io", os.R_OK):
        raise UserError("bench teacher-load counts bytes in Linux's /proc/self/io, which is not here; run it on Linux")
    shapes, depth = mae_shapes(name), meta_teacher(name, {}).depth
    last_block = max(1, depth * 3 // 4) if last_block is None else last_block
    if not 1 <= last_block <= depth:
        raise UserError(f"--last-block {last_block}: {name} has blocks 1 to {depth}")
    cuts = {num_stages: split_blocks(last_block, num_stages) for num_stages in dict.fromkeys(stages)}
    loads = {}
    with _folder(folder) as place:
        for path in make_files(place, name, shapes):
            for num_stages, cut in cuts.items():
                for number, blocks in enumerate(cut, start=1):
                    loads[path.suffix, num_stages, number, f"{blocks.start + 1}-{blocks.stop}"] = _measure_apart(path, name, last_block, blocks)
    size = 4 * sum(map(math.prod, shapes.values()))
    return f"{name}, blocks 1-{last_block} of {depth}, in fp32 from a whole MAE file of {size / MIB:.0f} MiB\n\n{_table(loads)}\n\n{_verdicts(loads)}"


def mae_shapes(name: str) -> Shapes:
    """{name in the file: shape} of a published MAE: timm's encoder and its norm, and the pixel decoder beside them."""
    vit = build_timm_vit(name, {}, where="teacher")
    patch, tokens = vit.patch_embed.patch_size[0], 1 + vit.patch_embed.num_patches
    with torch.device("meta"):
        block = Block(DECODER_DIM, DECODER_HEADS, qkv_bias=True).state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in vit.state_dict().items()}
    shapes |= {"mask_token": (1, 1, DECODER_DIM), "decoder_pos_embed": (1, tokens, DECODER_DIM)}
    shapes |= {"decoder_embed.weight": (DECODER_DIM, vit.embed_dim), "decoder_embed.bias": (DECODER_DIM,)}
    shapes |= {f"decoder_blocks.{number}.{key}": tuple(tensor.shape) for number in range(DECODER_DEPTH) for key, tensor in block.items()}
    shapes |= {"decoder_norm.weight": (DECODER_DIM,), "decoder_norm.bias": (DECODER_DIM,)}
    return shapes | {"decoder_pred.weight": (3 * patch**2, DECODER_DIM), "decoder_pred.bias": (3 * patch**2,)}


@contextmanager
def _folder(folder: Path | None) -> Iterator[Path]:
    """Where the files lie; what can't be made or written there is the user's to mend."""
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            yield folder
        else:
            with TemporaryDirectory(prefix="dmae-ds-bench-") as temporary:
                yield Path(temporary)
    except OSError as error:
        raise UserError(f"--folder '{folder or 'temporary'}': {error}; choose a folder that can be written and has the room") from None


def make_files(folder: Path, name: str, shapes: Shapes) -> list[Path]:
    """The .pth and the .safetensors of random weights; whole ones that are there already stay."""
    stem = f"random-mae-{name.replace('/', '_').replace(':', '_')}"
    safetensors, pth = folder / f"{stem}.safetensors", folder / f"{stem}.pth"
    if not _is_whole(safetensors, shapes):
        with _replacing(safetensors) as part:
            _write_safetensors(part, shapes)
    if not _is_whole(pth, shapes):
        with _replacing(pth) as part:
            torch.save({"model": dict(open_container(safetensors))}, part)  # the one moment that the whole is in memory
    return [pth, safetensors]


def _is_whole(path: Path, shapes: Shapes) -> bool:
    try:
        return {key: place.shape for key, place in open_container(path, ("model",)).places.items()} == shapes
    except UserError:
        return False


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _write_safetensors(path: Path, shapes: Shapes) -> None:
    """One tensor in memory at a time, which safetensors' own writer can't."""
    header, end = {}, 0
    for key, shape in shapes.items():
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": (end, end := end + 4 * math.prod(shape))}
    text = json.dumps(header).encode()
    generator = torch.Generator().manual_seed(0)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            file.write(torch.empty(shape).normal_(std=0.02, generator=generator).numpy())


def _measure_apart(path: Path, name: str, last_block: int, blocks: range) -> Load:
    """`measure` in a fresh process."""
    words = json.dumps([str(path), name, last_block, blocks.start, blocks.stop])
    done = subprocess.run([sys.executable, "-m", "dmae_ds.bench", words], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RunFailed(f"measuring blocks {blocks.start + 1}-{blocks.stop} of {path.name} ended with exit code {done.returncode}; its own words stand above")
    return Load(**json.loads(done.stdout.splitlines()[-1]))


def measure(path: Path, name: str, last_block: int, blocks: range) -> Load:
    """Load one stage, blocks counted from 0, in this process, whose memory must not have been higher before."""
    vit = meta_teacher(name, {}, last_block)
    needed = {key: tensor for key, tensor in vit.state_dict().items() if block_of(key) is None or block_of(key) in blocks}
    num_bytes = sum(tensor.nbytes for tensor in needed.values())
    _evict(path)
    before, start = _io(), time.perf_counter()
    _read_plainly(path, num_bytes)
    floor_s, floor_disk = time.perf_counter() - start, _io()["read_bytes"] - before["read_bytes"]
    _evict(path)
    resident, before, start = _memory("VmRSS"), _io(), time.perf_counter()
    weights = open_weights(path, "mae")
    parts = fill(vit, weights, whole_blocks=last_block, may_resize=False, dtype=torch.float32, device=torch.device("cpu"), blocks=blocks)
    load_s, after = time.perf_counter() - start, _io()
    assert num_bytes == weights.num_bytes(list(needed)), "the file is not of the network's own dtype and shapes"
    read, disk = (after[counter] - before[counter] for counter in ("rchar", "read_bytes"))
    return Load(
        needed=num_bytes, read=read, disk=disk, kept=parts.kept_bytes, peak=_memory("VmHWM") - resident, load_s=load_s, floor_s=floor_s,
        floor_disk=floor_disk,
    )  # fmt: skip


def _evict(path: Path) -> None:
    """Ask the page cache to let go of a file; pages that were never written out would stay. `floor_disk` tells whether it did."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _read_plainly(path: Path, num_bytes: int) -> None:
    buffer = memoryview(bytearray(8 * MIB))
    with open(path, "rb", buffering=0) as file:
        while num_bytes > 0:
            num_bytes -= file.readinto(buffer[: min(num_bytes, len(buffer))])


def _io() -> dict[str, int]:
    """Bytes of this process so far; `rchar`: what it asked for, `read_bytes`: what the disk gave."""
    with open("/proc/self/io") as file:
        return {key: int(value) for key, value in (line.split(":") for line in file)}


def _memory(field: str) -> int:
    """VmRSS, resident now, or VmHWM, the most it ever was; bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))


Loads = dict[tuple[str, int, int, str], Load]  # (container, P, stage counted from 1, blocks)


def _table(loads: Loads) -> str:
    """One row a stage, then the worst of each ratio for every container and length, in aligned columns."""
    rows = [("file", "P", "stage", "blocks", "needed", "read", "disk", "kept", "peak", "load", "floor", "read/needed", "disk/needed", "peak/kept", "load/floor")]
    rows += [("", "", "", "", *["MiB"] * 5, "s", "s", "", "", "", "")]
    worst: dict[tuple[str, int], tuple[float, ...]] = {}
    for (container, num_stages, number, blocks), load in loads.items():
        sizes = (f"{size / MIB:.1f}" for size in (load.needed, load.read, load.disk, load.kept, load.peak))
        rows.append((container, f"{num_stages}", f"{number}", blocks, *sizes, f"{load.load_s:.2f}", f"{load.floor_s:.2f}", *_in_words(load.ratios)))
        worst[container, num_stages] = tuple(map(max, load.ratios, worst.get((container, num_stages), load.ratios)))
    rows += [(container, f"{num_stages}", "worst", *[""] * 8, *_in_words(ratios)) for (container, num_stages), ratios in worst.items()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]) for row in rows)


def _in_words(ratios: tuple[float, ...]) -> tuple[str, ...]:
    return (*(f"{ratio:.4f}" for ratio in ratios[:2]), *(f"{ratio:.3f}" for ratio in ratios[2:]))


def _verdicts(loads: Loads) -> str:
    """The two promises, kept or not; and whether the disk's figures mean anything."""
    lines = []
    for promise, limit, figure in (
        ("bytes read within 2% of needed", MAX_READ, lambda load: load.ratios[0]),
        ("peak within 10% of kept plus 64 MiB", MAX_PEAK, lambda load: load.peak_of_kept),
    ):
        (container, num_stages, number, _), worst = max(loads.items(), key=lambda item: figure(item[1]))
        at = f"at most {figure(worst):.4f}" if limit == MAX_READ else f"at most {worst.ratios[2]:.3f} of kept"
        lines.append(f"{promise}: {'yes' if figure(worst) <= limit else 'NO'}, {at} ({container}, P {num_stages}, stage {number})")
    if any(load.floor_disk < 0.9 * load.needed for load in loads.values()):
        lines.append("the page cache did not let go of the files: the columns disk and floor mean nothing here (a file system in memory?)")
    return "\n".join(lines)


if __name__ == "__main__":
    file, network, last, first, stop = json.loads(sys.argv[1])
    print(json.dumps(asdict(measure(Path(file), network, last, range(first, stop)))))
