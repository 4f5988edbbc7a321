"""What a person asks first about a run, in words: what it is, how far it came, whether its teacher is heard and its features live."""

from __future__ import annotations

import math
from statistics import median
from typing import NamedTuple

from torch import nn

from dmae_ds.config.run import ModelConfig
from dmae_ds.evaluate.record import RunRecord
from dmae_ds.evaluate.results import METRICS, headline, headline_score
from dmae_ds.objectives.feature_distillation import TeacherShape
from dmae_ds.teacher.frozen import needed_depths

DEAD_SHARE = 0.05  # of the gradient; below it a term is all but absent: the published code's has about 2%
# Effective rank (train/health.py) of what an objective is judged by, below which a run that is two thirds through has collapsed.
# Calibrated on the quickstart's digits, networks of width 64 and 128, 64 images a step. Mean of the patch tokens: five runs that learned (k-NN
# 55% to 74%) ended at 4.3 to 8.7, after lows of 1.3 to 3.1 on their way, and were above 3 from two thirds on; two whose learning rate was
# 50 times too high (k-NN 16% and 20%, ten classes) ended at 1.5 and 2.7. CLS: nine DINO runs that lost what random weights know (k-NN by CLS
# 51% to 63%, not 73%) ended at 1.8 to 3.2, eight of them below 2.8; of five that did not (69% to 74%) four at 3.4 to 4.1, one at 2.7.
DEAD_RANK = 3.0
TOKENS = {"mean": "the mean of the patch tokens", "cls": "CLS"}
JUDGED_FROM = 2 / 3  # of the epochs
# Of an EMA teacher's targets (objectives/spread.py): the share of them that differs from picture to picture. On digits a MoCo-v3 that
# learned (k-NN 78%) ended at .007, SdAE at .04 to .2; a DINO that fell to one distribution for all pictures was at .0002 after 6 epochs.
DEAD_SPREAD = 1e-3


class Fact(NamedTuple):
    """An answer, and the small print under it."""

    text: str
    note: str = ""


def list_facts(record: RunRecord, objective: nn.Module, shape: TeacherShape | None) -> dict[str, Fact]:
    """The answers by question, the weightiest first; `objective` and `shape` as the trainer builds them from the recipe."""
    config, last = record.config, record.rows[-1]
    num_parameters = sum(parameter.numel() for parameter in objective.student.parameters())
    return {
        "k-NN top-1": _knn(record),
        **_other_results(record),
        **{f"{name} at the end": _loss(record, name, objective) for name in record.losses},
        **{
            f"share of distillation, block {block_of(name)}": _share(record.last_tenth(name))
            for name in record.named("share/")
        },
        **(
            {f"effective rank of {TOKENS[config.objective.judged_by]}": _rank(rank_of(record))}
            if record.named("rank/")
            else {}
        ),
        **(
            {"spread of the targets": _spread(record.last_tenth("target/spread"))}
            if record.named("target/")
            else {}
        ),
        "objective": Fact(config.objective.name, objective.describe()),
        "student": Fact(
            config.student.name,
            _joined(f"{num_parameters / 1e6:.3g} M parameters", _overrides(config.student)),
        ),
        "teacher": _teacher(record, objective, shape),
        "steps": Fact(
            f"{last['step']:,}",
            f"{last['epoch']:.3g} of {config.optim.epochs:g} epochs, {config.optim.global_batch:,} images a step",
        ),
        "images/s, median": Fact(f"{median(record.column('images_per_s')):,.0f}", _time_split(record)),
        "DeepSpeed, precision": Fact(f"{config.deepspeed}, {config.precision}"),
        "seed": Fact(str(config.run.seed)),
    }


def find_dead_terms(record: RunRecord, name: str) -> list[str]:
    """A sentence for every distilled block whose share of the gradient has died; `name` is what the reader calls the run."""
    distillation, section = record.config.objective.distillation, record.config.objective.distillation_key
    advice = f"raise {section}.alpha"
    if distillation is not None and distillation.normalize != "none":
        advice += f", or compare raw features with {section}.normalize=none"
    sentences = []
    for column in record.named("share/"):
        share = record.last_tenth(column)
        if share < DEAD_SHARE:
            sentences.append(
                f"{name}: at student block {block_of(column)} only {share:.1%} of the gradient comes from distillation (mean of the last tenth "
                f"of the run; below {DEAD_SHARE:.0%} counts as dead). The student hardly hears its teacher: {advice}."
            )
    return sentences


