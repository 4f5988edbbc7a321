"""Everything that can be wrong with a run and be known without building a model: found here, in a second, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dmae_ds.config.batch import split_recipe
from dmae_ds.config.deepspeed import check_compile, load_deepspeed, zero_stage
from dmae_ds.config.run import RunConfig, looks_like_hub_id
from dmae_ds.data.open import open_train
from dmae_ds.data.order import ORDER_VERSION, num_steps
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.storage import Access
from dmae_ds.data.unindexed import UnindexedShards
from dmae_ds.distributed.world import World
from dmae_ds.errors import UserError
from dmae_ds.evaluate.subsets import draw_subset, open_labelled, read_labels
from dmae_ds.train.checkpoint.folder import CheckpointFolder


@dataclass(frozen=True)
class Preflight:
    """A run that can start: the recipe, what it reads, and how its batch is cut."""

    config: RunConfig
    world: World
    shards: ShardSet | UnindexedShards
    deepspeed: dict
    micro_batch: int
    accumulation: int
    num_steps: int
    folder: CheckpointFolder
    identity: dict
    resume_from: Path | None

    @property
    def run_dir(self) -> Path:
        return self.folder.run_dir

    @property
    def num_classes(self) -> int | None:
        """Of the training pictures, where the objective needs labels."""
        return len(self.shards.classes) if self.config.objective.needs_labels else None


def prepare(config: RunConfig, world: World, *, resume: str, allow_pipe: bool = False) -> Preflight:
    """Check a recipe against this world and this machine.

    allow_pipe: whether data.train may be a command
    resume: `auto` continues from the newest checkpoint if there is one, `never` refuses a folder that holds a run
    Raises UserError.
    """
    folder = CheckpointFolder(Path(config.run.dir).expanduser())
    resume_from = folder.latest() if resume == "auto" else None
    fitted = None if resume_from is None else folder.read_state(resume_from).get("micro_batch")
    micro_batch, accumulation = split_recipe(config, world.size, fitted=fitted)
    deepspeed = load_deepspeed(
        config.deepspeed,
        micro_batch=micro_batch,
        accumulation=accumulation,
        world_size=world.size,
        clip_grad=config.optim.clip_grad,
        precision=config.precision,
    )
    check_compile(config.compile, config.deepspeed, deepspeed)
    config.check_teacher()
    shards = open_train(config.data, allow_pipe=allow_pipe)
    if config.objective.needs_labels:
        check_labelled(config, shards)
    if config.data.val is not None:
        ShardSet.open(config.data.val, label="data.val", access=Access.of(config.data))
    if config.eval.knn_every is not None:
        check_knn(config)
    if config.teacher is not None and config.teacher.weights is not None:
        weights = config.teacher.weights
        if not Path(weights).expanduser().exists() and not looks_like_hub_id(weights):
            raise UserError(
                f"teacher.weights '{weights}' is not a file; give the path of a .safetensors or .pth file, of a folder, or a hub id such as facebook/vit-mae-large"
            )
    if (
        config.teacher is not None
        and config.teacher.stages is not None
        and world.size % config.teacher.stages
    ):
        fitting = ", ".join(str(number) for number in range(1, world.size + 1) if world.size % number == 0)
        raise UserError(
            f"teacher.stages {config.teacher.stages} does not divide the {world.size} ranks into groups; take one of {fitting}"
        )
    identity = {
        "world_size": world.size,
        "zero_stage": zero_stage(deepspeed),
        "precision": config.precision,
        "seed": config.run.seed,
        "fingerprint": shards.fingerprint,
        "num_samples": shards.num_samples,
        "order": {"version": ORDER_VERSION, "block": config.data.block},
        "repeat": config.data.repeat,
        "global_batch": config.optim.global_batch,
        "micro_batch": micro_batch,
        "teacher": None
        if config.teacher is None
        else config.teacher.model_dump(
            mode="json", exclude={"weights", "format", "stats", "license", "placement", "stages"}
        ),
        "student": config.student.model_dump(mode="json", exclude={"weights"}),
        "objective": config.objective.model_dump(mode="json"),
    }
    if resume_from is not None:
        folder.check_same_run(resume_from, identity)
    if resume == "never" and (folder.run_dir / "config.yaml").exists():
        raise UserError(
            f"run.dir '{folder.run_dir}' holds a run already; continue it with --resume auto, or choose another run.dir"
        )
    steps = num_steps(config.optim.epochs, shards.num_samples, config.optim.global_batch)
    return Preflight(
        config, world, shards, deepspeed, micro_batch, accumulation, steps, folder, identity, resume_from
    )


def check_labelled(config: RunConfig, shards: ShardSet | UnindexedShards) -> None:
    """Raise UserError where training pictures have no labels to learn from; a pass over the index, no picture is read."""
    name = config.objective.name
    if isinstance(shards, UnindexedShards):
        raise UserError(
            f"objective {name} needs labels, and data.num_samples streams tars whose labels nobody counted; make an index with `dmae-shards index`, and leave it out"
        )
    if len(shards.classes) < 2:
        raise UserError(
            f"objective {name} needs labels, and data.train '{shards.folder}' has {len(shards.classes)} classes; make the shards from one folder a class"
        )
    if config.data.val is not None:
        open_labelled(config.data)  # the same classes on both sides
    unlabelled = int((read_labels(shards) < 0).sum())
    if unlabelled:
        raise UserError(
            f"objective {name} needs labels, and {unlabelled:,} of {shards.num_samples:,} samples of data.train '{shards.folder}' have none; leave them out of the shards"
        )


def check_knn(config: RunConfig) -> None:
    """Raise UserError where k-NN during training will find no labelled pictures, or too few."""
    try:
        train, _ = open_labelled(config.data)
        num = len(draw_subset(train, config.eval.knn_labels, 0))
    except UserError as error:
        raise UserError(f"eval.knn_every {config.eval.knn_every:g}: {error}") from None
    if num < config.eval.knn_k:
        raise UserError(
            f"eval.knn_k {config.eval.knn_k} is larger than the {num} labelled training pictures of eval.knn_labels {config.eval.knn_labels}; choose a smaller one"
        )
