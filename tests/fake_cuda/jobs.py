"""Jobs of the driver: what a rank does in a step, with the waits and collectives of the second one."""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from typing import Iterator

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from dmae_ds.config.batch import split_recipe
from dmae_ds.config.deepspeed import load_deepspeed
from dmae_ds.distributed import collectives
from dmae_ds.objectives.needs import Progress
from dmae_ds.plan.fake_cuda import fake_device
from dmae_ds.plan.python_engine import patched
from dmae_ds.train.collapse import CollapseMonitor
from dmae_ds.train.ema import build_ema_teacher
from dmae_ds.train.engine import Engine
from dmae_ds.train.optim import build_optimizer
from tests.fake_cuda.accelerator import WORLD_SIZE, note_wait
from tests.fake_cuda.networks import Networks, build_meta, place
from tests.fake_cuda.step import misplaced
from tests.fake_cuda.watch import Watch

STATES = ("fp32", "exp_avg", "exp_avg_sq")


def engine(recipe: str, *, overrides: list[str], steps: int = 2, fault: str = "") -> dict:
    """Steps of the project's Engine; what the last of them waited for, sent and launched.

    fault: "wait" adds a device-wide wait to the step
    """
    meta = build_meta(recipe, *overrides)
    with fake_device("cuda") as device:
        networks = place(meta, device)
        rank = _Rank(networks)
        for step in range(steps):
            watch = Watch()
            with watched(watch):
                rank.step(step)
                if fault == "wait":
                    torch.cuda.synchronize()
        return {**seen(watch), "misplaced": misplaced(rank.inner_optimizer, networks.objective)}


def seen(watch: Watch) -> dict:
    """Numbers of a watched step."""
    return {
        "kernels": watch.num_kernels,
        "waits": dict(sorted(watch.waits.items())),
        "collectives": dict(sorted(watch.collectives.items())),
        "bytes": dict(sorted(watch.sent.items())),
        "findings": dict(sorted(watch.findings.items())),
    }


@contextlib.contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Watch a block, with DeepSpeed's streams, events and waits."""
    note_wait.append(watch.wait)
    try:
        with watch.watching():
            yield
    finally:
        note_wait.pop()


class _Rank:
    """Rank 0 of a run, between its data and its metrics."""

    def __init__(self, networks: Networks):
        self.networks, config = networks, networks.config
        objective, device = networks.objective, networks.device
        self.ema = build_ema_teacher(objective, precision=config.precision, device=device)
        self.collapse = CollapseMonitor(objective.student)
        self.split = split_recipe(config, WORLD_SIZE)
        self.inner_optimizer = build_optimizer(objective, config.optim)
        self.engine = Engine(objective, self.inner_optimizer, deepspeed_config(networks.config), device)

    def step(self, number: int) -> None:
        networks, objective = self.networks, self.networks.objective
        progress = [Progress(at, 10, 0.0, networks.config.optim.epochs) for at in (number, number + 1)]
        for index in range(self.split.accumulation):
            masked = networks.prepared(self.split.micro_batch)
            if index == 0:
                objective.start_step(progress[0])
                self.engine.set_lr(1e-4)
            ((_, _, features),) = networks.teacher.stream([(None, masked)])
            losses = self.engine.train_micro_batch(masked, {**features, **self.ema.features(masked)})
            values = {**losses, **objective.gradient_shares()}.values()
            torch.stack([value.detach().float() for value in values])
        self.ema.update(self.engine, 0.99)


def deepspeed_config(config) -> dict:
    """The DeepSpeed config of a recipe on 8 ranks."""
    split = split_recipe(config, WORLD_SIZE)
    return load_deepspeed(
        config.deepspeed,
        micro_batch=split.micro_batch,
        accumulation=split.accumulation,
        world_size=WORLD_SIZE,
        clip_grad=config.optim.clip_grad,
        precision=config.precision,
    )


def resharded(recipe: str, *, overrides: list[str]) -> dict:
    """Devices of the optimiser's state after a checkpoint of other ranks was loaded."""
    from dmae_ds.train.checkpoint.reshard import load_full_state

    meta = build_meta(recipe, *overrides)
    state = _State({name: tuple(value.shape) for name, value in meta.objective.named_parameters()})
    with fake_device("cuda") as device:
        objective = place(meta, device).objective
        optimizer = build_optimizer(objective, meta.config.optim)
        run = Engine(objective, optimizer, deepspeed_config(meta.config), device)
        load_full_state(run._engine, dict(objective.named_parameters()), state)
        places: Counter = Counter()
        for parameter, values in optimizer.state.items():
            for name, value in values.items():
                places[f"{name} on {value.device.type}, its parameter on {parameter.device.type}"] += 1
        return {"places": dict(sorted(places.items())), "misplaced": misplaced(optimizer, objective)}


