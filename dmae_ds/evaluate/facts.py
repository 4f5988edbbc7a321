"""Facts of a run for a person: what it is, how far it has come, whether its features are healthy."""

from __future__ import annotations

import math
from statistics import median
from typing import NamedTuple

from torch import nn

from dmae_ds.config.networks import ModelConfig
from dmae_ds.config.teachers import taps_of
from dmae_ds.evaluate.record import RunRecord
from dmae_ds.evaluate.results import METRICS, headline, headline_score
from dmae_ds.objectives.feature_distillation import TeacherShape
from dmae_ds.teacher.frozen import needed_depths

# Share of the gradient, below which a term is dead (in DMAE's published code: 2% to 5%) ...
DEAD_SHARE = 0.05
# ... unless the student imitates its teacher all the same: the distance of their features at the end, as a
# part of the first step's. A contrastive gradient is large and changes its direction, so that MoCo-v3 with
# DMAE's term gives it 4%, and imitates as well as DMAE (.26); where the head alone follows it is .47.
# BENCHMARKS.md has the table of both alarms.
ALIVE_DISTANCE = 0.4
# Where a run two thirds through counts as collapsed: parts of what its features had in the first step, with
# the initial weights. An absolute limit doesn't work: images of three simple classes have few directions by
# themselves (initial weights 2.3 to 3.7; a MoCo-v3 student with a probe of 97% 3.0).
COLLAPSED_RANK = 0.5  # effective rank (train/collapse.py) of the features that the objective is judged by
COLLAPSED_SPREAD = 0.05  # share of these features that differs from image to image (objectives/spread.py)
TOKENS = {"mean": "the mean of the patch tokens", "cls": "CLS"}
JUDGED_FROM = 2 / 3  # of the epochs
# Share of an EMA teacher's targets that differs from image to image (objectives/spread.py). On digits a
# MoCo-v3 that learned (k-NN 78%) ended at .007, SdAE at .04 to .2; a DINO whose targets became one
# distribution for all images was at .0002 after 6 epochs.
DEAD_SPREAD = 1e-3


class Fact(NamedTuple):
    """An answer, and a note to print below it."""

    text: str
    note: str = ""


def list_facts(record: RunRecord, objective: nn.Module, shapes: dict[str, TeacherShape]) -> dict[str, Fact]:
    """The facts of a run by question, the most important first.

    objective, shapes: as the trainer builds them from the recipe
    """
    config, last = record.config, record.rows[-1]
    epochs = f"{last['epoch']:.3g} of {config.optim.epochs:g} epochs"
    return {
        "k-NN top-1": _knn(record),
        **_other_results(record),
        **{f"{name} at the end": _loss(record, name, objective) for name in record.losses},
        **_val_losses(record),
        **_health(record),
        "objective": Fact(config.objective.name, objective.describe()),
        "student": _student(record, objective),
        "teacher": _teacher(record, objective, shapes),
        "steps": Fact(f"{last['step']:,}", f"{epochs}, {config.optim.global_batch:,} images a step"),
        "images/s, median": Fact(f"{median(record.column('images_per_s')):,.0f}", _time_split(record)),
        "DeepSpeed, precision": Fact(f"{config.deepspeed}, {config.precision}"),
        "seed": Fact(str(config.run.seed)),
    }


def find_dead_terms(record: RunRecord, name: str) -> list[str]:
    """A sentence for every distilled block whose share of the gradient is nearly zero.

    name: the run's name
    """
    distillation, section = record.config.objective.distillation, record.config.objective.distillation_key
    advice = f"raise {record.config.objective.distillation_weight or f'{section}.alpha'}"
    if distillation is not None and distillation.normalize != "none":
        advice += f", or compare raw features with {section}.normalize=none"
    sentences = []
    for column in record.named("share/"):
        share = record.last_tenth(column)
        if _is_dead(record, column):
            sentences.append(
                f"{name}: at student block {block_of(column)} only {share:.1%} of the gradient comes from "
                f"distillation (mean of the last tenth of the run; below {DEAD_SHARE:.0%} counts as dead), "
                f"and their distance to the teacher's is above {ALIVE_DISTANCE:g} of the first step's. The "
                f"student learns almost nothing from its teacher there: {advice}."
            )
    return sentences