def find_collapses(record: RunRecord, name: str) -> list[str]:
    """A sentence where a run's features have collapsed, and where its EMA teacher's targets have; `name` is what the reader calls the run."""
    if (
        record.rows[-1]["epoch"] < JUDGED_FROM * record.config.optim.epochs
    ):  # a healthy run passes low ranks on its way
        return []
    found = []
    if record.last_tenth("target/spread") < DEAD_SPREAD:
        found.append(
            f"{name}: of what the student is to predict only {record.last_tenth('target/spread'):.2%} differs from picture to picture (mean of the last "
            f"tenth of the run; below {DEAD_SPREAD:.1%} counts as collapsed). Its EMA teacher says the same of all of them: lower optim.base_lr, lengthen "
            "optim.warmup_epochs, or move the EMA teacher more slowly with objective.momentum."
        )
    if not rank_of(record) < DEAD_RANK:
        return found
    return found + [
        f"{name}: the student's features spread over {rank_of(record):.1f} directions only (effective rank of {TOKENS[record.config.objective.judged_by]}, "
        f"mean of the last tenth of its measurements; below {DEAD_RANK:g} counts as collapsed). All pictures look alike to it, whatever the loss says: "
        "lower optim.base_lr, lengthen optim.warmup_epochs, or set optim.clip_grad."
    ]


def rank_of(record: RunRecord) -> float:
    """Effective rank of what the run's objective is judged by, mean over the last tenth of training; NaN where it was not watched."""
    return record.last_tenth(f"rank/{record.config.objective.judged_by}")


def block_of(column: str) -> str:
    """ "share/9" -> "9"."""
    return column.partition("/")[2]


def _knn(record: RunRecord) -> Fact:
    knn, step = record.knn, record.rows[-1]["step"]
    if knn is None:
        return Fact("not measured", f"dmae-ds eval knn {record.path}")
    stale = (
        f"measured at step {knn['step']:,}, before the last"
        if knn["step"] < step
        else f"step {knn['step']:,}"
    )
    return Fact(
        headline_score("knn").format(headline(knn)),
        f"k {knn['settings']['k']}, T {knn['settings']['temperature']:g}, {knn['settings']['pool']} pool; "
        f"{knn['num_train']:,} train, {knn['num_val']:,} val; {stale}",
    )


def _other_results(record: RunRecord) -> dict[str, Fact]:
    """The newest result of every other metric and share of the labels."""
    facts = {}
    for result in record.results:
        if result is not record.knn and (result["metric"], result["labels"]) != ("knn", "all"):
            labels = "" if result["labels"] == "all" else f", {result['labels']} of the labels"
            settings = ", ".join(
                f"{key} {value}" for key, value in result["settings"].items() if value is not None
            )
            note = _joined(
                settings if len(settings) < 90 else settings[:90] + " ...", f"step {result['step']:,}"
            )
            score = headline_score(result["metric"])
            question = f"{METRICS[result['metric']].title} {score.title}{labels}"
            facts[question] = Fact(score.format(headline(result)), note)
    return facts


def _rank(rank: float) -> Fact:
    return Fact("not finite" if math.isnan(rank) else f"{rank:.1f}", "collapsed" if rank < DEAD_RANK else "")


def _spread(spread: float) -> Fact:
    return Fact(
        "not finite" if math.isnan(spread) else f"{spread:.2%}", "collapsed" if spread < DEAD_SPREAD else ""
    )


def _time_split(record: RunRecord) -> str:
    seconds = record.seconds()
    total = sum(seconds.values())
    return (
        f"{total:.2g} s a step: "
        + ", ".join(f"{part} {value / total:.0%}" for part, value in seconds.items())
        if total
        else ""
    )


def _loss(record: RunRecord, name: str, objective: nn.Module) -> Fact:
    other_units = name == "pixel" and objective.norm_pix
    return Fact(
        f"{record.last_tenth(name):.4f}",
        "of normalised patches; not comparable with raw pixels" if other_units else "",
    )


def _share(share: float) -> Fact:
    return Fact(
        "not finite" if math.isnan(share) else f"{share:.1%}", "dead term" if share < DEAD_SHARE else ""
    )


def _teacher(record: RunRecord, objective: nn.Module, shape: TeacherShape | None) -> Fact:
    teacher = record.config.teacher
    if teacher is None:
        return Fact("none")
    blocks, _ = needed_depths(objective.taps, shape.depth)
    return Fact(
        teacher.name,
        _joined(f"cut after block {blocks} of {shape.depth}", teacher.dtype, _overrides(teacher)),
    )


def _overrides(model: ModelConfig) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in model.overrides().items())


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)
