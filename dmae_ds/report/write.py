"""From run folders to the page and its figures."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from dmae_ds.errors import UserError
from dmae_ds.evaluate.facts import Fact, find_collapses, find_dead_terms, list_facts
from dmae_ds.evaluate.record import read_record
from dmae_ds.objectives.build import build_objective
from dmae_ds.output.durable import replacing
from dmae_ds.report.charts import Charts, draw_health, draw_losses, draw_times, file_name
from dmae_ds.report.figures import MAX_POINTS, draw_grid, draw_mosaic
from dmae_ds.report.page import Section, figures, missing, render_page, side_by_side
from dmae_ds.report.reference import Teachers
from dmae_ds.report.theme import light, to_png, to_svg
from dmae_ds.report.views import Views, look

# Section of the page -> title, how to read it.
NOTES = {
    "losses": (
        "How they learned",
        f"Lower is better for losses, higher for k-NN; every curve has at most {MAX_POINTS} points, each the mean of its stretch of steps. A "
        "share of distillation near zero means that the student does not hear its teacher.",
    ),
    "health": (
        "Whether features live",
        "Effective rank says over how many directions the pictures of a rank's batch spread; it can't exceed their number. Falling "
        "towards one is a collapse, which the loss need not show; a low at the start is normal, so only the last third of a run is judged. A "
        "norm that never stops growing is worth a look.",
    ),
    "times": (
        "Where the time went",
        "Data is waiting for pictures, teacher its features and the drawing of masks, rest is the student, the exchange between ranks, "
        "the optimiser and saving. This is the host's time, the mean over ranks: on a GPU, which computes behind its back, only a long "
        "wait for data means what it says.",
    ),
    "pictures": (
        "What they see",
        "Validation pictures, the same for every run under masks of the recipe's ratio; the last row is what was seen together with what "
        "the decoder reconstructed.",
    ),
    "ratios": (
        "From half a picture to next to nothing",
        "The same picture under nested masks: what a higher ratio shows, the lower ones show too. Ratios far from the one that a run was "
        "trained with are a test, not a defect.",
    ),
    "cka": (
        "How alike student and teacher are",
        "Debiased linear CKA of every block with every block on whole pictures, all tokens: 1 is equal up to rotation and scale, 0 "
        "unrelated. A frame marks a distilled pair; a run without a teacher is held against another run's, to show what distillation "
        "changed.",
    ),
    "patches": (
        "What a patch means to them",
        "The first three principal components of the patch features as red, green and blue, fitted over all pictures of a row: patches of "
        "one colour are alike to that network. Colours of different rows are turned towards brightness and can be compared only roughly.",
    ),
    "attention": (
        "Where CLS looks",
        "Attention of CLS to the patches in the student's last block, the brightest most; all heads together, then the two heads whose "
        "maps differ most from picture to picture.",
    ),
}


def write_report(runs: list[Path], out: Path | None = None) -> Path:
    """Write the page (default: report.html in the first run's folder) and its figures; returns the page's path.

    Raises UserError for a folder that is no run, a run without metrics or named twice, or a page that has no
    folder. What a run merely lacks (weights, pictures, its teacher's file, columns of an older version) is a
    sentence on the page.
    """
    records = {name: read_record(path) for name, path in zip(name_runs(runs), runs, strict=True)}
    out, folder = out or runs[0] / "report.html", runs[0] / "figures"
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder '{out.parent}'; make it, or choose another")
    folder.mkdir(exist_ok=True)
    teachers = Teachers(records)
    columns: dict[str, dict[str, Fact]] = {}
    views: dict[str, Views] = {}
    for name, record in records.items():
        objective, shape = build_objective(record.config)
        columns[name] = list_facts(record, objective, shape)
        views[name] = look(record, objective, shape, teachers)
    alarms = [
        ("Dead term", sentence)
        for name, record in records.items()
        for sentence in find_dead_terms(record, name)
    ]
    alarms += [
        ("Collapse", sentence)
        for name, record in records.items()
        for sentence in find_collapses(record, name)
    ]
    sections = [
        *(
            _section_of_charts(key, draw(records), folder)
            for key, draw in (("losses", draw_losses), ("health", draw_health), ("times", draw_times))
        ),
        *(_section_of_boards(key, views, columns, folder) for key in ("pictures", "ratios")),
        _section_of_cka(views, folder),
        *(_section_of_boards(key, views, columns, folder) for key in ("patches", "attention")),
    ]
    page = render_page(list(records), alarms, list(columns.values()), sections)
    _save(out, page.encode())
    return out


def name_runs(runs: list[Path]) -> list[str]:
    """Each run by the end of its path, as short as tells them apart. Raises UserError for one that is named twice."""
    parts = [path.expanduser().resolve().parts for path in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"a run is named twice: {', '.join(map(str, runs))}; name each once")


def _section_of_charts(key: str, charts: Charts, folder: Path) -> Section:
    title, note = NOTES[key]
    for stem, figure in charts.items():
        _save_figure(folder, stem, figure)
    return Section(
        title,
        note,
        figures([to_svg(figure) for figure in charts.values()])
        if charts
        else missing("These runs were trained before this was measured"),
    )


def _section_of_boards(
    key: str, views: dict[str, Views], columns: dict[str, dict[str, Fact]], folder: Path
) -> Section:
    title, note = NOTES[key]
    parts = []
    for name, found in views.items():
        small = columns[name]["objective"].note if key == "pictures" else ""
        if key not in found.boards:
            parts.append((name, small, missing(found.missing[key])))
            continue
        board = found.boards[key]
        parts.append((name, small, board.html()))
        _save_figure(
            folder,
            f"{key}-{file_name(name)}",
            draw_mosaic(
                f"{name} {small}".strip(), board.mosaic(light("--surface")), board.labels, board.heads
            ),
        )
    return Section(title, note, side_by_side(parts))


def _section_of_cka(views: dict[str, Views], folder: Path) -> Section:
    title, note = NOTES["cka"]
    parts = []
    for name, found in views.items():
        body = missing(found.missing["cka"]) if "cka" in found.missing else ""
        if found.cka is not None:
            figure = draw_grid(
                f"{name} beside {found.teacher}",
                found.cka,
                rows="student's block",
                columns="teacher's block",
                marked=found.pairs,
            )
            _save_figure(folder, f"cka-{file_name(name)}", figure)
            body = figures([to_svg(figure)]) + body
        parts.append((name, "", body or missing("No run of this page has a teacher")))
    return Section(title, note, side_by_side(parts))


def _save_figure(folder: Path, stem: str, figure: Figure) -> None:
    _save(folder / f"{stem}.png", to_png(figure))


def _save(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)
