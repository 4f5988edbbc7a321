"""The results page: the study of our runs, and the papers' tables with the runs that fill their rows.

    dmae-ds report --results [RUN ...]                     # writes RESULTS.md
    dmae-ds report --results digits=FOLDER scenes=FOLDER   # with one section a data set
    dmae-ds report --results --keep scenes=FOLDER          # other sections of the page stay as they are

Equal runs give equal bytes; no part of the page is written by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import fmean, stdev

from dmae_ds.errors import UserError
from dmae_ds.output.durable import replacing
from dmae_ds.output.table import markdown_row
from dmae_ds.output.theme import to_png
from dmae_ds.report.claims_table import EXPLANATION, render_claims
from dmae_ds.report.claims_table import HEADING as HEADING_OF_CLAIMS
from dmae_ds.report.earlier_page import (
    HEAD,
    NO_METHOD,
    PUBLISHED,
    SECTION,
    STUDY,
    ResultsPage,
    is_filled,
    parse_page,
    read_page,
    split_row,
)
from dmae_ds.report.origins import render_origins
from dmae_ds.report.published import NUM_IMAGENET, Conditions, find_conditions, find_result, read_published
from dmae_ds.report.random_weights import HEADING, compare_with_random
from dmae_ds.report.runs import Run, find_runs
from dmae_ds.report.sources import list_missing_weights
from dmae_ds.report.study import (
    NOT_RUN,
    Column,
    Setting,
    format_rank,
    format_time,
    format_values,
    group,
    list_columns,
)
from dmae_ds.report.study_plot import draw_study

FIGURE = Path(".github/results.png")  # relative to the page
PAPERS = {
    "dmae": "DMAE: Masked Autoencoders Enable Efficient Knowledge Distillers (CVPR 2023)",
    "g2sd supplement": "G2SD: Generic-to-Specific Distillation of Masked Autoencoders, "
    "supplement (CVPR 2023)",
    "sdae": "SdAE: Self-distillated Masked Autoencoder (ECCV 2022)",
}
# Fields of a row with a column of their own; all others are listed in the column `fixed`.
_SHOWN = ("paper", "table", "what", "metric", "value", "mean_of_three_seeds", "standard_deviation")


def write_results_page(folders: dict[str, list[Path]], out: Path, *, keep: bool = False) -> Path:
    """Write the page, and a plot of each section of the study next to it; returns the page's path.

    folders: of each section by its name, which is "" for one without a heading
    keep: whether sections of the page `out` that have no folders stay, and numbers in the papers' tables

    Raises UserError for a folder without a run, a run in two sections, a missing folder of the page, a file
    in its place, and a section or number of an earlier page that would be lost.
    """
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: folder '{out.parent}' not found; create it, or choose another")
    earlier = read_page(out)
    found = {name: find_runs(of_section) for name, of_section in folders.items()}
    _check_apart(found)
    all_runs = [run for runs in found.values() for run in runs]
    runs = [run for run in all_runs if run.facts["finished"]]
    sections = {
        name: group([run for run in of_section if run in runs and run.facts["num_images"] != NUM_IMAGENET])
        for name, of_section in found.items()
    }
    kept = earlier if keep else ResultsPage()
    page = render_results_page(runs, sections, kept, num_unfinished=len(all_runs) - len(runs))
    lost = earlier.list_lost(parse_page(page))
    if lost:
        leave = "" if keep else "add --keep to leave them as they are, "
        raise UserError(
            f"'{out}' has {' and '.join(lost)} without a number in these runs; {leave}give finished and "
            "evaluated runs of them, or another --out"
        )
    if smaller := earlier.list_smaller(parse_page(page)):
        raise UserError(
            f"'{out}' has {' and '.join(smaller)}; give all of them, or another name of the section, or "
            "another --out"
        )
    if missing := list_missing_weights(runs):
        print(
            f"weights not found: {len(missing)}, first '{missing[0]}'; runs with them are told apart by these"
            " paths, each seed for itself",
            file=sys.stderr,
        )
    for name, settings in sections.items():
        headings = list_columns(settings)
        if headings:
            (out.parent / FIGURE).parent.mkdir(exist_ok=True)
            with replacing(out.parent / figure_of(name)) as file:
                file.write(to_png(draw_study(settings, headings)))
    with replacing(out) as file:
        file.write(page.encode())
    return out


def figure_of(section: str) -> Path:
    """The file of a section's plot, relative to the page."""
    return FIGURE.with_stem(f"{FIGURE.stem}-{section}") if section else FIGURE


