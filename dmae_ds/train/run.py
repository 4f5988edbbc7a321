"""One run: build a checked recipe, load its checkpoint, and stream its batches into the training loop."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Iterator

import torch
from torch import Tensor

from dmae_ds.config.deepspeed import zero_stage
from dmae_ds.config.load import dump_config
from dmae_ds.data.batch import Batch
from dmae_ds.distributed import collectives, process_group
from dmae_ds.distributed.device import device_name
from dmae_ds.errors import worker_failure
from dmae_ds.models.masking import PatchBatch
from dmae_ds.objectives.base import Objective
from dmae_ds.objectives.classifier import Classifier
from dmae_ds.output.durable import write_atomically
from dmae_ds.output.lines import say
from dmae_ds.plan.geometry import measure
from dmae_ds.train.checkpoint.run_lock import claim
from dmae_ds.train.checkpoint.save import Checkpoints
from dmae_ds.train.collapse import CollapseMonitors
from dmae_ds.train.describe_end import describe_done, describe_loading
from dmae_ds.train.device_choices import choose_on_device
from dmae_ds.train.ema import EmaTeacher, NoEmaTeacher, build_ema_teacher
from dmae_ds.train.engine import Engine
from dmae_ds.train.evaluations import build_evaluations
from dmae_ds.train.family_engine import FamilyEngine, build_engine
from dmae_ds.train.forecast import MemoryReport, has_large
from dmae_ds.train.inputs import input_stream
from dmae_ds.train.kernels import Kernels, WarmUp, choose_kernels
from dmae_ds.train.loop import train
from dmae_ds.train.metrics import MetricLogger
from dmae_ds.train.networks import Teacher, build_networks
from dmae_ds.train.peak_memory import PeakMemory
from dmae_ds.train.preflight import Preflight, check_may_begin
from dmae_ds.train.run_log import begin_log, log_until_end
from dmae_ds.train.schedule import Schedule
from dmae_ds.train.speed import measure_speed
from dmae_ds.train.starts import append_start, changes, describe_environment
from dmae_ds.train.step_timer import StepTimer
from dmae_ds.train.stop import StopRequest
from dmae_ds.train.summary import summary
from dmae_ds.train.trackers import build_trackers


def run(preflight: Preflight) -> None:
    """Train a checked recipe to its end, in a process group that is made here."""
    with process_group.joined(preflight.world, timeout_s=preflight.config.dist.timeout_s) as device:
        train_recipe(preflight, device)


def train_recipe(preflight: Preflight, device: torch.device) -> None:
    """Build a checked recipe, load its checkpoint if it resumes, and train it.

    The process group must exist.
    """
    with log_until_end():
        _train_recipe(preflight, device)


def _train_recipe(preflight: Preflight, device: torch.device) -> None:
    stop, since = StopRequest(), time.monotonic()
    built = build(preflight, device)
    start_step = load(built)
    batches = stream(built, start_step)
    evaluations = build_evaluations(built)

    def after_step(step: int) -> None:
        if built.memory is not None:
            built.memory.after(step, started=start_step)
        built.warm_up.step()
        for evaluate in evaluations:
            evaluate(step)

    try:
        train(
            built.engine,
            batches,
            schedule=built.schedule,
            start_step=start_step,
            ema=built.ema,
            metric_logger=built.metric_logger,
            checkpoints=built.checkpoints,
            stop=stop,
            after_step=after_step,
        )
    except RuntimeError as error:
        failure = worker_failure(error, where=built.preflight.world.name())
        if failure is None:
            raise
        raise failure from None
    finally:
        built.metric_logger.close()
        if built.lock is not None:
            built.lock.close()
    if preflight.world.is_main:
        for name, member in built.objective.members().items():
            say(describe_loading(built.preflight.members[name], member.student), dated=False)
        say(describe_done(built.preflight, seconds=time.monotonic() - since))


@dataclass(frozen=True)
class BuiltRun:
    """Everything of a run that exists before its checkpoint is loaded and its first batch is read.

    preflight: with the placement chosen and the newest checkpoint named
    classifiers: by name of the student, of those that train one; memory: None where none is measured
    lock: held by rank 0; summary: printed at the start
    """

    preflight: Preflight
    device: torch.device
    schedule: Schedule
    objective: Objective
    classifiers: dict[str, Classifier]
    teacher: Teacher
    ema: EmaTeacher | NoEmaTeacher
    engine: Engine | FamilyEngine
    checkpoints: Checkpoints
    metric_logger: MetricLogger
    memory: MemoryReport | None
    warm_up: WarmUp
    lock: IO[str] | None
    summary: str


def build(preflight: Preflight, device: torch.device) -> BuiltRun:
    """Build the networks, the engine and everything around them, and take possession of the run folder.

    Collective. The order matters: numerics come before the first matrix product; DeepSpeed is imported before
    memory is counted; the classifier, the EMA teacher, kernels and hooks come before the engine, which
    flattens the weights.
    """
    preflight, texts = choose_on_device(preflight, device)
    peak_memory = PeakMemory(device)
    config, is_main = preflight.config, preflight.world.is_main
    objective, teacher = build_networks(preflight, device)
    found = {name: member.classifier() for name, member in objective.members().items()}
    classifiers = {name: classifier for name, classifier in found.items() if classifier is not None}
    ema = build_ema_teacher(objective, precision=config.precision, device=device)
    lock = claim(preflight.run_dir)
    preflight = with_newest_checkpoint(preflight)
    is_large = has_large(objective)
    geometry = None
    if is_large and is_main:
        geometry = measure(config, preflight.micro_batch, device_type=device.type)
    memory = MemoryReport(peak_memory, preflight, geometry) if is_large and peak_memory.can_measure else None
    speed = measure_speed(config, geometry, preflight.accumulation, device) if is_large else None
    kernels = choose_kernels(
        config,
        [objective, *teacher.networks(), ema.module],
        device,
        zero_stage=zero_stage(preflight.deepspeed),
        is_large=is_large,
        previous=previous_linear(preflight),
    )
    texts["kernels"] = "; ".join(filter(None, [texts["kernels"], kernels.text]))
    start_text = summary(preflight, objective, teacher, ema, **texts)
    schedule = Schedule(
        config.optim,
        num_steps=preflight.num_steps,
        num_samples=preflight.num_images,
        accumulation=preflight.accumulation,
        log_every=config.log.every_steps,
    )
    warm_up = WarmUp(config.compile)
    metric_logger = MetricLogger(
        preflight.run_dir,
        schedule,
        is_main=is_main,
        monitor=CollapseMonitors({name: one.student for name, one in objective.members().items()}),
        timer=StepTimer(),
        speed=speed,
        members=tuple(objective.members()),
    )
    engine = build_engine(objective, config.optim, preflight.deepspeed, device)
    process_group.bound_every_wait()
    return BuiltRun(
        preflight=preflight,
        device=device,
        schedule=schedule,
        objective=objective,
        classifiers=classifiers,
        teacher=teacher,
        ema=ema,
        engine=engine,
        checkpoints=build_checkpoints(preflight, kernels, ema),
        metric_logger=metric_logger,
        memory=memory,
        warm_up=warm_up,
        lock=lock,
        summary=start_text,
    )


def load(built: BuiltRun) -> int:
    """Load the checkpoint that the run resumes from, if any, and start its logs; returns the first step.

    Collective.
    """
    preflight, start_step = built.preflight, 0
    if preflight.world.is_main:
        begin_log(preflight.run_dir)
    if preflight.resume_from is not None:
        start_step = built.checkpoints.load(built.engine, preflight.resume_from)
    collectives.barrier()  # every rank has checked the run folder: rank 0 may write into it
    if preflight.world.is_main:
        changed = record_start(preflight, built.device, start_step)
        for line in [*changed, *built.summary.splitlines()]:
            say(line, dated=False, always=line.startswith("WARNING"))
    built.metric_logger.trackers = collectives.raise_on_all_ranks(
        lambda: (
            build_trackers(preflight.config, preflight.run_dir, step=start_step)
            if preflight.world.is_main
            else []
        )
    )
    built.metric_logger.start(start_step)
    return start_step


def record_start(preflight: Preflight, device: torch.device, step: int) -> list[str]:
    """Write config.yaml and a line of starts.jsonl; returns what a resumed run changes, a line each.

    Of a family, also into the folder of each student, with the recipe of that student alone.
    """
    config, run_dir = preflight.config, preflight.run_dir
    environment = describe_environment(device=device_name(device), world_size=preflight.world.size)
    changed = [] if preflight.resume_from is None else changes(run_dir, config, environment)
    for name, member in {**preflight.members, "": config}.items():
        folder = run_dir / name
        folder.mkdir(exist_ok=True)
        append_start(folder, member, environment, step=step)
        write_atomically(folder / "config.yaml", dump_config(member).encode())
    return changed


def stream(built: BuiltRun, start_step: int) -> Iterator[tuple[Batch, PatchBatch, dict[str, Tensor]]]:
    """This rank's micro-batches from a step on, with their patches and the teacher's features (inputs.py)."""
    return input_stream(
        built.preflight,
        built.objective,
        built.teacher,
        start_step=start_step,
        device=built.device,
        timer=built.metric_logger.timer,
    )


def with_newest_checkpoint(preflight: Preflight) -> Preflight:
    """Look at the run folder again, now that it is ours: another job may have trained in it meanwhile.

    Collective. A run that resumes takes the newest checkpoint, which rank 0 names; raises UserError, on every
    rank, where a new run finds the folder taken.
    """

    def look() -> Path | None:
        if not preflight.world.is_main:
            return None
        check_may_begin(preflight.folder, preflight.resume)
        newest = preflight.folder.latest() if preflight.resume == "auto" else None
        if newest is not None:
            preflight.folder.check_same_run(newest, preflight.identity)
        return newest

    newest = collectives.raise_on_all_ranks(look)
    return dataclasses.replace(preflight, resume_from=collectives.broadcast_from_main(newest))


def previous_linear(preflight: Preflight) -> str | None:
    """Linear kernels ("torch" or "onednn") of the run that is resumed; None for a new run."""
    if preflight.resume_from is None:
        return None
    return preflight.folder.read_state(preflight.resume_from).get("linear")


def build_checkpoints(preflight: Preflight, kernels: Kernels, ema: EmaTeacher | NoEmaTeacher) -> Checkpoints:
    """Build what saves and loads the run."""
    return Checkpoints(
        preflight.folder,
        preflight.config.checkpoint,
        identity={**preflight.identity, "linear": kernels.linear},
        student_metadata={
            name: {
                "format": "pt",
                "timm_name": member.student.name,
                "timm_overrides": json.dumps(member.student.overrides()),
            }
            for name, member in preflight.members.items()
        },
        ema=ema,
    )
