"""The papers' claims, and what the settings of a study say about them, seed by seed.

`claims.json` has the settings that claims are about, as conditions on recipes, and the claims: that one sum
of settings' numbers is above another. A condition is a key of a recipe, or `quarters` (the distilled pairs,
in quarters of the depth) or `distilled`; `like` takes the conditions of another setting first.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import combinations, product
from statistics import fmean, stdev

from dmae_ds.report.measures import MEASURES, Measure, by_seed, find_own, find_shared
from dmae_ds.report.study import ONE_SEED, Column, Setting
from dmae_ds.report.study_names import is_untrained

SHOWS, OPPOSITE, NEITHER = "shows", "opposite", "doesn't show"
# Student's t that is exceeded by chance in one of 20 cases, for 1, 2, ... degrees of freedom; the last one
# also for more.
STUDENT_T = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)
FACTS = ("quarters", "distilled")  # conditions that are facts of a run and no keys of its recipe


@dataclass(frozen=True)
class Claim:
    """A claim of a paper: the sum `more` of settings' numbers is above the sum `less`.

    more, less: the weight of each setting by its name in claims.json
    paper: both sums as published, fine-tuned on ImageNet-1k; None where the paper has no numbers
    measures: titles of those that are apt; less_by: the measure of `less` where it is another one
    across: whether settings may be compared that were measured by different recipes
    may_differ: keys, and sections, of the recipes in which the settings may differ next to what is claimed
    """

    claim: str
    source: str
    paper: list[float] | None
    more: dict[str, float]
    less: dict[str, float]
    measures: list[str] = field(default_factory=lambda: list(MEASURES))
    less_by: str | None = None
    across: bool = False
    may_differ: list[str] = field(default_factory=list)

    @property
    def settings(self) -> list[str]:
        return list(dict.fromkeys([*self.more, *self.less]))


@dataclass(frozen=True)
class Comparison:
    """Both sums of a claim by one measure, a number for each seed that all its settings have."""

    more: list[float]
    less: list[float]

    @property
    def differences(self) -> list[float]:
        return [more - less for more, less in zip(self.more, self.less, strict=True)]

    @property
    def verdict(self) -> str:
        """Shows or opposite where the mean difference is further from 0 than STUDENT_T standard errors."""
        num = len(self.differences)
        if num < 2:
            return ONE_SEED
        limit = STUDENT_T[min(num - 1, len(STUDENT_T)) - 1] * stdev(self.differences) / math.sqrt(num)
        mean = fmean(self.differences)
        return SHOWS if mean > limit else OPPOSITE if mean < -limit else NEITHER


def read_claims() -> tuple[dict[str, dict], list[Claim]]:
    """Read (conditions of settings by name, claims in the order of the table)."""
    content = json.loads(files("dmae_ds.report").joinpath("claims.json").read_text(encoding="utf-8"))
    conditions: dict[str, dict] = {}
    for name, given in content["settings"].items():
        conditions[name] = {**conditions.get(given.get("like"), {}), **given}
        conditions[name].pop("like", None)
    return conditions, [Claim(**claim) for claim in content["claims"]]


def find_compared(
    claim: Claim, conditions: dict[str, dict], settings: list[Setting]
) -> dict[str, Setting] | None:
    """The settings that a claim is about, by their names in claims.json; None if one is missing.

    Their recipes are equal in every key that they share, but for the conditions and `may_differ`. Of several
    such choices the one with most common seeds is taken, and then the first.
    """
    candidates = [
        [setting for setting in settings if _fulfils(setting, conditions[name])] for name in claim.settings
    ]
    changed = {key for name in claim.settings for key in conditions[name]}
    fair = [
        dict(zip(claim.settings, chosen, strict=True))
        for chosen in product(*candidates)
        if not list_differences(list(chosen), but=[*changed, *claim.may_differ])
    ]
    return max(fair, key=lambda chosen: len(common_seeds(chosen)), default=None)


def common_seeds(compared: dict[str, Setting]) -> list[int]:
    """The seeds that all these settings have, sorted."""
    return sorted(set.intersection(*(set(setting.seeds) for setting in compared.values())))


def list_differences(settings: list[Setting], *, but: list[str]) -> list[str]:
    """Keys in which recipes that have them differ, without the keys and sections in `but`."""
    pairs = combinations(map(_recipe, settings), 2)
    differing = [key for first, other in pairs for key in first if other.get(key, first[key]) != first[key]]
    return [key for key in dict.fromkeys(differing) if not any(_is_in(key, section) for section in but)]


def compare(claim: Claim, compared: dict[str, Setting], title: str) -> Comparison | None:
    """Both sums of a claim by the measure of this title; None where a setting was not measured so."""
    sums = []
    for weights, by in ((claim.more, title), (claim.less, claim.less_by or title)):
        names = claim.settings if claim.less_by is None else list(weights)
        numbers = _numbers(MEASURES[by], {name: compared[name] for name in names}, across=claim.across)
        if numbers is None:
            return None
        seeds = set.intersection(*(set(numbers[name]) for name in weights))
        sums.append(
            {
                seed: math.fsum(weight * numbers[name][seed] for name, weight in weights.items())
                for seed in seeds
            }
        )
    seeds = sorted(set(sums[0]) & set(sums[1]))
    return Comparison(*([sum_of[seed] for seed in seeds] for sum_of in sums)) if seeds else None


def _numbers(
    measure: Measure, compared: dict[str, Setting], *, across: bool
) -> dict[str, dict[int, float]] | None:
    """Of each setting its numbers by seed, all of one evaluation, or of each one's own."""
    columns: dict[str, Column | None] = dict.fromkeys(compared, find_shared(measure, [*compared.values()]))
    if across and None in columns.values():
        columns = {name: find_own(measure, setting) for name, setting in compared.items()}
    if None in columns.values():
        return None
    return {name: by_seed(compared[name], column) for name, column in columns.items()}


def _recipe(setting: Setting) -> dict[str, object]:
    """A setting's recipe, flat, without the pairs of blocks, which `quarters` stands for."""
    return {key: value for key, value in setting.training.items() if not key.endswith(".pairs")}


def _fulfils(setting: Setting, conditions: dict) -> bool:
    facts = {key: setting.runs[0].facts[key] for key in FACTS}
    return not is_untrained(setting.training) and _matches({**_recipe(setting), **facts}, conditions)


def _matches(value: object, condition: object) -> bool:
    """Whether values are equal; of a recipe only the keys of the condition count, and may be left out."""
    if isinstance(condition, dict):
        return isinstance(value, dict) and all(
            _matches(value.get(key), inner) for key, inner in condition.items()
        )
    return value == condition


def _is_in(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")
