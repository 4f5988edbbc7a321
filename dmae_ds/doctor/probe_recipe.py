"""What a recipe finds on this node: its shards, its teacher's file, room in its run folder, and what it will ask for."""

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
from dmae_ds.doctor.probe_later import token_folder

if TYPE_CHECKING:
    from dmae_ds.config.run import RunConfig


def recipe(request: dict) -> dict:
    """Facts by part; a recipe that cannot be read is the only one then."""
    read: list[RunConfig] = []

    def resolve() -> dict:
        from dmae_ds.config.load import dump_config, load_config

        read.append(load_config(request["recipe"], request["overrides"]))
        return {"digest": hashlib.sha256(dump_config(read[0]).encode()).hexdigest()[:12]}

    facts = {"recipe": guarded(resolve)}
    if not read:
        return facts
    config = read[0]
    facts["shards"] = guarded(lambda: shards(config, allow_pipe=request["allow_pipe"]))
    facts["teacher"] = guarded(lambda: teacher(config))
    facts["run_dir"] = guarded(lambda: run_dir(config, request))
    if "error" not in facts["shards"] and "error" not in facts["teacher"]:
        facts["start"] = guarded(lambda: start(config, request))
    if request["index"] == 0:
        facts["needs"] = guarded(lambda: needs(config, request["world"]))
    return facts


def shards(config: RunConfig, *, allow_pipe: bool) -> dict:
    """Opened as training opens them: manifest, index and size of every tar; no tar is read."""
    from dmae_ds.data.open import open_train
    from dmae_ds.data.shard_set import ShardSet
    from dmae_ds.data.storage import Access

    found = {"data.train": open_train(config.data, allow_pipe=allow_pipe)}
    if config.data.val is not None:
        found["data.val"] = ShardSet.open(config.data.val, label="data.val", access=Access.of(config.data))
    return {
        name: {
            "fingerprint": part.fingerprint[:12],
            "samples": part.num_samples,
            "shards": len(getattr(part, "shards", None) or part.tars),
        }
        for name, part in found.items()
    }


def teacher(config: RunConfig) -> dict:
    """Bytes of the weights, by stat; {} where there is no file to look at (none, or timm's and the hub's own)."""
    from dmae_ds.config.run import looks_like_hub_id
    from dmae_ds.errors import UserError

    if config.teacher is None or config.teacher.weights is None:
        return {}
    path = Path(config.teacher.weights).expanduser()
    if not path.exists():
        if looks_like_hub_id(config.teacher.weights):
            return {}
        raise UserError(f"teacher.weights '{path}' is not there; copy it, or put it where every node sees it")
    files = (
        [path]
        if path.is_file()
        else [
            file
            for file in sorted(path.iterdir())
            if file.suffix in (".safetensors", ".pth", ".bin", ".json")
        ]
    )
    return {"path": str(path), "bytes": sum(file.stat().st_size for file in files)}


def run_dir(config: RunConfig, request: dict) -> dict:
    """Room where checkpoints will be, and a token there that the other nodes look for."""
    folder = Path(config.run.dir).expanduser().absolute()
    made = []
    for part in (folder, *folder.parents):
        if part.exists():
            break
        made.append(str(part))
    facts = {"path": str(folder), "made": made, "held": held_by(folder) if request["index"] == 0 else None}
    try:
        mine = token_folder({**request, "run_dir": folder}) / str(request["index"])
        mine.parent.mkdir(parents=True, exist_ok=True)
        mine.write_bytes(os.urandom(4096))
    except OSError as error:
        facts["cannot_write"] = "disk full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
    existing = next(part for part in (folder, *folder.parents) if part.exists())
    return facts | {"free": shutil.disk_usage(existing).free}


def held_by(folder: Path) -> str | None:
    """Who trains into a run folder right now: the holder of its lock (train/run_lock.py); None if nobody does."""
    try:
        with open(folder / "lock", "r+", encoding="utf-8") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return None
            except OSError:
                said = json.loads(file.read())
                return f"process {said['pid']} on {said['host']}, since {said['since']}"
    except (OSError, ValueError, KeyError):
        return None


def start(config: RunConfig, request: dict) -> dict:
    """All that `dmae-ds train` itself would refuse before it builds a model: batch, DeepSpeed file, checkpoints."""
    from dmae_ds.distributed.world import World
    from dmae_ds.train.preflight import prepare

    world = World(rank=0, size=request["world"], local_rank=0, local_size=request["slots"])
    plan = prepare(config, world, resume="auto", allow_pipe=request["allow_pipe"])
    resumes = None if plan.resume_from is None else plan.resume_from.name
    return {
        "micro_batch": plan.micro_batch,
        "accumulation": plan.accumulation,
        "steps": plan.num_steps,
        "resumes": resumes,
    }


def needs(config: RunConfig, world: int) -> dict:
    """Bytes of one save, of a gradient all-reduce, and of a rank's batches under way in shared memory."""
    from dmae_ds.objectives.build import build_objective

    objective, _ = build_objective(config, device="meta")
    parameters = sum(parameter.numel() for parameter in objective.parameters())
    student = objective.student
    side, workers = student.grid[0] * student.patch_size, config.data.num_workers
    micro_batch = config.optim.micro_batch or max(1, config.optim.global_batch // world)
    # Every worker has two batches under way (torch's prefetch_factor), uint8, and a float of noise for every patch.
    batches = 2 * workers * micro_batch * (3 * side**2 + 4 * student.num_patches)
    # A save: weights, fp32 masters, Adam's two moments, and once more the weights as student and decoder.
    return {
        "save": 20 * parameters,
        "keep": config.checkpoint.keep,
        "gradients": 4 * parameters,
        "batches": batches,
    }
