"""The two files of launch/gpu_check.sh: all that was found on a GPU, as JSON and as a page to paste."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path

from dmae_ds.output.durable import write_atomically

PACKAGES = ("torch", "deepspeed", "timm")
STEP_HEAD = (
    "figure",
    "micro-batch",
    "step of",
    "s",
    "images/s",
    "of peak",
    "teacher's share",
    "GiB",
    "GiB predicted",
    "measured / predicted",
)


def write_page(out: Path, *, device: str, rehearse: bool, figures: list[dict], checks: list[dict]) -> Path:
    """Write OUT/gpu_check.json and OUT/gpu_check.md; returns the path of the page.

    figures: lines of figures.jsonl; checks: lines of correctness.jsonl
    """
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}
    found = {
        "device": device,
        "rehearsal": rehearse,
        "versions": versions,
        "figures": figures,
        "checks": checks,
    }
    write_atomically(out / "gpu_check.json", json.dumps(found, indent=1).encode())
    title = f"{'REHEARSAL, numbers mean nothing: ' if rehearse else ''}{device}"
    lines = [
        f"## {title}",
        "",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        "",
    ]
    lines += [*markdown_table(STEP_HEAD, step_rows(figures)), "", *_notes(figures), ""]
    passed = sum(check["outcome"] == "passed" for check in checks)
    lines += [f"{passed} of {len(checks)} checks passed.", ""]
    lines += markdown_table(("check", "outcome", "s", "measured"), [_check_row(check) for check in checks])
    page = out / "gpu_check.md"
    write_atomically(page, ("\n".join(lines) + "\n").encode())
    return page


def step_rows(figures: list[dict]) -> list[tuple[str, ...]]:
    """A row for each measured step; a figure that broke has its reason in place of numbers."""
    rows = []
    for figure in figures:
        if figure["reason"] and "steps" not in figure:
            rows.append((figure["name"], "", figure["reason"], *[""] * (len(STEP_HEAD) - 3)))
        for step in figure.get("steps", []):
            teacher = step["parts"].get("teacher", {}).get("seconds", 0.0) / step["seconds"]
            measured, predicted = step["peak_gib"], step["predicted_gib"]
            memory = ("", f"{predicted:.2f}", "")
            if measured is not None:
                memory = (f"{measured:.2f}", f"{predicted:.2f}", f"{measured / predicted:.3f}")
            rows.append(
                (
                    figure["name"],
                    str(figure["micro_batch"]),
                    step["name"],
                    f"{step['seconds']:.4f}",
                    f"{step['images_per_s']:.0f}",
                    f"{step['of_peak']:.0%}",
                    f"{teacher:.0%}",
                    *memory,
                )
            )
    return rows


def _notes(figures: list[dict]) -> list[str]:
    """The fastest products that shares refer to, and the figures that are no steps."""
    peaks = {}
    for figure in figures:
        for dtype, rate in figure.get("gemm_gflops", {}).items():
            if rate > peaks.get(dtype, (0.0, ""))[0]:
                peaks[dtype] = (rate, figure["gemm_kernel"][dtype])
    notes = [
        f"- peak in {dtype}: {rate / 1e3:.1f} TFLOP/s by {name}" for dtype, (rate, name) in peaks.items()
    ]
    return notes + [f"- {figure['name']}: {figure['text']}" for figure in figures if "text" in figure]


def _check_row(check: dict) -> tuple[str, ...]:
    measured = ", ".join(f"{name} {value}" for name, value in check["measured"].items())
    name = check["check"].removeprefix("tests/")
    return name, check["outcome"], f"{check['seconds']:.1f}", check["reason"] or measured


def markdown_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a Markdown table."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [head, *rows]]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]