def _check_apart(found: dict[str, list[Run]]) -> None:
    section_of: dict[Path, str] = {}
    for name, runs in found.items():
        for run in runs:
            other = section_of.setdefault(run.path.resolve(), name)
            if other != name:
                raise UserError(
                    f"run '{run.path}' is in the sections '{other}' and '{name}'; "
                    "each run belongs to one data set: give it once"
                )


def render_results_page(
    runs: list[Run], sections: dict[str, list[Setting]], kept: ResultsPage, *, num_unfinished: int = 0
) -> str:
    """Render the page.

    runs: the finished ones; sections: settings of those that are not on ImageNet-1k, by data set
    kept: what stays of the earlier page
    """
    lines = list(HEAD)
    if num_unfinished:
        which = "1 run that has" if num_unfinished == 1 else f"{num_unfinished} runs that have"
        lines += [f"Left out: {which} not come to the end.", ""]
    return "\n".join([*lines, *render_study(sections, kept.sections), *render_published(runs, kept.ours)])


# ---- the papers' tables


def render_published(runs: list[Run], kept: dict[str, str] | None = None) -> list[str]:
    """Lines with every row of the papers' tables, and the runs that fulfil its conditions.

    kept: our cells of an earlier page, for rows that none of these runs fills
    """
    _, rows = read_published()
    assert {row["paper"] for row in rows} == set(PAPERS)
    table = [_published_line(row, _our_cells(find_conditions(row), runs)) for row in rows]
    if kept:
        table = [_keep_ours(line, kept) for line in table]
    num_filled = sum(map(is_filled, table))
    lines = [
        PUBLISHED,
        "",
        f"{num_filled} of {len(rows)} rows have a run of ours.",
        "",
        "A run fills a row when its recipe, its student and teacher, "
        f"ImageNet-1k's {NUM_IMAGENET:,} images, its epochs and its evaluation are the row's; of several",
        "seeds, mean and sample standard deviation. The teacher is told by its network, not by its file. "
        "Cost: ranks x wall hours, pre-training and evaluation.",
        f"`{NO_METHOD}`: this project has no recipe for it, for the reason in the row where one is given. "
        "Our reading: the paper leaves open how it ran the method.",
        "",
    ]
    for paper, title in PAPERS.items():
        lines += [
            f"### {title}",
            "",
            "| table | what | metric | fixed | paper | ours | seed | hardware | cost |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [line for row, line in zip(rows, table, strict=True) if row["paper"] == paper]
        lines.append("")
    return lines


def _published_line(row: dict, ours: tuple[str, ...]) -> str:
    paper = str(row["value"])
    if "mean_of_three_seeds" in row:
        paper += f" (three seeds: {row['mean_of_three_seeds']:.2f} ± {row['standard_deviation']:.2f})"
    fixed = [
        f"{key.replace('_', ' ')} {value}"
        for key, value in row.items()
        if key not in _SHOWN and value is not None
    ]
    return markdown_row(row["table"], row["what"], row["metric"], ", ".join(fixed), paper, *ours)


def _keep_ours(line: str, kept: dict[str, str]) -> str:
    """The row, with the cells of the earlier page if it has no number now."""
    published, ours = split_row(line)
    return line if is_filled(line) else f"{published}|{kept.get(published, ours)}"


def _our_cells(row: Conditions | None, runs: list[Run]) -> tuple[str, str, str, str]:
    """The cells ours, seed, hardware and cost of one row."""
    if row is None:
        return NO_METHOD, "", "", ""
    filled = [(run, result) for run in runs for result in [find_result(run, row)] if result is not None]
    if row.gives == "gpu_hours":
        filled = [(run, result) for run, result in filled if _gpu_hours(run, result, row) is not None]
    if not filled:
        return NOT_RUN, "", "", ""
    hours = [_gpu_hours(run, result, row) for run, result in filled]
    values = hours if row.gives == "gpu_hours" else [result["scores"][row.gives] for _, result in filled]
    ours = f"{fmean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"
    seeds = ", ".join(str(run.config.run.seed) for run, _ in filled)
    hardware = dict.fromkeys(f"{result['world_size']} x {result['device']}" for _, result in filled)
    known_hours = [number for number in hours if number is not None]
    cost = f"{fmean(known_hours):.1f} h" if known_hours else "unknown"
    return ours, seeds, "; ".join(hardware), cost


def _gpu_hours(run: Run, result: dict, row: Conditions) -> float | None:
    """Ranks x wall hours of an evaluation, and of pre-training if the row is about a pre-trained student."""
    evaluation = result["seconds"] / 3600 * result["world_size"]
    if "objective" not in row.facts:
        return evaluation
    return None if run.gpu_hours is None else run.gpu_hours + evaluation


# ---- the study


def render_study(sections: dict[str, list[Setting]], kept: dict[str, list[str]] | None = None) -> list[str]:
    """Lines with one table a data set, the numbers of the last step as mean and deviation over seeds.

    sections: settings by the data set's name, which is "" for one without a heading
    kept: lines of sections of an earlier page, by name; new ones come behind them
    """
    lines, kept = [STUDY, ""], kept or {}
    shown = {name: settings for name, settings in sections.items() if list_columns(settings)}
    if not shown and not kept:
        return [
            *lines,
            "not run: no finished run with a measured number was given; "
            "`dmae-ds report --results RUN [RUN ...]` takes run folders, and folders of them.",
            "",
        ]
    lines += [
        "Top-1, mIoU and AP in percent at the last step, mean ± sample standard deviation over seeds. "
        "A setting is named by its objective and by what",
        "differs from the commonest recipe of that objective. Time: wall, pre-training alone. "
        "Rank: effective rank of the mean of the patch tokens,",
        "or of CLS where the loss reads no other, over the last tenth of training, mean over seeds "
        "and (lowest); it can't exceed a rank's batch.",
        "",
    ]
    stay = {name: of_section for name, of_section in kept.items() if name in shown or name not in sections}
    rendered = stay | {name: _render_section(name, settings) for name, settings in shown.items()}
    in_order = [line for name in sorted(rendered, key=bool) for line in rendered[name]]
    lines += EXPLANATION if f"#### {HEADING_OF_CLAIMS}" in in_order else []
    return [*lines, *in_order]


def _render_section(name: str, settings: list[Setting]) -> list[str]:
    heading = [f"{SECTION}{name}", ""] if name else []
    return [*heading, *_render_table(name, settings), *render_claims(settings), *render_origins(settings)]


def _render_table(name: str, settings: list[Setting]) -> list[str]:
    headings = list_columns(settings)
    above, rule = compare_with_random(settings)
    more = [HEADING] if above else []
    lines = [
        _count_runs(settings),
        "",
        f"![{', '.join(headings.values())} of every setting]({figure_of(name)})",
        "",
        markdown_row("setting", *headings.values(), "seeds", "time", "rank", *more),
        "|---|" + "---|" * (len(headings) + 3 + len(more)),
    ]
    for setting in settings:
        values = [_study_cell(setting, column) for column in headings]
        seeds = ", ".join(map(str, setting.seeds))
        values += [seeds, format_time(setting.runs), format_rank(setting.runs)]
        lines.append(markdown_row(setting.name, *values, *(above.get(setting.name, "") for _ in more)))
    return [*lines, "", *([rule, ""] if rule else [])]


def _count_runs(settings: list[Setting]) -> str:
    runs = [run for setting in settings for run in setting.runs]
    images = sorted({run.facts["num_images"] for run in runs})
    steps = {
        int(run.config.optim.epochs * run.facts["num_images"] // run.config.optim.global_batch)
        for run in runs
    }
    length = f"about {steps.pop():,} steps each" if len(steps) == 1 else "of different lengths"
    return f"{len(runs)} runs on {' or '.join(f'{number:,}' for number in images)} images, {length}."


def _study_cell(setting: Setting, column: Column) -> str:
    values = setting.values.get(column)
    if values is None:
        return NOT_RUN
    fewer = f" ({len(values)} of {len(setting.runs)})" if len(values) < len(setting.runs) else ""
    return format_values(values) + fewer
