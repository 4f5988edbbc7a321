"""The page of run folders, put together from charts, boards and facts, and its figures as files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from dmae_ds.config.load import flatten
from dmae_ds.config.run import RunConfig
from dmae_ds.errors import UserError
from dmae_ds.evaluate.facts import Fact, find_collapses, find_dead_terms, list_facts
from dmae_ds.evaluate.record import RunRecord, read_record
from dmae_ds.objectives.build import build_objective
from dmae_ds.output.durable import replacing
from dmae_ds.output.theme import light, to_png, to_svg
from dmae_ds.report.charts import Charts, draw_health, draw_losses, draw_times, safe_name
from dmae_ds.report.dense_boards import add_dense_boards
from dmae_ds.report.figures import MAX_POINTS, draw_grid, draw_mosaic
from dmae_ds.report.page import TITLE_END, Section, missing, place_charts, place_runs, render_page
from dmae_ds.report.reference import Teachers
from dmae_ds.report.views import Views, make_views

# Section of the page, which also begins the names of its figures -> title, how to read it.
NOTES = {
    "losses": (
        "Losses and k-NN",
        f"Lower is better for losses, higher for k-NN. Every curve has at most {MAX_POINTS} points, "
        "each the mean of a group of steps. A share of distillation near zero means that the teacher "
        "hardly influences the student.",
    ),
    "health": (
        "Health of the features",
        "Effective rank is the number of directions over which the features of a rank's batch spread; "
        "it can't exceed the number of its images, and simple images have few. A fall to less than half "
        "of what the initial weights give is a collapse, which the loss need not show; a low early in "
        "training is normal, so only the last third of a run is judged. A "
        "norm that never stops growing is worth a look.",
    ),
    "times": (
        "Throughput and time of a step",
        "Data is waiting for images, teacher its features and the drawing of masks, rest is the "
        "student, the exchange between ranks, the optimiser and saving. This is the host's time, the "
        "mean over ranks: a GPU computes asynchronously, so there only a long wait for data can be "
        "taken literally.",
    ),
    "pictures": (
        "Reconstructions",
        "Validation images, the same for every run, under masks of the recipe's ratio. The last row "
        "shows the visible patches together with those that the decoder reconstructed.",
    ),
    "ratios": (
        "Reconstructions at other mask ratios",
        "The same image under nested masks: patches that are visible at a higher ratio are visible at "
        "all lower ones. Ratios far from the one that a run was trained with are a test, not a "
        "defect.",
    ),
    "cka": (
        "Similarity of student and teacher",
        "Debiased linear CKA of every block with every block on whole images, all tokens: 1 is equal "
        "up to rotation and scale, 0 unrelated. A frame marks a distilled pair. A run without a "
        "teacher is compared with another run's, to show what distillation changed.",
    ),
    "patches": (
        "Patch features as colours",
        "The first three principal components of the patch features as red, green and blue, fitted "
        "over all images of a row: patches of one colour are similar to that network. Colours of "
        "different rows are aligned by brightness and can be compared only roughly.",
    ),
    "attention": (
        "Attention of CLS",
        "Attention of CLS to the patches in the student's last block, the highest brightest: all "
        "heads together, then the two heads whose maps differ most from image to image.",
    ),
    "segmentations": (
        "Segmentations",
        "Validation images, the same for every run, their label maps, and what the segmenter of each "
        "evaluation predicts. A class has one colour in all rows; black has no class.",
    ),
    "detections": (
        "Detections",
        "Validation images, the same for every run: what is annotated there, and what the detector of "
        "each evaluation found with a score of at least .5. Crowds are not drawn.",
    ),
}

NOT_MEASURED = "These runs were trained before this was measured"
NO_TEACHER = "No run of this page has a teacher"


def write_report(runs: list[Path], out: Path | None = None) -> Path:
    """Write the page and its figures; returns its path.

    out: None is report.html in the run's folder; of several runs comparison.html in the first one's
    The figures of one run are in RUN/figures, those of several in a folder next to the page, such as
    comparison-figures: a run's own stay. What a run lacks is also said on stderr.
    Raises UserError if a folder is not a run, a run has no metrics or is named twice, or the page's folder is
    missing. Other gaps of a run (weights, images, its teacher's file, columns of an older version) are
    sentences on the page.
    """
    records = {name: read_record(path) for name, path in zip(name_runs(runs), runs, strict=True)}
    out = out or runs[0] / ("report.html" if len(runs) == 1 else "comparison.html")
    folder = runs[0] / "figures" if len(runs) == 1 else out.with_name(f"{out.stem}-figures")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: folder '{out.parent}' not found; create it, or choose another")
    if out.exists() and not (out.is_file() and TITLE_END.encode() in out.read_bytes()):
        raise UserError(f"'{out}' exists and is no page of `dmae-ds report`; choose another --out")
    folder.mkdir(exist_ok=True)
    teachers = Teachers(records)
    columns: dict[str, dict[str, Fact]] = {}
    views: dict[str, Views] = {}
    for name, record in records.items():
        objective, shapes = build_objective(record.config)
        columns[name] = list_facts(record, objective, shapes)
        views[name] = make_views(record, objective, shapes, teachers)
    dense = add_dense_boards({name: record.path for name, record in records.items()}, views)
    sections = [
        _chart_section("losses", draw_losses(records), folder),
        _chart_section("health", draw_health(records), folder),
        _chart_section("times", draw_times(records), folder),
        _board_section("pictures", views, columns, folder),
        _board_section("ratios", views, columns, folder),
        _cka_section(views, folder),
        _board_section("patches", views, columns, folder),
        _board_section("attention", views, columns, folder),
        *(_board_section(key, views, columns, folder) for key in dense),
    ]
    _say_what_is_missing(views)
    differing = differing_keys([record.config for record in records.values()])
    page = render_page(list(records), _find_alarms(records), list(columns.values()), sections, differing)
    _save(out, page.encode())
    return out


def differing_keys(configs: list[RunConfig]) -> dict[str, list[str]]:
    """Values of each run by the keys of the recipe in which runs differ, but for run.dir."""
    flat = [flatten(config.model_dump(mode="json")) for config in configs]
    keys = [key for key in dict.fromkeys(key for values in flat for key in values) if key != "run.dir"]
    texts = {key: [_value_text(values.get(key)) for values in flat] for key in keys}
    return {key: values for key, values in texts.items() if len(set(values)) > 1}


def _value_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _say_what_is_missing(views: dict[str, Views]) -> None:
    """Print what the page lacks, a line for each reason."""
    for name, views_of_run in views.items():
        for sentence in dict.fromkeys(views_of_run.missing.values()):
            sections = [key for key, reason in views_of_run.missing.items() if reason == sentence]
            print(f"{name}: no {', '.join(sections)}: {sentence}", file=sys.stderr)


def _find_alarms(records: dict[str, RunRecord]) -> list[tuple[str, str]]:
    """(kind, sentence) for every dead term and every collapse."""
    alarms = []
    for kind, find in (("Dead term", find_dead_terms), ("Collapse", find_collapses)):
        for name, record in records.items():
            alarms += [(kind, sentence) for sentence in find(record, name)]
    return alarms


def name_runs(runs: list[Path]) -> list[str]:
    """Name each run by the end of its path, as short as tells them apart.

    Raises UserError for a run that is named twice.
    """
    paths = [path.expanduser().resolve().parts for path in runs]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"a run is named twice: {', '.join(map(str, runs))}; name each once")


def _chart_section(key: str, charts: Charts, folder: Path) -> Section:
    for stem, figure in charts.items():
        _save_figure(folder, stem, figure)
    body = place_charts([to_svg(figure) for figure in charts.values()])
    if not charts:
        body = missing(NOT_MEASURED)
    return Section(*NOTES[key], body)


def _board_section(
    key: str, views: dict[str, Views], columns: dict[str, dict[str, Fact]], folder: Path
) -> Section:
    blocks = []
    for name, views_of_run in views.items():
        small = columns[name]["objective"].note if key == "pictures" else ""
        if key not in views_of_run.boards:
            blocks.append((name, small, missing(views_of_run.missing[key])))
            continue
        board = views_of_run.boards[key]
        blocks.append((name, small, board.html()))
        title = f"{name} {small}".strip()
        figure = draw_mosaic(title, board.mosaic(light("--surface")), board.labels, board.heads)
        _save_figure(folder, f"{key}-{safe_name(name)}", figure)
    return Section(*NOTES[key], place_runs(blocks))


def _cka_section(views: dict[str, Views], folder: Path) -> Section:
    blocks = []
    for name, views_of_run in views.items():
        body = ""
        if views_of_run.cka is not None:
            title, pairs = f"{name} and {views_of_run.teacher}", views_of_run.pairs
            labels = {"rows": "student's block", "columns": "teacher's block"}
            figure = draw_grid(title, views_of_run.cka, **labels, marked=pairs)
            _save_figure(folder, f"cka-{safe_name(name)}", figure)
            body = place_charts([to_svg(figure)])
        if "cka" in views_of_run.missing:
            body += missing(views_of_run.missing["cka"])
        blocks.append((name, "", body or missing(NO_TEACHER)))
    return Section(*NOTES["cka"], place_runs(blocks))


def _save_figure(folder: Path, stem: str, figure: Figure) -> None:
    _save(folder / f"{stem}.png", to_png(figure))


def _save(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)
