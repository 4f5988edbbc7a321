"""The papers' claims: which settings they are about, both numbers seed by seed, and the verdict."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from dmae_ds.config.load import load_config
from dmae_ds.report.claims import Comparison, common_seeds, compare, find_compared, read_claims
from dmae_ds.report.claims_table import render_claims
from dmae_ds.report.published import read_published
from dmae_ds.report.random_weights import compare_with_random
from dmae_ds.report.runs import Run, collect_facts, read_run
from dmae_ds.report.study import TEACHER, Setting, collect_values, group
from tests.report.made_runs import make_run

REPOSITORY = Path(__file__).resolve().parents[2]
CONDITIONS, CLAIMS = read_claims()
FIRST = CLAIMS[0]  # with a teacher > without
TEACHES, PLAIN = FIRST.settings


def measured(metric, value, labels="all", **settings):
    fields = {"metric": metric, "labels": labels, "scores": {"top1": value}}
    return {
        **fields,
        "settings": {"pool": "mean", **settings},
        "data": "fingerprint",
        "val": None,
        "num_val": 9,
    }


def made(name, numbers, *, facts=None, **training):
    """A setting whose recipe fulfils the conditions of claims.json under this name.

    numbers: the results of each seed; training: further keys of the recipe
    """
    conditions = CONDITIONS.get(name, {})
    facts = {"quarters": conditions.get("quarters"), "distilled": False, **(facts or {})}
    runs = [
        SimpleNamespace(config=SimpleNamespace(run=SimpleNamespace(seed=seed)), facts=facts, results=results)
        for seed, results in numbers.items()
    ]
    recipe = {"optim.base_lr": 0.1, "student.depth": 4, **conditions, **training}
    return Setting(name, runs, collect_values(runs), recipe)


def knn(*values):
    return {seed: [measured("knn", value)] for seed, value in enumerate(values)}


def compared(settings, claim=FIRST):
    return find_compared(claim, CONDITIONS, settings)


def row_of(settings, claim=FIRST):
    (line,) = [line for line in render_claims(settings) if line.startswith(f"| {claim.claim}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def settings_of_the_study():
    """(name, recipe, options) of launch/study.sh."""
    script = (REPOSITORY / "launch" / "study.sh").read_text()
    for block in ("SETTINGS", "CLASSIFIERS"):
        (lines,) = re.findall(rf'^{block}="\n(.*?)^"', script, re.DOTALL | re.MULTILINE)
        yield from (line.split() for line in lines.splitlines())


def test_every_claim_finds_its_settings_among_those_of_the_study(tmp_path):
    values = {("knn", "all"): 70.0, ("probe", "all"): 80.0, ("probe", "1%"): 40.0, ("finetune", "all"): 90.0}
    results = [measured(metric, value, labels) for (metric, labels), value in values.items()]
    teacher = make_run(tmp_path / "teacher", "digits_teacher", num_images=1400)
    make_run(tmp_path / "g2sd-generic", "digits_g2sd_generic", f"teacher.weights={teacher}", num_images=1400)
    runs = [read_run(teacher)]
    for name, recipe, *options in settings_of_the_study():
        options = [option.replace("$OUT", str(tmp_path)).replace("-seedSEED", "") for option in options]
        if re.search("^teacher:", (REPOSITORY / "launch" / "recipes" / f"{recipe}.yaml").read_text(), re.M):
            options.append(f"teacher.weights={teacher}")
        config = load_config(recipe, options)
        facts = collect_facts(config, num_images=1400, step=1)
        runs.append(Run(tmp_path / name, config, facts, results, hours=1.0, world_size=1))
    settings = group(runs)
    found = {claim.claim: compared(settings, claim) for claim in CLAIMS}
    assert all(found.values()), [text for text, chosen in found.items() if not chosen]
    for chosen in found.values():
        assert len({setting.name for setting in chosen.values()}) == len(chosen)
    lines = [line for line in render_claims(settings) if line.endswith("| 0 | one seed |")]
    assert len(lines) == len(CLAIMS) and sum("differ in optim" in line for line in lines) == 3
    above, _ = compare_with_random(settings)
    assert set(above.values()) == {"one seed"} and not any(name.startswith(TEACHER) for name in above)
    assert set(above) == {each.name for each in settings if each.training["student.embed_dim"] == 64} - {
        "random weights"
    }


def test_the_papers_numbers_are_those_of_their_tables():
    values = {
        (row["paper"].split()[0], row["table"].split()[0], value)
        for row in read_published()[1]
        for value in row.values()
    }
    simple = [claim for claim in CLAIMS if claim.paper and len(claim.settings) == 2 and not claim.less_by]
    assert len(simple) > 8
    for claim in simple:
        paper, table = re.match(r"(\w+), (?:Table )?(\w+)", claim.source).groups()
        assert all((paper.lower(), table, value) in values for value in claim.paper), claim.claim


@pytest.mark.parametrize(
    "more, verdict",
    [
        ([3.0, 3.0, 3.0], "shows"),
        ([1.0, 2.0, 3.0], "shows"),
        ([0.9, 2.0, 3.1], "shows"),
        ([0.7, 2.0, 3.3], "doesn't show"),  # 2.66 standard errors
        ([-1.0, -2.0, -3.0], "opposite"),
        ([0.0, 0.0], "doesn't show"),
        ([1.0, 2.0], "doesn't show"),  # 3 standard errors, but of two seeds
        ([1.0, 1.2], "shows"),
        ([1.0] * 30 + [-1.0] * 12, "shows"),  # 2.98, of more seeds than the table of Student's t has
        ([9.0], "one seed"),
    ],
)
def test_the_verdict_is_that_of_the_differences_within_seeds(more, verdict):
    offsets = [50.0 + 7 * seed for seed in range(len(more))]  # what the seeds share does not count
    shifted = [value + offset for value, offset in zip(more, offsets, strict=True)]
    assert Comparison(shifted, offsets).verdict == verdict


def test_a_key_that_the_first_setting_lacks_must_be_equal_too():
    (claim,) = [claim for claim in CLAIMS if claim.claim.startswith("mask ratio .90 costs MAE more")]
    names = [*claim.settings]
    sizes = {name: {"teacher.depth": 8} for name in names if name.startswith("DMAE")}
    assert len(sizes) == 2 and names[0] not in sizes
    settings = [made(name, knn(70.0, 72.0), **sizes.get(name, {})) for name in names]
    assert compared(settings, claim)
    settings[-1].training["teacher.depth"] = 12
    assert names[-1] in sizes and compared(settings, claim) is None


def test_numbers_are_compared_within_the_seeds_that_both_settings_have():
    one = made(TEACHES, {**knn(80.0, 75.0, 90.0), 7: [measured("knn", 1.0)]})
    other = made(PLAIN, knn(70.0, 64.0, 81.0))
    cells = row_of([one, other])
    assert cells[2] == "84.0, 81.6" and cells[-2:] == ["0, 1, 2", "shows (k-NN)"]
    assert cells[3] == "81.7, 71.7: **+10.0 ± 1.0**"
    cells = row_of([one, made(PLAIN, {**knn(70.0, 64.0), 2: []})])
    assert cells[3] == "77.5, 67.0: **+10.5 ± 0.7** (2 of 3)"
    assert row_of([one, made(PLAIN, knn(99.0, 90.0, 109.0))])[-1] == "opposite (k-NN)"
    assert row_of([one, made(PLAIN, knn(79.0, 76.0, 90.0))])[-1] == "doesn't show"
    assert row_of([one, made(PLAIN, {0: [measured("knn", 70.0, k=10)]})])[-1] == "not measured"
    twice = [{0: [measured("knn", base - 9, k=10)], 1: []} for base in (80.0, 70.0)]
    both = [
        made(name, {seed: [*more, measured("knn", base + seed)] for seed, more in extra.items()})
        for name, base, extra in zip((TEACHES, PLAIN), (80.0, 70.0), twice, strict=True)
    ]
    assert row_of(both)[3] == "80.5, 70.5: **+10.0 ± 0.0**"  # of two evaluations the one of more seeds
    assert render_claims([one]) == [] and "not run" in {
        line.split(" | ")[-1][:7] for line in render_claims([one, other])
    }


def test_a_claim_takes_recipes_that_are_equal_but_for_what_it_is_about():
    one, other = made(TEACHES, knn(1, 2)), made(PLAIN, knn(1, 2, 3))
    longer = made(PLAIN, knn(1, 2), **{"optim.base_lr": 0.2})
    assert compared([one, longer]) is None and compared([one, longer, other])[PLAIN] is other
    untrained = made(PLAIN, knn(1, 2), **{"optim.base_lr": 1e-12})
    assert compared([made(TEACHES, knn(1), **{"optim.base_lr": 1e-12}), untrained]) is None
    assert compared([made(TEACHES, knn(1), facts={"quarters": [[3, 4]]}), other]) is None
    wide = [made(name, knn(1, 2, 3), **{"student.depth": 8}) for name in (TEACHES, PLAIN)]
    chosen = compared([one, other, *wide])  # of two pairs the one with more seeds
    assert list(chosen.values()) == wide and common_seeds(chosen) == [0, 1, 2]
    tuned = next(claim for claim in CLAIMS if "optim.base_lr" in claim.may_differ)
    facts = [{"distilled": name == tuned.settings[0]} for name in tuned.settings]
    both = [made(name, knn(1, 2), facts=fact) for name, fact in zip(tuned.settings, facts, strict=True)]
    slower = made(tuned.settings[1], knn(1, 2), facts=facts[1], **{"optim.base_lr": 0.3})
    assert "differ" not in row_of(both, tuned)[0]
    assert "optim.base_lr" in row_of([both[0], slower], tuned)[0]
    assert "warmup" not in row_of([both[0], slower], tuned)[0]


def test_sums_of_several_settings_and_of_two_measures():
    few = next(claim for claim in CLAIMS if claim.less_by)
    numbers = {TEACHES: ((60, 88), (64, 90)), PLAIN: ((45, 87), (46, 90))}
    settings = [
        made(
            name,
            {
                seed: [measured("probe", low, "1%"), measured("probe", high)]
                for seed, (low, high) in enumerate(of_seeds)
            },
        )
        for name, of_seeds in numbers.items()
    ]
    comparison = compare(few, compared(settings, few), few.measures[0])
    assert (comparison.more, comparison.less) == ([15, 18], [1, 0])
    little = next(claim for claim in CLAIMS if 0.25 in claim.more.values())
    values = {TEACHES: (80.0, 81.0), PLAIN: (72.0, 70.0)}
    settings = [made(name, knn(*values.get(name, (79.0, 81.5)))) for name in little.settings]
    comparison = compare(little, compared(settings, little), "k-NN")
    assert (comparison.more, comparison.less) == ([2.0, 2.75], [1.0, -0.5])


def test_classifiers_of_other_recipes_are_compared_only_where_a_claim_says_so():
    across = next(claim for claim in CLAIMS if claim.across)
    kinds = [("finetune", "a"), ("supervised", "b")]

    def settings(claim):
        return [
            made(name, {seed: [measured(kind, 90.0 + seed, recipe=recipe)] for seed in (0, 1)})
            for name, (kind, recipe) in zip(claim.settings, kinds, strict=True)
        ]

    assert compare(across, compared(settings(across), across), "fine-tuned").differences == [0, 0]
    assert compare(FIRST, compared(settings(FIRST)), "fine-tuned") is None


def test_above_random_weights_is_three_pooled_deviations_by_the_better_measure():
    def results(knn_values, probe_values):
        return {
            seed: [measured("knn", one), measured("probe", other)]
            for seed, (one, other) in enumerate(zip(knn_values, probe_values, strict=True))
        }

    def named(name, numbers, **training):
        return made(name, numbers, **{"optim.base_lr": 0.1, "student.weights": None, **training})

    settings = [
        named("random", results([50, 52, 54], [60, 60, 60]), **{"optim.base_lr": 1e-12}),
        named("clear", results([58, 59, 60], [60, 60, 60]), **{"student.weights": "elsewhere"}),
        named("unclear", results([54, 55, 56], [60, 62, 63])),
        named("by the probe", results([50, 52, 54], [64, 65, 66])),
        named("alone", results([99], [99])),
        named("wider", results([99, 99], [99, 99]), **{"student.depth": 8}),
        named(f"{TEACHER}mae", results([90, 10], [90, 10])),
        named("not measured", {0: [measured("finetune", 99.0)]}),
    ]
    # k-NN: variances 4, 1, 1, 4 of 2 degrees of freedom each and 0 of 1; probe: 0, 0, 7/3, 1 and 0.
    cells, rule = compare_with_random(settings)
    assert cells == {
        "clear": "yes, 4.7 (k-NN)",
        "unclear": "no, 2.0 (k-NN)",
        "by the probe": "yes, 5.8 (probe)",
        "alone": "one seed, 45.3 (probe)",
    }
    assert "1.5 (k-NN) and 0.9 (probe)" in rule
    assert compare_with_random(settings[1:]) == ({}, "")
    lone = named("random", results([50], [60]), **{"optim.base_lr": 1e-12})
    assert compare_with_random([lone, settings[1]])[0] == {"clear": "one seed"}


def test_conditions_are_inherited_and_the_file_is_one_line_an_entry():
    text = (REPOSITORY / "dmae_ds" / "report" / "claims.json").read_text()
    given = json.loads(text)["settings"]
    like = {name: entry["like"] for name, entry in given.items() if "like" in entry}
    assert len(like) > 5 and all("like" not in conditions for conditions in CONDITIONS.values())
    for name, parent in like.items():
        changed = set(given[name]) - {"like"}
        assert changed and {k: v for k, v in CONDITIONS[name].items() if k not in changed} == {
            k: v for k, v in CONDITIONS[parent].items() if k not in changed
        }
    assert {name for claim in CLAIMS for name in claim.settings} == set(CONDITIONS)
