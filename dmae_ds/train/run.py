"""One run, wired: recipe -> data, student, objective, teacher, engine -> the loop. Each part gets its own section only."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Callable

import torch

from dmae_ds.config.deepspeed import zero_stage
from dmae_ds.config.load import dump_config
from dmae_ds.config.run import RunConfig
from dmae_ds.distributed import collectives, process_group
from dmae_ds.distributed.deepspeed_import import import_deepspeed
from dmae_ds.errors import RunFailed
from dmae_ds.models.patches import Normalize
from dmae_ds.objectives.base import Objective
from dmae_ds.objectives.build import TeacherShape, build_objective
from dmae_ds.objectives.classifier import Classifier
from dmae_ds.objectives.initial import fill_student
from dmae_ds.objectives.needs import Progress
from dmae_ds.output.durable import write_atomically
from dmae_ds.plan.geometry import Geometry, measure
from dmae_ds.plan.work import PRODUCTS, step_work
from dmae_ds.teacher.build import load_frozen_teacher, verify
from dmae_ds.teacher.frozen import DTYPES, FrozenTeacher, NoTeacher
from dmae_ds.teacher.pipeline import StageGroup, join_group
from dmae_ds.train.checkpoint.run_lock import claim
from dmae_ds.train.checkpoint.save import Checkpoints
from dmae_ds.train.collapse import CollapseMonitor
from dmae_ds.train.ema import EmaTeacher
from dmae_ds.train.engine import Engine, check_precision
from dmae_ds.train.forecast import LEAST_PARAMETERS, MemoryReport, resolve_placement
from dmae_ds.train.inputs import masked_batches, training_batches
from dmae_ds.train.kernels import WarmUp, choose_kernels
from dmae_ds.train.loop import train
from dmae_ds.train.metrics import MetricLogger, build_trackers
from dmae_ds.train.optim import build_optimizer, learning_rate
from dmae_ds.train.peak_memory import PeakMemory
from dmae_ds.train.preflight import Preflight
from dmae_ds.train.speed import Speed, gemm_rate
from dmae_ds.train.step_timer import StepTimer
from dmae_ds.train.stop import StopRequest
from dmae_ds.train.summary import summary


def run(preflight: Preflight) -> None:
    """Train a checked recipe to its end, or to the end of what a resumed run has left."""
    with process_group.joined(preflight.world, timeout_s=preflight.config.dist.timeout_s) as device:
        train_recipe(preflight, device)


def train_recipe(preflight: Preflight, device: torch.device) -> None:
    """Wire a checked recipe and train it. The process group must exist; `run` makes one."""
    stop = StopRequest()
    import_deepspeed(device)  # before memory is counted
    preflight, placed = resolve_placement(preflight, device)
    watch = PeakMemory(device)
    config, world = preflight.config, preflight.world
    objective, teacher = build_networks(preflight, device)
    classifier = objective.classifier()  # while its weights have their shapes
    # Before an engine flattens its weights, and anything hooks into its parts.
    ema = None if objective.ema is None else EmaTeacher(objective, precision=config.precision, device=device)
    lock = claim(preflight.run_dir)
    preflight = with_newest(preflight)
    large = sum(parameter.numel() for parameter in objective.parameters()) >= LEAST_PARAMETERS
    geometry = measure(config, preflight.micro_batch) if large and world.is_main else None
    memory = MemoryReport(watch, preflight, geometry) if large and watch.can_measure else None
    speed = own_speed(config, geometry, preflight.accumulation, device) if large else None
    kernels = choose_kernels(
        config,
        objective,
        getattr(teacher, "vit", None),
        device,
        zero_stage=zero_stage(preflight.deepspeed),
        large=large,
        ema=None if ema is None else ema.module,
        before=None
        if preflight.resume_from is None
        else preflight.folder.read_state(preflight.resume_from).get("linear"),
    )
    text = summary(preflight, objective, teacher, ema, placed=placed, kernels=kernels.text)
    timer, warm_up = StepTimer(), WarmUp(config.compile)
    metric_logger = MetricLogger(
        preflight.run_dir,
        is_main=world.is_main,
        accumulation=preflight.accumulation,
        global_batch=config.optim.global_batch,
        num_samples=preflight.shards.num_samples,
        log_every=config.log.every_steps,
        watch=CollapseMonitor(objective.student),
        timer=timer,
        speed=speed,
        trackers=[],
    )
    engine = Engine(objective, build_optimizer(objective, config.optim), preflight.deepspeed, device)
    process_group.bound_every_wait()
    checkpoints = Checkpoints(
        preflight.folder,
        config.checkpoint,
        identity={**preflight.identity, "linear": kernels.linear},
        student_metadata={
            "format": "pt",
            "timm_name": config.student.name,
            "timm_overrides": json.dumps(config.student.overrides()),
        },
        ema=ema,
    )
    start_step = 0 if preflight.resume_from is None else checkpoints.load(engine, preflight.resume_from)
    collectives.barrier()  # every rank has checked the run folder: rank 0 may write into it
    if world.is_main:
        preflight.run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(preflight.run_dir / "config.yaml", dump_config(config).encode())
        metric_logger.trackers = build_trackers(config.log.trackers, preflight.run_dir)
        print(text, file=sys.stderr, flush=True)
    metric_logger.start(step=start_step, num_steps=preflight.num_steps)
    batches = training_batches(
        config,
        objective,
        preflight.shards,
        world=world,
        device=device,
        micro_batch=preflight.micro_batch,
        accumulation=preflight.accumulation,
        start_step=start_step,
        stop_step=preflight.num_steps,
        max_corrupt=config.data.max_corrupt,
        corrupt_log=preflight.run_dir / "corrupt.jsonl",
    )
    normalize = Normalize(config.data.mean, config.data.std).to(device)
    inputs = masked_batches(timer.waiting("data", batches), objective.prepare, normalize, device)
    steps_per_epoch = preflight.shards.num_samples / config.optim.global_batch
    measures = evaluations(preflight, classifier, engine=engine, metric_logger=metric_logger, device=device)

    def progress_at(step: int) -> Progress:
        epoch = (
            step * config.optim.global_batch / preflight.shards.num_samples
        )  # in this order, whole epochs are whole numbers
        return Progress(step, preflight.num_steps, epoch, config.optim.epochs)

    def finish_step(step: int) -> None:
        if memory is not None:
            memory.after(step, started=start_step)
        warm_up.step()
        for measure_student in measures:
            measure_student(step)

    try:
        train(
            engine,
            timer.waiting("teacher", teacher.stream(inputs)),
            metric_logger=metric_logger,
            checkpoints=checkpoints,
            lr_at=lambda step: learning_rate(config.optim, step / steps_per_epoch),
            progress_at=progress_at,
            ema=ema,
            start_step=start_step,
            num_steps=preflight.num_steps,
            accumulation=preflight.accumulation,
            global_batch=config.optim.global_batch,
            log_every=config.log.every_steps,
            stop=stop,
            after_step=finish_step,
        )
    except RuntimeError as error:
        if not str(error).startswith(
            "DataLoader worker"
        ):  # torch's SIGCHLD handler raises it, wherever the rank just is
            raise
        raise RunFailed(
            f"{str(error).splitlines()[0]} on {world.name()}; a machine short of memory kills workers first, and fewer data.num_workers need less"
        ) from None
    finally:
        metric_logger.close()
        if lock is not None:
            lock.close()


def build_networks(preflight: Preflight, device: torch.device) -> tuple[Objective, FrozenTeacher | NoTeacher]:
    """The objective with its initial weights, and the teacher that it asks for, checked. Collective."""
    config = preflight.config
    # Groups are made before anything that one rank alone may stumble over.
    group = (
        join_group(config.teacher.stages)
        if config.teacher is not None and config.teacher.placement == "pipeline"
        else None
    )

    def build():
        check_precision(config.precision, device)
        objective, shape = build_objective(config, num_classes=preflight.num_classes)
        if config.student.weights is not None and preflight.resume_from is None:
            fill_student(objective.student, config.student.weights, config.student)
        return objective, build_teacher(
            config, shape, objective.taps, device, group, num_classes=preflight.num_classes
        )

    objective, teacher = collectives.raise_on_all_ranks(build)
    if config.teacher is not None:
        collectives.raise_on_all_ranks(lambda: verify(teacher, config.teacher))
    return objective, teacher


def build_teacher(
    config: RunConfig,
    shape: TeacherShape | None,
    taps: tuple[str, ...],
    device: torch.device,
    group: StageGroup | None = None,
    *,
    num_classes: int | None = None,
) -> FrozenTeacher | NoTeacher:
    """The teacher that the taps ask for, cut after the deepest of them; of a pipeline, this rank's stage. No collective."""
    if config.teacher is None:
        return NoTeacher()
    return load_frozen_teacher(
        config.teacher,
        taps=taps,
        whole_blocks=shape.depth,
        mean=config.data.mean,
        std=config.data.std,
        device=device,
        group=group,
        sharded=config.teacher.placement == "zero3",
        num_classes=num_classes,
    )


