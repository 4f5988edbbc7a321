"""Ways to do the same work, timed in turns: rows, sections of rows, and the table of a section.

A benchmark is a function that takes (a folder of images, a scratch folder) and returns a Section; bench.py
lists them. A row is a name and a function without arguments that does the work once.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    name: str
    run: Callable[[], None]  # the work, once
    prepare: Callable[[], None] = lambda: None  # before each time, not counted


@dataclass(frozen=True)
class Section:
    """Rows that do the same work on `num_items` items; their speeds are given against the first row's."""

    title: str
    unit: str  # of an item
    num_items: int
    rows: list[Row]


@dataclass(frozen=True)
class Timing:
    wall_s: float
    cpu_s: float


def time_interleaved(rows: list[Row], rounds: int) -> dict[str, list[Timing]]:
    """Each row once a round, in turns. Returns name -> one Timing a round."""
    timings: dict[str, list[Timing]] = {row.name: [] for row in rows}
    for _ in range(rounds):
        for row in rows:
            row.prepare()
            cpu, wall = sum(os.times()[:4]), time.perf_counter()
            row.run()
            timings[row.name].append(Timing(time.perf_counter() - wall, sum(os.times()[:4]) - cpu))
    return timings


def format_table(section: Section, timings: dict[str, list[Timing]]) -> str:
    """Medians: items a second, CPU microseconds an item, and speed against the first row by wall and by CPU time."""
    base = timings[section.rows[0].name]
    width = max(len(row.name) for row in section.rows)
    lines = [
        f"{section.title} ({section.num_items:,} {section.unit}, median of {len(base)} rounds)",
        f"{'':<{width}}  {section.unit + '/s':>10}  {'CPU us':>7}  {'speed':>6}  {'CPU':>6}",
    ]
    for row in section.rows:
        found = timings[row.name]
        wall, cpu = (
            statistics.median(values) for values in zip(*((t.wall_s, t.cpu_s) for t in found), strict=True)
        )
        speed = statistics.median(first.wall_s / own.wall_s for first, own in zip(base, found, strict=True))
        cheap = statistics.median(
            first.cpu_s / max(own.cpu_s, 1e-9) for first, own in zip(base, found, strict=True)
        )
        lines.append(
            f"{row.name:<{width}}  {section.num_items / wall:>10,.0f}  {cpu / section.num_items * 1e6:>7.1f}  {speed:>6.2f}  {cheap:>6.2f}"
        )
    return "\n".join(lines)
