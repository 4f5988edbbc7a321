"""The figures of launch/gpu_check.sh: real steps on one GPU, by micro-batch, teacher dtype and compilation.

    dmae-ds bench gpu OUT [--rehearse]

Each figure is `bench step` of one recipe, on random weights, so no file is needed. A finished one is a line
of OUT/figures.jsonl, and a second call leaves it out; one that breaks, for want of memory say, is written
down with its reason and tried again. At the end OUT/gpu_check.json and OUT/gpu_check.md have all figures next
to the checks of OUT/correctness.jsonl, which tests/gpu/record.py wrote (gpu_page.py).

--rehearse: the same code on small networks, also on a CPU; its numbers mean nothing.
"""

from __future__ import annotations

import gc
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from dmae_ds.bench.gpu_page import write_page
from dmae_ds.bench.knn import bench_knn
from dmae_ds.bench.step import as_plain_mae, measure_steps
from dmae_ds.config.load import load_config
from dmae_ds.distributed import process_group
from dmae_ds.distributed.device import hardware_name
from dmae_ds.distributed.world import World
from dmae_ds.errors import RunFailed, UserError

ROUNDS = 3
MICRO_BATCHES = (64, 256, 512)
REAL = ["dmae_vit_large_to_base", "precision=bf16_autocast", "deepspeed=zero0"]
SMALL = ["digits_dmae", "deepspeed=zero0", "teacher.embed_dim=48", "teacher.num_heads=3", "teacher.depth=8"]


@dataclass(frozen=True)
class Figure:
    """One recipe to measure. against_mae: also plain MAE of the same student."""

    name: str
    arguments: list[str]
    against_mae: bool = False


def figures(*, rehearse: bool) -> list[Figure]:
    """List what is measured, the most telling first."""
    base = SMALL if rehearse else REAL
    sizes = (4, 8) if rehearse else MICRO_BATCHES
    largest = sizes[-1]

    def at(size: int, *changes: str) -> list[str]:
        return [*base, f"optim.global_batch={size}", f"optim.micro_batch={size}", *changes]

    listed = [
        Figure(f"micro-batch {size}", at(size, "teacher.dtype=bf16"), against_mae=size == largest)
        for size in sizes
    ]
    listed.append(Figure("teacher fp32", at(largest, "teacher.dtype=fp32")))
    if rehearse:
        return listed
    return [
        *listed,
        Figure("compiled", at(largest, "teacher.dtype=bf16", "compile=true")),
        Figure("teacher fp8, compiled", at(largest, "teacher.dtype=fp8", "compile=true")),
        Figure("teacher fp8", at(largest, "teacher.dtype=fp8")),
    ]


def measure_gpu(out: Path, *, rehearse: bool) -> str:
    """Measure what OUT lacks, write its two files; returns a line for each figure.

    Raises UserError without a GPU, unless it is a rehearsal, and RunFailed where a figure broke; float8 on a
    GPU that cannot multiply it is refused, which is no failure.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu" and not rehearse:
        raise UserError("bench gpu requires a GPU, found none; use --rehearse to try it on a CPU")
    out.mkdir(parents=True, exist_ok=True)
    file = out / "figures.jsonl"
    done = {line["name"] for line in read_lines(file) if not line["reason"]}
    listed = figures(rehearse=rehearse)
    wanted = [(figure.name, lambda figure=figure: _steps(figure, device)) for figure in listed]
    wanted.append(("k-NN, a tenth of ImageNet", lambda: {"text": _knn(rehearse)}))
    missing = [(name, measure) for name, measure in wanted if name not in done]
    # One group for all of them: DeepSpeed keeps the first one that it has seen.
    with process_group.joined(World(), timeout_s=process_group.TIMEOUT_S):
        for name, measure in missing:
            with open(file, "a", encoding="utf-8") as lines:
                lines.write(json.dumps({"name": name, **_tried(measure)}) + "\n")
    newest = {line["name"]: line for line in read_lines(file)}  # the last try of each counts
    page = write_page(
        out,
        device=hardware_name(device),
        rehearse=rehearse,
        figures=[newest[name] for name, _ in wanted],
        checks=list({line["check"]: line for line in read_lines(out / "correctness.jsonl")}.values()),
    )
    broken = [name for name, _ in wanted if newest[name]["reason"] and not newest[name]["refused"]]
    if broken:
        first = f"{broken[0]}: {newest[broken[0]]['reason']}"
        raise RunFailed(
            f"{len(broken)} of {len(wanted)} figures broke, {first}; start again to try them again"
        )
    return f"{page}\n{page.with_suffix('.json')}"


def read_lines(file: Path) -> list[dict]:
    """The lines of a JSON lines file; [] where there is none."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _tried(measure) -> dict:
    """What was measured, the seconds that it took and, where it broke, the reason in one line."""
    since, result, reason, refused = time.monotonic(), {}, "", False
    try:
        result = measure()
    except Exception as error:  # whatever it is, it must not cost the other figures
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:300]
        refused = isinstance(error, UserError)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    torch.compiler.reset()
    return {**result, "took_s": round(time.monotonic() - since, 1), "reason": reason, "refused": refused}


def _steps(figure: Figure, device: torch.device) -> dict:
    config = load_config(figure.arguments[0], figure.arguments[1:])
    recipes = {"recipe": config} | ({"plain mae": as_plain_mae(config)} if figure.against_mae else {})
    measured = measure_steps(recipes, World(), device, data=False, rounds=ROUNDS)
    return {"micro_batch": config.optim.micro_batch, **measured}


def _knn(rehearse: bool) -> str:
    num_train, num_queries = (2_000, 64) if rehearse else (128_116, 2048)
    return bench_knn(
        num_train=num_train, num_queries=num_queries, dim=768, k=20, num_classes=1000, memory_gib=1.0
    ).splitlines()[2]  # seconds and comparisons a second
