"""What a run is recognized by when it is resumed: the values that every checkpoint stores, without torch."""

from __future__ import annotations

from pathlib import Path

from dmae_ds.config.family import members_of
from dmae_ds.config.networks import ModelConfig, looks_like_hub_id
from dmae_ds.config.objective_base import ObjectiveSection
from dmae_ds.config.run import RunConfig
from dmae_ds.data.order import ORDER_VERSION, num_in_share
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.unindexed import UnindexedShards
from dmae_ds.train.checkpoint.folder import TEACHER_WEIGHTS
from dmae_ds.weights.content import identify_opened

# Keys of the student section that may change when a run is resumed: initial weights are not read again, and
# blocks that run twice compute the same.
STUDENT_MAY_CHANGE = {"weights", "checkpoint_blocks"}
# Keys of the teacher section that may: they change neither features nor positions. Weights may be elsewhere,
# or in another format; what they are is compared, see `_weights_of`.
TEACHER_MAY_CHANGE = {"weights", "format", "stats", "license", "placement", "stages", "cache"}


def as_it_began(config: RunConfig, saved: dict) -> RunConfig:
    """Return the recipe with `teacher.dtype: auto` as the run that is resumed began.

    Its precision may have changed since, and runs from before December 2026 had fp32.
    saved: the checkpoint's state.json; {} for a new run
    """
    sections = {"": saved.get("teacher"), **(saved.get("teachers") or {})}
    began = {name: (sections.get(name) or {}).get("dtype") for name in config.named_teachers()}
    return config.with_teachers(
        {
            name: teacher.following(began[name]) if began[name] and teacher.dtype_is_auto else teacher
            for name, teacher in config.named_teachers().items()
        }
    )


def identity_of(
    config: RunConfig, shards: ShardSet | UnindexedShards, *, world_size: int, stage: int, micro_batch: int
) -> dict:
    """What is stored with every checkpoint to recognize the run: plain JSON values."""
    teachers = {
        name: _section(teacher, TEACHER_MAY_CHANGE) for name, teacher in config.named_teachers().items()
    }
    return {
        "world_size": world_size,
        "zero_stage": stage,
        "precision": config.precision,
        "seed": config.run.seed,
        "fingerprint": shards.fingerprint,
        "num_samples": num_in_share(shards.num_samples, config.data.share),
        "order": {"version": ORDER_VERSION, "block": config.data.block},
        "repeat": config.data.repeat,
        "global_batch": config.optim.global_batch,
        "micro_batch": micro_batch,
        "teacher": teachers.pop("", None),
        "teachers": teachers or None,
        TEACHER_WEIGHTS: _weights_of(config),
        **_of_students(config),
    }


def _weights_of(config: RunConfig) -> dict[str, list[int] | str]:
    """What tells the teachers' weights from others: of a file here [bytes, crc32], of the hub's the id.

    Weights that are not here, because stored features are read, are left out; timm's have the network's name.
    """
    weights = {}
    for teacher in config.named_teachers().values():
        if teacher.weights is None:
            continue
        key, path = f"{teacher.key('weights')} in format {teacher.format}", Path(teacher.weights).expanduser()
        if path.exists():
            weights[key] = identify_opened(path)
        elif looks_like_hub_id(teacher.weights):
            weights[key] = teacher.weights
    return weights


def _of_students(config: RunConfig) -> dict:
    """What identifies the students: of one run `student`, `objective`, `positions`; of several `students`."""
    members = {
        name: {
            "student": _section(member.student, STUDENT_MAY_CHANGE),
            "objective": _objective(member.objective),
            "positions": "trained" if member.objective.trains_positions else "fixed",
        }
        for name, member in members_of(config).items()
    }
    if config.students is None:
        return {**members[""], "students": None}
    of_all = {
        name: {**member["student"], **{key: member[key] for key in ("objective", "positions")}}
        for name, member in members.items()
    }
    return {"student": None, "objective": None, "positions": "fixed", "students": of_all}


def _section(network: ModelConfig, may_change: set[str]) -> dict:
    """A network's section without the keys that may change, and without in_chans of RGB: it is a new key."""
    newer = {"in_chans"} if network.in_chans in (None, 3) else set()
    return network.model_dump(mode="json", exclude=may_change | newer)


def _objective(section: ObjectiveSection) -> dict:
    """The objective's section without newer keys that have their defaults."""
    fields = type(section).model_fields
    newer = {key for key in section.newer_keys if getattr(section, key) == fields[key].default}
    return section.model_dump(mode="json", exclude=newer)
