"""Whether to store a teacher's features (`dmae-ds teacher cache`): their size, the time, and when it pays."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import floor

from dmae_ds.config.run import RunConfig
from dmae_ds.plan.choose import Candidate, fastest
from dmae_ds.plan.cost import Machine
from dmae_ds.plan.geometry import Geometry, with_stored_features
from dmae_ds.plan.search import Plan, rows_of
from dmae_ds.teacher.frozen import DTYPES


@dataclass(frozen=True)
class StoredPlan:
    """A run with stored features next to the live one, at the same share of the peak.

    images, steps: of the run; image_bytes: in the features' own dtype
    live_s, student_s, teacher_s: seconds of a step, of one without the teacher, and of the teacher alone
    storage_gb_s: GB/s that all nodes together read or write
    """

    images: int
    steps: int
    image_bytes: float
    live_s: float
    student_s: float
    teacher_s: float
    storage_gb_s: float

    @property
    def storage_s(self) -> float:
        """Seconds that storage takes for the features of a step."""
        return self.images / self.steps * self.image_bytes / self.storage_gb_s / 1e9

    @property
    def stored_s(self) -> float:
        """Seconds of a step with stored features."""
        return max(self.student_s, self.storage_s)

    @property
    def write_s(self) -> float:
        """Seconds to write them all: the teacher's, or storage's."""
        return self.steps * max(self.teacher_s, self.storage_s)

    @property
    def runs(self) -> int | None:
        """From how many runs on writing and reading takes less time; None where no run gets faster."""
        saved = self.steps * (self.live_s - self.stored_s)
        return floor(self.write_s / saved) + 1 if saved > 0 else None

    def read_gb_s(self, ranks: int) -> float:
        """GB/s that a rank reads where storage does not limit it."""
        return self.images / self.steps * self.image_bytes / self.student_s / ranks / 1e9


def plan_stored(config: RunConfig, machine: Machine, result: Plan, *, steps: int) -> StoredPlan | None:
    """Compute it for the fastest placement that fits, of all teachers; None without one."""
    geometry, live = result.geometry, result.best
    if not geometry.teachers or live is None:
        return None
    stored = live
    if any(teacher.depth for teacher in geometry.teachers.values()):
        all_stored = with_stored_features(geometry, geometry.teachers)
        stored = fastest_stored(config, machine, replace(result, geometry=all_stored)) or live
    return StoredPlan(
        images=steps * config.optim.global_batch,
        steps=steps,
        image_bytes=image_bytes(config, geometry),
        live_s=live.cost.seconds,
        student_s=stored.cost.seconds,
        teacher_s=live.cost.teacher_s - stored.cost.teacher_s,
        storage_gb_s=machine.storage_gb_s * machine.gpus / machine.gpus_per_node,
    )


def fastest_stored(config: RunConfig, machine: Machine, result: Plan) -> Candidate | None:
    """The fastest candidate whose features are stored; None where none fits."""
    return fastest(rows_of(config, machine, result.geometry, result.split))


def image_bytes(config: RunConfig, geometry: Geometry) -> float:
    """Bytes of an image's features in the dtype in which a run gets them, of all teachers."""
    total = 0.0
    for name, section in config.named_teachers().items():
        given = geometry.teachers[name].feature_bytes / geometry.micro_batch
        is_raw = section.standardize == "none"
        total += given if is_raw else given / DTYPES[section.dtype].itemsize * 4  # targets are in float32
    return total


def describe_stored(config: RunConfig, machine: Machine, result: Plan, *, steps: int) -> list[str]:
    """Lines of the plan: the size of stored features, the time to write and to read them, when they pay."""
    planned = plan_stored(config, machine, result, steps=steps)
    if planned is None:
        return []
    number, total = planned.image_bytes, planned.image_bytes * planned.images / 1e12
    epochs = f"{config.optim.epochs:g} epochs"
    key = ", ".join(teacher.key("placement") for teacher in config.named_teachers().values())
    size = (
        f"stored features ({key}=cache): {number:,.0f} bytes an image as they are, "
        f"{total:,.3g} TB for {epochs}; narrower by --dtype and --pca, fewer by --epochs"
    )
    read = (
        f"a rank needs {planned.read_gb_s(machine.gpus):.3g} GB/s of them; at {planned.storage_gb_s:g} GB/s "
        f"in all (--storage-gb-s) a step takes {planned.stored_s:.3g} s"
    )
    if all(teacher.placement == "cache" for teacher in config.named_teachers().values()):
        return [size, read]
    pays = f"pays from {planned.runs:,} runs on" if planned.runs else "no run gets faster"
    return [
        size,
        f"{read} instead of {planned.live_s:.3g}, writing {planned.write_s / 3600:.3g} hours: {pays}, at "
        f"{machine.efficiency:.0%} of the peak",
    ]