def _is_dead(record: RunRecord, column: str) -> bool:
    """Whether the term at a block is dead, by its column `share/<block>`."""
    if not record.last_tenth(column) < DEAD_SHARE:
        return False
    pairs = [name for name in record.losses if name.startswith(f"align/{block_of(column)}-")]
    return not any(record.last_tenth(pair) < ALIVE_DISTANCE * record.at_start(pair) for pair in pairs)


def find_collapses(record: RunRecord, name: str) -> list[str]:
    """A sentence if a run's features have collapsed, and one if its EMA teacher's targets have.

    name: the run's name
    """
    # A healthy run has low ranks earlier in training.
    if record.rows[-1]["epoch"] < JUDGED_FROM * record.config.optim.epochs:
        return []
    sentences = []
    spread = record.last_tenth("target/spread")
    if spread < DEAD_SPREAD:
        sentences.append(
            f"{name}: of the targets that the student predicts only {spread:.2%} differs from image to image "
            f"(mean of the last tenth of the run; below {DEAD_SPREAD:.1%} counts as collapsed). "
            "Its EMA teacher gives all images the same target: lower optim.base_lr, lengthen "
            "optim.warmup_epochs, or raise objective.momentum, so that the EMA teacher changes more slowly."
        )
    reasons = [
        f"{text} (at the first step {start}; below {limit:g} times that counts as collapsed)"
        for text, start, limit in _lost(record)
    ]
    if reasons:
        tokens = TOKENS[record.config.objective.judged_by]
        sentences.append(
            f"{name}: the student's features, {tokens}, {' and '.join(reasons)}; means of the last tenth of "
            "their measurements. Images look more alike to it than to random weights: lower optim.base_lr, "
            "lengthen optim.warmup_epochs, or set optim.clip_grad."
        )
    return sentences


def _lost(record: RunRecord) -> list[tuple[str, str, float]]:
    """How features have collapsed: (what they are, the same at the first step, the limit), or nothing.

    Where labels are learned nothing counts: images of one class are meant to be alike. Runs from before
    December 2026 were not measured at the first step.
    """
    if record.config.objective.needs_labels:
        return []
    tokens, lost = record.config.objective.judged_by, []
    rank, start = rank_of(record), record.at_start(f"rank/{tokens}")
    if rank < COLLAPSED_RANK * start:
        lost.append(
            (f"spread over {rank:.1f} directions only (effective rank)", f"{start:.1f}", COLLAPSED_RANK)
        )
    share, start = record.last_tenth(f"spread/{tokens}"), record.at_start(f"spread/{tokens}")
    if share < COLLAPSED_SPREAD * start:
        lost.append((f"differ from image to image in {share:.3%}", f"{start:.2%}", COLLAPSED_SPREAD))
    return lost


def rank_of(record: RunRecord) -> float:
    """Effective rank of the features that the run's objective is judged by.

    It is the mean over the last tenth of training, NaN if it was not measured.
    """
    return record.last_tenth(f"rank/{record.config.objective.judged_by}")


def block_of(column: str) -> str:
    """The block's number in a column's name: "9" for "share/9"."""
    return column.partition("/")[2]


def _knn(record: RunRecord) -> Fact:
    knn, step = record.knn, record.rows[-1]["step"]
    if knn is None:
        return Fact("not measured", f"dmae-ds eval knn {record.path}")
    measured_at = f"step {knn['step']:,}"
    if knn["step"] < step:
        measured_at = f"measured at {measured_at}, before the last"
    first = record.knn_at_start
    before = "" if first is None or first is knn else f"; {_top1(first)} before training"
    return Fact(
        _top1(knn),
        f"k {knn['settings']['k']}, T {knn['settings']['temperature']:g}, {knn['settings']['pool']} pool; "
        f"{knn['num_train']:,} train, {knn['num_val']:,} val; {measured_at}{before}",
    )


def _top1(knn: dict) -> str:
    return headline_score("knn").format(headline(knn))


