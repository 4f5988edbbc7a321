"""The facts of a recipe on one node: shards, the teacher's file, the run folder, and what it needs."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from dmae_ds.doctor.answer import guarded
from dmae_ds.doctor.later_rounds import token_folder

if TYPE_CHECKING:
    from dmae_ds.config.run import RunConfig

WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".bin", ".json")


def inspect_recipe(request: dict) -> dict:
    """Facts by part; only "recipe" if the recipe cannot be read."""
    read: list[RunConfig] = []

    def read_recipe() -> dict:
        from dmae_ds.config.load import dump_config, load_config

        read.append(load_config(request["recipe"], request["overrides"]))
        return {"digest": hashlib.sha256(dump_config(read[0]).encode()).hexdigest()[:12]}

    facts = {"recipe": guarded(read_recipe)}
    if not read:
        return facts
    config = read[0]
    facts["shards"] = guarded(lambda: inspect_shards(config, allow_pipe=request["allow_pipe"]))
    facts["teacher"] = guarded(lambda: inspect_teacher(config))
    facts["trackers"] = guarded(lambda: inspect_trackers(config))
    facts["run_dir"] = guarded(lambda: inspect_run_folder(config, request))
    if not any("error" in facts[part] for part in ("shards", "teacher", "trackers")):
        facts["start"] = guarded(lambda: prepare_start(config, request))
    if request["index"] == 0:
        facts["needs"] = guarded(lambda: estimate_needs(config, request["world"]))
    return facts


def inspect_shards(config: RunConfig, *, allow_pipe: bool) -> dict:
    """Open the shards as training does: manifest, index and size of every tar; reads no tar."""
    from dmae_ds.data.open import open_train
    from dmae_ds.data.shard_set import ShardSet
    from dmae_ds.data.storage import Access

    data_sets = {"data.train": open_train(config.data, allow_pipe=allow_pipe)}
    if config.data.val is not None:
        access = Access.of(config.data)
        data_sets["data.val"] = ShardSet.open(config.data.val, label="data.val", access=access)
    return {
        name: {
            "fingerprint": data.fingerprint[:12],
            "samples": data.num_samples,
            "shards": len(getattr(data, "shards", None) or data.tars),
        }
        for name, data in data_sets.items()
    }


def inspect_teacher(config: RunConfig) -> dict:
    """Paths and sizes of the teachers' weights, or stored features, by section; without the hub's."""
    from dmae_ds.config.networks import looks_like_hub_id
    from dmae_ds.data.storage import Access
    from dmae_ds.errors import UserError
    from dmae_ds.teacher.early import open_manifest

    facts = {}
    for teacher in config.named_teachers().values():
        if teacher.cache is not None:
            manifest = open_manifest(teacher.cache, access=Access.of(config.data))
            facts[teacher.section] = {"path": teacher.cache, "bytes": manifest.layout.total_bytes()}
            continue
        if teacher.weights is None:
            continue
        path = Path(teacher.weights).expanduser()
        if not path.exists():
            if looks_like_hub_id(teacher.weights):
                continue
            raise UserError(
                f"{teacher.key('weights')} '{path}' not found; copy it, or put it where every node sees it"
            )
        files = [path]
        if path.is_dir():
            files = [file for file in sorted(path.iterdir()) if file.suffix in WEIGHTS_SUFFIXES]
        facts[teacher.section] = {"path": str(path), "bytes": sum(file.stat().st_size for file in files)}
    return facts


def inspect_trackers(config: RunConfig) -> dict:
    """Names of the trackers, and for W&B its project and whether it needs a login."""
    from dmae_ds.train.trackers import check_trackers, is_logged_in, project_of

    check_trackers(config.log)
    facts = {"names": list(config.log.trackers)}
    if "wandb" in config.log.trackers:
        facts |= {"project": project_of(config.log), "logged_in": is_logged_in()}
    return facts


def inspect_run_folder(config: RunConfig, request: dict) -> dict:
    """Free bytes where checkpoints will be; leaves a token there that the other nodes look for."""
    folder = Path(config.run.dir).expanduser().absolute()
    made = []
    for parent in (folder, *folder.parents):
        if parent.exists():
            break
        made.append(str(parent))
    facts = {
        "path": str(folder),
        "made": made,
        "held": find_holder(folder) if request["index"] == 0 else None,
    }
    try:
        token = token_folder({**request, "run_dir": folder}) / str(request["index"])
        token.parent.mkdir(parents=True, exist_ok=True)
        token.write_bytes(os.urandom(4096))
    except OSError as error:
        facts["cannot_write"] = "disk full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return facts | {"free": shutil.disk_usage(existing).free}


def find_holder(folder: Path) -> str | None:
    """The process that trains into a run folder now, or None, by its lock (train/checkpoint/run_lock.py)."""
    try:
        with open(folder / "lock", "r+", encoding="utf-8") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return None
            except OSError:
                holder = json.loads(file.read())
                return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError):
        return None


def prepare_start(config: RunConfig, request: dict) -> dict:
    """Prepare as `dmae-ds train` does before it builds a model: batch, DeepSpeed file, checkpoints."""
    from dmae_ds.distributed.world import World
    from dmae_ds.train.preflight import prepare

    world = World(rank=0, size=request["world"], local_rank=0, local_size=request["slots"])
    preflight = prepare(config, world, resume="auto", allow_pipe=request["allow_pipe"])
    return {
        "micro_batch": preflight.micro_batch,
        "accumulation": preflight.accumulation,
        "steps": preflight.num_steps,
        "resumes": None if preflight.resume_from is None else preflight.resume_from.name,
    }


def estimate_needs(config: RunConfig, world: int) -> dict:
    """Bytes of one checkpoint, of a gradient all-reduce and of a rank's prefetched batches; its workers."""
    from dmae_ds.objectives.build import build_objective

    objective, _ = build_objective(config, device="meta")
    num_parameters = sum(parameter.numel() for parameter in objective.parameters())
    student = objective.student
    side = student.grid[0] * student.patch_size
    micro_batch = config.optim.micro_batch or max(1, config.optim.global_batch // world)
    # A sample is an image, of 1 or 4 bytes a value, and one float of noise a patch; every worker prefetches
    # two batches.
    bytes_per_value = 1 if config.data.bits == 8 else 4
    bytes_per_sample = student.channels * bytes_per_value * side**2 + 4 * student.num_patches
    return {
        # Weights, fp32 masters, Adam's two moments, and the weights again as student and decoder.
        "save": 20 * num_parameters,
        "keep": config.checkpoint.keep,
        "gradients": 4 * num_parameters,
        "workers": config.data.num_workers,
        "batches": 2 * config.data.num_workers * micro_batch * bytes_per_sample,
    }
