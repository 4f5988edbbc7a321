"""What measures the students of a run while they train: losses on data.val, k-NN, final accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable

from dmae_ds.train.family_engine import members_of_engine
from dmae_ds.train.metrics import MemberMetrics

if TYPE_CHECKING:
    from dmae_ds.train.run import BuiltRun


def build_evaluations(built: BuiltRun) -> list[Callable[[int], None]]:
    """Build what measures the student while it trains; call each with the number of finished steps.

    Collective.
    """
    config = built.preflight.config
    evaluations: list[Callable[[int], None]] = []
    if config.eval.loss_every is not None:
        from dmae_ds.train.val_loss import LossDuringTraining

        evaluations.append(
            LossDuringTraining(
                built.preflight,
                built.objective,
                built.teacher,
                engine=built.engine,
                schedule=built.schedule,
                metric_logger=built.metric_logger,
                device=built.device,
            )
        )
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
        knn = KnnDuringTraining(settings, config.data, config.student, **kwargs)
        if settings.knn_at_start and not built.preflight.is_resumed:
            knn(0)
        evaluations.append(knn)
    if settings.dense_every is not None:
        evaluations.append(DenseDuringTraining(settings, config.data, config.student, **kwargs))
    if classifier is not None:
        evaluations.append(FinalAccuracy(classifier, config, built.preflight.shards, **kwargs))
    return evaluations
