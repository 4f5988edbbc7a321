"""How time and memory of a training step grow with the networks' sizes, next to the counted FLOPs.

    dmae-ds bench growth RECIPE [key=value] [--widths 32 64 128] [--depths 4 8 16] [--mask-ratios .5 .75 .9]
        [--students 1 2 3] [--rounds 7] [--plot FILE.png] [--json]

The recipe's step and its steps with another width of the student, depth of the teacher, mask ratio or number
of students (copies of the recipe's own, which share a pass of the teacher) take turns in every round; ratios
are to the recipe's own step. On a CPU the peak memory of each is measured in a process of its own.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from dmae_ds.bench.growth_axes import OWN, Axis, Number, ReadRecipe, find_axes
from dmae_ds.bench.growth_plot import draw_growth
from dmae_ds.bench.step import measure_steps, title_lines, with_one_micro_batch
from dmae_ds.bench.step_peak import measure_peaks
from dmae_ds.config.run import RunConfig
from dmae_ds.distributed import process_group
from dmae_ds.distributed.world import World
from dmae_ds.errors import UserError
from dmae_ds.output.durable import write_atomically
from dmae_ds.output.table import text_table
from dmae_ds.output.theme import to_png
from dmae_ds.output.units import GIB, MIB


def bench_growth(
    read: ReadRecipe,
    world: World,
    *,
    asked: dict[str, Sequence[Number] | None],
    rounds: int,
    plot: Path | None,
    as_json: bool,
) -> str:
    """Measure and return the table, or JSON, to print. Makes the process group, of one rank.

    read: gives the recipe with further overrides; asked: values by option (growth_axes.py)
    plot: a PNG file to write
    Raises UserError, before anything is measured, for values that the recipe refuses.
    """
    if world.size > 1:
        raise UserError(f"bench growth measures one process, found {world.size}; start it without a launcher")
    check_plot(plot)
    axes, left_out = find_axes(read, asked)
    recipes = {OWN: read([])}
    for axis in axes:
        recipes |= {axis.name(value): config for value, config in axis.recipes.items() if value != axis.own}
    if len(recipes) == 1:
        raise UserError(f"there is nothing to compare: {'; '.join(left_out.values())}")
    results = _measure(recipes, world, rounds=rounds)
    results["axes"] = [compare(axis, results["steps"]) for axis in axes]
    results["left_out"] = left_out
    if plot is not None:
        write_plot(plot, results)
    return json.dumps(results) if as_json else table(results)


def check_plot(plot: Path | None) -> None:
    """Raise UserError for a file that can't be a plot, before minutes of measurements."""
    if plot is None:
        return
    if plot.suffix != ".png":
        raise UserError(f"--plot '{plot}' has the ending '{plot.suffix}', expected .png; rename it")
    if not plot.parent.is_dir():
        raise UserError(f"--plot '{plot}' is in a folder that does not exist; make '{plot.parent}' first")


def write_plot(plot: Path, results: dict) -> None:
    """Write the figure of the results. Raises UserError where it can't be written."""
    try:
        write_atomically(plot, to_png(draw_growth(results)))
    except OSError as error:
        raise UserError(f"--plot '{plot}' can't be written: {error}; choose another file") from None


def _measure(recipes: dict[str, RunConfig], world: World, *, rounds: int) -> dict:
    """Measure the steps as `bench step` does; on a CPU, memory in processes of their own."""
    with process_group.joined(world, timeout_s=recipes[OWN].dist.timeout_s) as device:
        recipes = with_one_micro_batch(recipes, world, device)
        # A GPU's allocator knows what each step has, whatever was there before; a process's pages do not.
        peaks = measure_peaks(recipes) if device.type == "cpu" else None
        results = measure_steps(recipes, world, device, data=False, rounds=rounds)
    if peaks is not None:
        for step in results["steps"]:
            peak = peaks[step["name"]]
            step["peak_gib"] = None if peak is None else peak / GIB
    return results


