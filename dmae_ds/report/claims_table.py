"""The table of the papers' claims in a section of RESULTS.md."""

from __future__ import annotations

from statistics import fmean, stdev

from dmae_ds.output.table import markdown_row
from dmae_ds.report.claims import (
    NEITHER,
    OPPOSITE,
    SHOWS,
    STUDENT_T,
    Claim,
    Comparison,
    common_seeds,
    compare,
    find_compared,
    list_differences,
    read_claims,
)
from dmae_ds.report.measures import MEASURES
from dmae_ds.report.study import NOT_RUN, ONE_SEED, Setting

NOT_MEASURED = "not measured"
HEADING = "What the papers claim, and what these runs show"
EXPLANATION = [
    f'How to read the tables "{HEADING}":',
    "",
    "- A claim is that a first number is above a second one. A cell has both, means over the seeds that all "
    "settings of the claim have, then the mean difference within a seed ± its sample standard deviation.",
    "- **Bold**: the mean difference is further from 0 than Student's t allows, which is "
    f"{STUDENT_T[1]:.2f} standard errors with three seeds and {STUDENT_T[0]:.2f} with two. Without any "
    "effect, one cell in ten would be bold.",
    "- Shows: a bold cell as claimed; opposite: a bold cell the other way round; both by the evaluations in "
    "brackets. Doesn't show: no bold cell. One seed gives no verdict.",
    "- To cost little is to lose less than a quarter of what the teacher gains at a mask ratio of .75.",
    "- Settings are found by their recipes, which are equal but for what the claim says, and for what its "
    "row says in brackets. The paper's numbers are of one run each, fine-tuned on ImageNet-1k.",
    "- k-NN and probe are of the mean of the patch tokens. Fine-tuned: a classifier whose weights are all "
    "trained, also one without pre-training.",
    "",
]


def render_claims(settings: list[Setting]) -> list[str]:
    """Lines with one row a claim; [] if these settings are about none."""
    conditions, claims = read_claims()
    found = [find_compared(claim, conditions, settings) for claim in claims]
    if not any(found):
        return []
    comparisons = [
        {title: compare(claim, compared, title) for title in claim.measures} if compared else {}
        for claim, compared in zip(claims, found, strict=True)
    ]
    titles = [title for title in MEASURES if any(row.get(title) for row in comparisons)]
    lines = [
        f"#### {HEADING}",
        "",
        markdown_row("claim", "source", "paper", *titles, "seeds", "verdict"),
        "|---|" + "---|" * (len(titles) + 4),
    ]
    for claim, compared, row in zip(claims, found, comparisons, strict=True):
        paper = "" if claim.paper is None else ", ".join(map(str, claim.paper))
        seeds = common_seeds(compared) if compared else []
        cells = [_cell(row.get(title), len(seeds)) for title in titles]
        verdict = _sum_up(row) if compared else NOT_RUN
        text = _name(claim, compared, conditions)
        lines.append(markdown_row(text, claim.source, paper, *cells, ", ".join(map(str, seeds)), verdict))
    return [*lines, ""]


def _name(claim: Claim, compared: dict[str, Setting] | None, conditions: dict[str, dict]) -> str:
    """The claim, with the keys or sections in which its recipes differ besides."""
    if not compared or not claim.may_differ:
        return claim.claim
    changed = [key for name in claim.settings for key in conditions[name]]
    differing = [
        allowed
        for allowed in claim.may_differ
        if set(list_differences([*compared.values()], but=changed))
        - set(list_differences([*compared.values()], but=[*changed, allowed]))
    ]
    return f"{claim.claim} (recipes also differ in {', '.join(differing)})" if differing else claim.claim


def _cell(comparison: Comparison | None, num_seeds: int) -> str:
    """Both means and their difference; the number of seeds where fewer were measured than trained."""
    if comparison is None:
        return ""
    differences = comparison.differences
    text = f"{fmean(differences):+.1f}"
    if len(differences) > 1:
        text += f" ± {stdev(differences):.1f}"
    if comparison.verdict in (SHOWS, OPPOSITE):
        text = f"**{text}**"
    fewer = f" ({len(differences)} of {num_seeds})" if len(differences) < num_seeds else ""
    return f"{fmean(comparison.more):.1f}, {fmean(comparison.less):.1f}: {text}{fewer}"


def _sum_up(row: dict[str, Comparison | None]) -> str:
    """The verdict over all measures, with the titles of those that show the claim or its opposite."""
    verdicts = {title: comparison.verdict for title, comparison in row.items() if comparison}
    if not verdicts:
        return NOT_MEASURED
    by = {
        verdict: [title for title in verdicts if verdicts[title] == verdict] for verdict in (SHOWS, OPPOSITE)
    }
    said = [f"{verdict} ({'; '.join(titles)})" for verdict, titles in by.items() if titles]
    if said:
        return ", ".join(said)
    return NEITHER if NEITHER in verdicts.values() else ONE_SEED
