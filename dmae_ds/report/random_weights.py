"""Which settings of a study are clearly above random weights of the same network."""

from __future__ import annotations

import math
from statistics import fmean, variance

from dmae_ds.report.measures import MEASURES
from dmae_ds.report.study import ONE_SEED, TEACHER, Column, Setting, list_columns
from dmae_ds.report.study_names import is_untrained

HEADING = "above random weights"
ENOUGH = 3  # standard deviations
BY = ("k-NN", "probe", "dense k-NN", "linear segmentation")  # of frozen features, with all labels


def compare_with_random(settings: list[Setting]) -> tuple[dict[str, str], str]:
    """Whether each setting is clearly above random weights: ({name: cell}, the rule in a sentence).

    A cell is yes or no, with the distance of the two means in standard deviations by the measure with the
    largest one; of one seed the distance alone. Teachers, random weights, and students whose network no run
    with random weights has, have no cell; without any cell the rule is empty, too.
    """
    students = [setting for setting in settings if not setting.name.startswith(TEACHER)]
    random = {_network(setting): setting for setting in students if is_untrained(setting.training)}
    columns = _choose_columns(students)
    deviations = {title: _pool_deviation(column, students) for title, column in columns.items()}
    cells = {}
    for setting in students:
        baseline = random.get(_network(setting), setting)
        both = {title: column for title, column in columns.items() if _have(column, setting, baseline)}
        if baseline is not setting and both:
            cells[setting.name] = _compare(setting, baseline, both, deviations)
    if not cells:
        return {}, ""
    pooled = " and ".join(f"{number:.1f} ({title})" for title, number in deviations.items() if number)
    return cells, (
        f"{HEADING.capitalize()}: whether the mean is at least {ENOUGH} standard deviations above theirs, by "
        f"the better of {' and '.join(columns)}. The deviation over seeds is pooled over all settings here "
        f"but teachers{f': {pooled}' if pooled else '; one seed has none'}."
    )


def _choose_columns(settings: list[Setting]) -> dict[str, Column]:
    """Of each measure the column that most settings have a number in."""
    chosen = {}
    for title in BY:
        columns = [column for column in list_columns(settings) if MEASURES[title].takes(column)]
        if columns:
            chosen[title] = max(columns, key=lambda column: sum(_have(column, each) for each in settings))
    return chosen


def _have(column: Column, *settings: Setting) -> bool:
    return all(column in setting.values for setting in settings)


def _pool_deviation(column: Column, settings: list[Setting]) -> float | None:
    """The square root of the settings' variances over seeds, weighted by their degrees of freedom."""
    several = [setting.values[column] for setting in settings if len(setting.values.get(column, [])) > 1]
    if not several:
        return None
    squares = math.fsum((len(values) - 1) * variance(values) for values in several)
    return math.sqrt(squares / sum(len(values) - 1 for values in several))


def _compare(
    setting: Setting,
    baseline: Setting,
    columns: dict[str, Column],
    deviations: dict[str, float | None],
) -> str:
    distances = {
        title: (fmean(setting.values[column]) - fmean(baseline.values[column])) / deviations[title]
        for title, column in columns.items()
        if len(baseline.values[column]) > 1 and deviations[title]
    }
    if not distances:
        return ONE_SEED
    title = max(distances, key=distances.__getitem__)
    verdict = "yes" if distances[title] >= ENOUGH else "no"
    return f"{verdict if len(setting.runs) > 1 else ONE_SEED}, {distances[title]:.1f} ({title})"


def _network(setting: Setting) -> str:
    """The student's network as text, without the weights that it begins with."""
    return str(sorted((key, value) for key, value in setting.training.items() if _is_of_network(key)))


def _is_of_network(key: str) -> bool:
    return key.startswith("student.") and key not in ("student.weights", "student.checkpoint_blocks")
