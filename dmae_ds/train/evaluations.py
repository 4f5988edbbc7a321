"""What measures the students of a run while they train: losses on data.val, k-NN, final accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable

from dmae_ds.errors import RunFailed, UserError
from dmae_ds.train.family_engine import members_of_engine
from dmae_ds.train.metrics import MemberMetrics

if TYPE_CHECKING:
    from dmae_ds.config.run import EvalConfig
    from dmae_ds.models.vit import MaskedViT
    from dmae_ds.train.run import BuiltRun


def build_evaluations(built: BuiltRun) -> list[Callable[[int], None]]:
    """Build what measures the student while it trains; call each with the number of finished steps.

    Collective.
    """
    config = built.preflight.config
    evaluations: list[Callable[[int], None]] = []
    if config.eval.loss_every is not None:
        from dmae_ds.train.val_loss import LossDuringTraining

        losses = LossDuringTraining(
            built.preflight,
            built.objective,
            built.teacher,
            engine=built.engine,
            schedule=built.schedule,
            metric_logger=built.metric_logger,
            device=built.device,
        )
        evaluations.append(with_ways_on(losses, "losses on data.val (eval.loss_every)"))
    for name in built.objective.members():
        evaluations += _evaluations_of(built, name)
    return evaluations


def _evaluations_of(built: BuiltRun, name: str) -> list[Callable[[int], None]]:
    """Build what measures one student, by its name; "" of the only one."""
    config, student = built.preflight.members[name], built.objective.members()[name].student
    settings, classifier = config.eval, built.classifiers.get(name)
    if settings.knn_every is None and settings.dense_every is None and classifier is None:
        return []
    from dmae_ds.evaluate.frozen import check_pool_of
    from dmae_ds.train.accuracy import FinalAccuracy
    from dmae_ds.train.dense import DenseDuringTraining
    from dmae_ds.train.knn import KnnDuringTraining, TrainingRanks

    evaluations: list[Callable[[int], None]] = []
    kwargs = {
        "run_dir": built.preflight.run_dir / name,
        "schedule": built.schedule,
        "engine": members_of_engine(built.engine)[name],
        "metric_logger": MemberMetrics(built.metric_logger, name),
        "ranks": TrainingRanks(built.preflight.world, built.device, precision=config.precision),
    }
    if settings.knn_every is not None:
        check_pool_of(student, settings.knn_pool)
        measure = KnnDuringTraining(settings, config.data, config.student, **kwargs)
        num_classes = len(measure.sets[0].classes)
        check_memory(settings, student, num_train=len(measure.ids), k=settings.knn_k, num_classes=num_classes)
        later = f"dmae-ds eval knn {kwargs['run_dir']}"
        knn = with_ways_on(measure, "k-NN (eval.knn_every)", later=later)
        if settings.knn_at_start and not built.preflight.is_resumed:
            knn(0)
        evaluations.append(knn)
    if settings.dense_every is not None:
        measure = DenseDuringTraining(settings, config.data, config.student, **kwargs)
        # How many patches vote is known when the maps are read; most of the memory does not depend on it.
        k, num_classes = settings.dense_k, len(measure.sets[0].classes)
        check_memory(settings, student, num_train=k, k=k, num_classes=num_classes)
        later = f"dmae-ds eval dense {kwargs['run_dir']}"
        evaluations.append(with_ways_on(measure, "dense k-NN (eval.dense_every)", later=later))
    if classifier is not None:
        evaluations.append(FinalAccuracy(classifier, config, built.preflight.shards, **kwargs))
    return evaluations


def check_memory(
    settings: EvalConfig, student: MaskedViT, *, num_train: int, k: int, num_classes: int
) -> None:
    """Raise UserError, the same on every rank, where a search does not fit into eval.memory_gib."""
    from dmae_ds.evaluate.neighbours import choose_blocks

    try:
        choose_blocks(
            num_queries=1,
            num_train=num_train,
            dim=student.embed_dim,
            k=k,
            num_classes=num_classes,
            memory_gib=settings.memory_gib,
        )
    except UserError as error:
        error.on_every_rank = True
        raise


def with_ways_on(
    evaluate: Callable[[int], None], title: str, *, later: str | None = None
) -> Callable[[int], None]:
    """Make an evaluation's error one line that says when it came, and how training goes on.

    title: with the key that asks for it; later: the command that measures the same after training
    The error becomes RunFailed.
    """

    def measure(step: int) -> None:
        try:
            evaluate(step)
        except UserError as error:
            text = (
                f"{title} at step {step}: {error}; repair that, or add eval={{}} to train without "
                "evaluations, and continue with --resume auto"
            )
            if later is not None:
                text += f"; `{later}` measures the finished run"
            failure = RunFailed(text)
            failure.on_every_rank = error.on_every_rank
            raise failure from None

    return measure