class _State:
    """A checkpoint's full state (train/checkpoint/full_state.py), made up."""

    step = 7.0

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        self._shapes = shapes
        self.names = list(shapes)

    def read(self, name: str) -> dict[str, torch.Tensor]:
        return {state: torch.zeros(self._shapes[name]) for state in STATES}


def pipeline(recipe: str, *, overrides: list[str], stages: int, micro_batch: int = 8) -> dict:
    """A pipelined teacher's stream; what one of its ticks in steady state waited for and sent."""
    from dmae_ds.teacher import pipeline as module

    meta, ticks = build_meta(recipe, *overrides), 4 * stages
    with fake_device("cuda") as device, patched([(module, "_Arrived", _arrived(micro_batch))]):
        networks = place(meta, device)
        whole = networks.teacher
        teacher = module.StreamedTeacher(
            whole.vit,
            whole.taps,
            None,
            view=whole.view,
            sees=whole.sees,
            top=whole.top,
            group=module.join_group(stages),
        )
        watch, numbers, places = Watch(), [], set()
        stream = teacher.stream((number, networks.prepared(micro_batch)) for number in range(ticks))
        for number, _, features in stream:
            numbers.append(number)
            places |= {str(tensor.device) for tensor in features.values()}
            if number == 0:  # every tick from now on until the data ends is alike
                watch = Watch()
                with watched(watch):
                    following, _, _ = next(stream)
                numbers.append(following)
    assert numbers == list(range(ticks)), numbers
    return {**seen(watch), "places": sorted(places)}


def _arrived(micro_batch: int):
    """A stand-in of the pipeline's `_Arrived`: headers as 8 real ranks would have sent them."""

    class Arrived:
        def __init__(self, received, headers, tick):
            assert headers.is_cuda and headers.dtype == torch.int64, headers
            self.received, self.tick, self.stages = received, tick, headers.shape[0]

        def headers(self) -> list[list[int]]:
            lag = 2  # ticks from one stage to the next
            counts = []
            for stage in range(self.stages):
                has_run = self.tick >= lag * stage + lag - 1
                outputs = [micro_batch if has_run else 0] * self.stages
                counts.append([self.tick, micro_batch, *outputs])
            return counts

    return Arrived


def zero3_teacher(*, overrides: list[str], micro_batch: int = 8) -> dict:
    """A teacher sharded by ZeRO-3, read from a file; what its features waited for and sent."""
    from safetensors.torch import save_file

    from dmae_ds.models.vit import build_student
    from dmae_ds.teacher import build, sharded
    from dmae_ds.weights.containers import Container

    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3}
    weights = build_student("vit_tiny_patch16_224", shape, generator=torch.Generator()).state_dict()

    def for_real(function):
        def called(*args, **kwargs):
            with unset_fake_temporarily():
                return function(*args, **kwargs)

        return called

    replaced = [
        (collectives, "raise_on_all_ranks", lambda step: step()),
        (collectives, "broadcast_from_main", lambda value: value),
        (sharded, "is_pristine", lambda block: False),
        (Container, "__getitem__", for_real(Container.__getitem__)),
        (build, "meta_teacher", for_real(build.meta_teacher)),
    ]
    with tempfile.TemporaryDirectory() as folder:
        save_file(weights, f"{folder}/teacher.safetensors")
        own = [f"teacher.weights={folder}/teacher.safetensors", "teacher.format=timm", *overrides]
        sizes = ["teacher.embed_dim=48", "teacher.depth=4", "teacher.num_heads=3"]
        meta = build_meta("digits_dmae", *own, *sizes, "student.embed_dim=32", "student.num_heads=2")
        meta.teachers = {}
        with fake_device("cuda") as device, patched(replaced):
            networks, config = place(meta, device), meta.config
            teacher = build.load_frozen_teacher(
                config.teacher,
                taps=meta.objective.taps,
                whole_blocks=4,
                mean=config.data.mean,
                std=config.data.std,
                device=device,
                sharded=True,
            )
            teacher.spread()
            masked = networks.prepared(micro_batch)
            for _ in range(2):
                watch = Watch()
                with watched(watch):
                    features = teacher.features(masked)
    return {**seen(watch), "places": sorted({str(tensor.device) for tensor in features.values()})}