def _val_losses(record: RunRecord) -> dict[str, Fact]:
    """The last losses on data.val, with what they were at their lowest."""
    facts = {}
    for column in record.named("val/"):
        values = [value for value in record.column(column) if math.isfinite(value)]
        if values:
            note = f"with training's crops and masks; lowest {min(values):.4f}"
            facts[f"{column.partition('/')[2]} on data.val"] = Fact(f"{values[-1]:.4f}", note)
    return facts


def _other_results(record: RunRecord) -> dict[str, Fact]:
    """The newest result of every other metric and share of the labels."""
    facts = {}
    for result in record.results:
        if (result["metric"], result["labels"]) != ("knn", "all"):
            labels = "" if result["labels"] == "all" else f", {result['labels']} of the labels"
            items = result["settings"].items()
            settings = ", ".join(f"{key} {value}" for key, value in items if value is not None)
            if len(settings) >= 90:
                settings = settings[:90] + " ..."
            note = _joined(settings, f"step {result['step']:,}")
            score = headline_score(result["metric"])
            question = f"{METRICS[result['metric']].title} {score.title}{labels}"
            facts[question] = Fact(score.format(headline(result)), note)
    return facts


def _health(record: RunRecord) -> dict[str, Fact]:
    """Shares of the gradient, effective rank and spread of the targets, as far as they were measured."""
    facts = {}
    for column in record.named("share/"):
        share = record.last_tenth(column)
        note = "dead term" if _is_dead(record, column) else ""
        facts[f"share of distillation, block {block_of(column)}"] = Fact(_percent(share, 1), note)
    if record.named("rank/"):
        rank = rank_of(record)
        text = "not finite" if math.isnan(rank) else f"{rank:.1f}"
        tokens = TOKENS[record.config.objective.judged_by]
        note = "collapsed" if _lost(record) else ""
        start = record.at_start(f"rank/{record.config.objective.judged_by}")
        note = _joined(note, "" if math.isnan(start) else f"{start:.1f} at the first step")
        facts[f"effective rank of {tokens}"] = Fact(text, note)
    if record.named("target/"):
        spread = record.last_tenth("target/spread")
        note = "collapsed" if spread < DEAD_SPREAD else ""
        facts["spread of the targets"] = Fact(_percent(spread, 2), note)
    return facts


def _percent(share: float, digits: int) -> str:
    return "not finite" if math.isnan(share) else f"{share:.{digits}%}"


def _time_split(record: RunRecord) -> str:
    seconds = record.seconds()
    total = sum(seconds.values())
    if not total:
        return ""
    shares = ", ".join(f"{part} {value / total:.0%}" for part, value in seconds.items())
    return f"{total:.2g} s a step: {shares}"


def _loss(record: RunRecord, name: str, objective: nn.Module) -> Fact:
    normalised = name == "pixel" and objective.norm_pix
    note = "of normalised patches; not comparable with raw pixels" if normalised else ""
    return Fact(f"{record.last_tenth(name):.4f}", note)


def _student(record: RunRecord, objective: nn.Module) -> Fact:
    student = record.config.student
    num_parameters = sum(parameter.numel() for parameter in objective.student.parameters())
    return Fact(student.name, _joined(f"{num_parameters / 1e6:.3g} M parameters", _overrides(student)))


def _teacher(record: RunRecord, objective: nn.Module, shapes: dict[str, TeacherShape]) -> Fact:
    """The teachers' networks, and how each is cut; of several with their names."""
    teachers, notes = record.config.named_teachers(), []
    if not teachers:
        return Fact("none")
    for name, teacher in teachers.items():
        blocks, _ = needed_depths(taps_of(name, objective.taps), shapes[name].depth)
        cut = f"cut after block {blocks} of {shapes[name].depth}"
        notes.append(f"{name}: {cut}" if name else cut)
        notes += filter(None, [teacher.dtype, _overrides(teacher)])
    return Fact(" + ".join(teacher.name for teacher in teachers.values()), _joined(*notes))


def _overrides(model: ModelConfig) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in model.overrides().items())


def _joined(*texts: str) -> str:
    return "; ".join(text for text in texts if text)