def compare(axis: Axis, steps: list[dict]) -> dict:
    """Compare the steps of an axis with the recipe's own; steps: figures of `measure_steps`.

    Returns {"axis", "option", "own", "points"}; of each point its value, the step's name, the blocks of the
    teacher that run, and ratios: of seconds (the median of those of all rounds, and their extremes), of GFLOP
    and of memory; "time_over_work" is the first over the second, 1 where time follows the counted work.
    """
    by_name = {step["name"]: step for step in steps}
    own, points = by_name[OWN], []
    for value in axis.recipes:
        step = by_name[axis.name(value)]
        pairs = zip(step["round_seconds"], own["round_seconds"], strict=True)
        ratios = [seconds / own_s for seconds, own_s in pairs]
        work, known = step["gflop"] / own["gflop"], step["peak_gib"] and own["peak_gib"]
        points.append(
            {
                "value": value,
                "step": step["name"],
                "teacher_blocks": axis.blocks[value],
                "seconds_ratio": statistics.median(ratios),
                "seconds_ratio_range": [min(ratios), max(ratios)],
                "gflop_ratio": work,
                "peak_ratio": step["peak_gib"] / own["peak_gib"] if known else None,
                "time_over_work": statistics.median(ratios) / work,
            }
        )
    return {"axis": axis.label, "option": axis.option, "own": axis.own, "points": points}


def table(results: dict) -> str:
    """Text for a person: a row for each point, and for each axis how near time follows the counted work."""
    by_name = {step["name"]: step for step in results["steps"]}
    rows = [("", "", "s", "ratio", "in a round", "GFLOP", "ratio", "time/work", "MiB", "ratio", "predicted")]
    lines = []
    for axis in results["axes"]:
        for place, point in enumerate(axis["points"]):
            rows.append(_row(axis, point, by_name[point["step"]], is_first=place == 0))
        lines.append(_summary(axis))
    lines += [f"left out: {reason}" for reason in results["left_out"].values()]
    return "\n".join([*title_lines(results), "", *text_table(rows, left=(0, 1)), "", *lines])


def _row(axis: dict, point: dict, step: dict, *, is_first: bool) -> tuple[str, ...]:
    low, high = point["seconds_ratio_range"]
    memory = ("", "")
    if step["peak_gib"] is not None:
        memory = (f"{step['peak_gib'] * GIB / MIB:.0f}", f"{point['peak_ratio']:.2f}")
    return (
        axis["axis"] if is_first else "",
        text_of(axis, point),
        f"{step['seconds']:.3f}",
        f"{point['seconds_ratio']:.2f}",
        f"{low:.2f}-{high:.2f}",
        f"{step['gflop']:.2f}",
        f"{point['gflop_ratio']:.2f}",
        f"{point['time_over_work']:.2f}",
        *memory,
        f"{step['predicted_gib'] * GIB / MIB:.0f}",
    )


def text_of(axis: dict, point: dict) -> str:
    """A point's value, with the blocks of the teacher that run, and a star at the recipe's own."""
    blocks = f" ({point['teacher_blocks']} run)" if axis["option"] == "--depths" else ""
    return f"{point['value']:g}{blocks}{' *' if point['value'] == axis['own'] else ''}"


def _summary(axis: dict) -> str:
    """How much work, time and memory grow from the first point of an axis to the last."""
    first, last = axis["points"][0], axis["points"][-1]
    over = [point["time_over_work"] for point in axis["points"]]
    memory = ""
    if first["peak_ratio"] and last["peak_ratio"]:
        memory = f", memory x {last['peak_ratio'] / first['peak_ratio']:.2f}"
    return (
        f"{axis['axis']} {first['value']:g} to {last['value']:g}: "
        f"work x {last['gflop_ratio'] / first['gflop_ratio']:.2f}, "
        f"time x {last['seconds_ratio'] / first['seconds_ratio']:.2f}{memory}; "
        f"time over work {min(over):.2f} to {max(over):.2f} of the recipe's"
    )