def with_newest(preflight: Preflight) -> Preflight:
    """Of a run that resumes, what is newest now that the folder is ours: each rank looked by itself, and the job before this one may have saved once more. Collective."""
    if not any(collectives.gather_objects(preflight.resume_from is not None)):
        return preflight
    newest = collectives.broadcast_from_main(
        collectives.raise_on_all_ranks(lambda: preflight.folder.latest() if preflight.world.is_main else None)
    )
    return dataclasses.replace(preflight, resume_from=newest)


def own_speed(
    config: RunConfig, geometry: Geometry | None, accumulation: int, device: torch.device
) -> Speed | None:
    """What a step is held against, where its geometry is known (rank 0); products are timed on all ranks at once, as they share their cores in training."""
    dtypes = {PRODUCTS[config.precision]} | (
        set() if config.teacher is None else {DTYPES[config.teacher.dtype]}
    )
    rates = {dtype: gemm_rate(dtype, device)() for dtype in dtypes}
    return None if geometry is None else Speed(step_work(config, geometry, accumulation), rates)


def evaluations(
    preflight: Preflight,
    classifier: Classifier | None,
    *,
    engine: Engine,
    metric_logger: MetricLogger,
    device: torch.device,
) -> list[Callable[[int], None]]:
    """What measures the student while it trains; each is told the number of finished steps, after each. Collective."""
    config, num_steps, found = preflight.config, preflight.num_steps, []
    if config.eval.knn_every is None and classifier is None:
        return found
    from dmae_ds.train.accuracy import FinalAccuracy
    from dmae_ds.train.knn import KnnDuringTraining, TrainingRanks

    ranks = TrainingRanks(preflight.world, device, precision=config.precision)
    if config.eval.knn_every is not None:
        steps_per_epoch = preflight.shards.num_samples / config.optim.global_batch
        found.append(
            KnnDuringTraining(
                config.eval,
                config.data,
                config.student,
                run_dir=preflight.run_dir,
                engine=engine,
                metric_logger=metric_logger,
                ranks=ranks,
                steps_per_epoch=steps_per_epoch,
                num_steps=num_steps,
            )
        )
    if classifier is not None:
        found.append(
            FinalAccuracy(
                classifier,
                config,
                preflight.shards,
                run_dir=preflight.run_dir,
                engine=engine,
                metric_logger=metric_logger,
                ranks=ranks,
                num_steps=num_steps,
            )
        )
    return found
