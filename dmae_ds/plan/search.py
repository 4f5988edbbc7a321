"""Searches the largest micro-batch with which something fits, among all placements and shardings."""

from __future__ import annotations

from dataclasses import dataclass

from dmae_ds.config.batch import BatchSplit, smaller_split, split_recipe
from dmae_ds.config.deepspeed import check_compile, load_deepspeed
from dmae_ds.config.run import RunConfig
from dmae_ds.errors import UserError
from dmae_ds.plan.choose import Candidate, candidates, fastest
from dmae_ds.plan.cost import Machine
from dmae_ds.plan.geometry import Geometry, measure, scaled
from dmae_ds.plan.memory import Zero

SHARDINGS = ("zero1", "zero2", "zero3", "zero3_offload")


@dataclass(frozen=True)
class Plan:
    """Every candidate at one cut of the batch. `first` is the cut that training would take by itself."""

    first: BatchSplit
    split: BatchSplit
    geometry: Geometry
    rows: list[Candidate]

    @property
    def best(self) -> Candidate | None:
        return fastest(self.rows)

    @property
    def is_smaller(self) -> bool:
        """Whether the micro-batch is smaller than training would choose, so that the command must set it."""
        return self.split != self.first


def search(config: RunConfig, machine: Machine) -> Plan:
    """Try training's own cut of the batch, then smaller ones, until something fits.

    Raises UserError where training would.
    """
    config.check_teacher()
    first = split = split_recipe(config, machine.gpus)
    geometry = measure(config, split.micro_batch, device_type="cuda")
    rows = rows_of(config, machine, geometry, split, is_first=True)
    smaller = smaller_split(config, machine.gpus, split)
    while fastest(rows) is None and smaller is not None:
        split, smaller = smaller, smaller_split(config, machine.gpus, smaller)
        # Scaling costs nothing; the networks are measured again only where something may fit.
        expected = rows_of(config, machine, scaled(geometry, split.micro_batch), split)
        if smaller is None or fastest(expected) is not None:
            geometry = measure(config, split.micro_batch, device_type="cuda")
            rows = rows_of(config, machine, geometry, split)
    return Plan(first, split, geometry, rows)


def rows_of(
    config: RunConfig, machine: Machine, geometry: Geometry, split: BatchSplit, *, is_first: bool = False
) -> list[Candidate]:
    """Candidates that training accepts."""
    rows = candidates(
        geometry,
        machine,
        _shardings(config, machine, split, is_first=is_first),
        precision=config.precision,
        accumulation=split.accumulation,
        gpu=True,
    )
    stays = [name for name, teacher in config.named_teachers().items() if teacher.dtype == "fp8"]
    return [row for row in rows if all(row.placed[name].name in ("replicated", "cache") for name in stays)]


def _shardings(config: RunConfig, machine: Machine, split: BatchSplit, *, is_first: bool) -> dict[str, Zero]:
    """DeepSpeed files that training accepts, the recipe's own before the shipped ones.

    is_first: raise UserError where the recipe's own file is not accepted; at smaller cuts it is left out,
      because it may
        fix the micro-batch
    """
    zeros = {}
    for name in dict.fromkeys((config.deepspeed, *SHARDINGS)):
        try:
            deepspeed = load_deepspeed(
                name,
                micro_batch=split.micro_batch,
                accumulation=split.accumulation,
                world_size=machine.gpus,
                clip_grad=config.optim.clip_grad,
                precision=config.precision,
            )
            check_compile(config.compile, name, deepspeed)
        except UserError:
            if is_first and name == config.deepspeed:
                raise
            continue
        zeros[name] = Zero.of(deepspeed)
    return zeros
