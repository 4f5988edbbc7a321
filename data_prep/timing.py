"""Time several ways to do the same work, in turns: rows, sections of rows, and the table of a section.

A benchmark is a function that takes (a folder of images, a scratch folder) and returns a Section; bench.py
lists them.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One way to do the work."""

    name: str
    run: Callable[[], None]  # the work, once
    prepare: Callable[[], None] = lambda: None  # before each time, not counted


@dataclass(frozen=True)
class Section:
    """Rows that do the same work on `num_items` items; speeds are relative to the first row."""

    title: str
    unit: str  # name of an item
    num_items: int
    rows: list[Row]


@dataclass(frozen=True)
class Timing:
    """Time of one row in one round."""

    wall_s: float
    cpu_s: float


def time_interleaved(rows: list[Row], rounds: int) -> dict[str, list[Timing]]:
    """Run each row once a round, in turns. Returns the timings of all rounds by name."""
    timings: dict[str, list[Timing]] = {row.name: [] for row in rows}
    for _ in range(rounds):
        for row in rows:
            row.prepare()
            cpu, wall = sum(os.times()[:4]), time.perf_counter()
            row.run()
            timings[row.name].append(Timing(time.perf_counter() - wall, sum(os.times()[:4]) - cpu))
    return timings


def format_table(section: Section, timings: dict[str, list[Timing]]) -> str:
    """Table of medians: items a second, CPU microseconds an item, speeds relative to the first row."""
    base = timings[section.rows[0].name]
    width = max(len(row.name) for row in section.rows)
    lines = [
        f"{section.title} ({section.num_items:,} {section.unit}, median of {len(base)} rounds)",
        f"{'':<{width}}  {section.unit + '/s':>10}  {'CPU us':>7}  {'speed':>6}  {'CPU':>6}",
    ]
    for row in section.rows:
        timings_of_row = timings[row.name]
        wall_s = statistics.median(timing.wall_s for timing in timings_of_row)
        cpu_s = statistics.median(timing.cpu_s for timing in timings_of_row)
        pairs = list(zip(base, timings_of_row, strict=True))
        speed = statistics.median(first.wall_s / timing.wall_s for first, timing in pairs)
        cpu_speed = statistics.median(first.cpu_s / max(timing.cpu_s, 1e-9) for first, timing in pairs)
        items_per_s, cpu_us = section.num_items / wall_s, cpu_s / section.num_items * 1e6
        lines.append(
            f"{row.name:<{width}}  {items_per_s:>10,.0f}  {cpu_us:>7.1f}  {speed:>6.2f}  {cpu_speed:>6.2f}"
        )
    return "\n".join(lines)
