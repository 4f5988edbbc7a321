"""Checks before a run, in a second and without torch: whatever can be known without building a network."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from dmae_ds.config.batch import BatchSplit, split_recipe
from dmae_ds.config.deepspeed import check_compile, zero_stage
from dmae_ds.config.family import members_of, objectives_of
from dmae_ds.config.load import family_of
from dmae_ds.config.networks import StudentConfig, TeacherConfig, looks_like_hub_id
from dmae_ds.config.run import RunConfig
from dmae_ds.data.open import open_train
from dmae_ds.data.order import num_in_share, num_steps
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.storage import Access
from dmae_ds.data.unindexed import UnindexedShards
from dmae_ds.distributed.world import World
from dmae_ds.errors import UserError
from dmae_ds.evaluate.dense_sets import open_dense_sets
from dmae_ds.evaluate.subsets import draw_subset, open_labelled, read_labels
from dmae_ds.teacher.early import check_stored
from dmae_ds.train import run_identity
from dmae_ds.train.checkpoint.folder import CheckpointFolder
from dmae_ds.train.checkpoint.run_lock import check_can_be_made
from dmae_ds.train.checkpoint.student_file import STUDENT, StudentFiles
from dmae_ds.train.cut import CutRecipe, deepspeed_of
from dmae_ds.train.learning_rate import check_rates
from dmae_ds.train.trackers import check_trackers
from dmae_ds.weights.early import check_file
from dmae_ds.weights.label import STUDENT as STUDENT_WEIGHTS
from dmae_ds.weights.label import Label, of_student, of_teacher


@dataclass(frozen=True)
class Preflight(CutRecipe):
    """A run that can start: the recipe, its data, and how its batch is divided.

    identity: what a checkpoint must agree with (`folder.MUST_AGREE`), with world_size, zero_stage and
        micro_batch
    resume: `auto` or `never`, as `prepare` was told
    resume_from: the checkpoint to continue from; None for a new run
    replay: steps of a cache of features that has fewer than the run, so that they come again; None elsewhere
    """

    shards: ShardSet | UnindexedShards
    num_steps: int
    folder: CheckpointFolder
    identity: dict
    resume: str
    resume_from: Path | None
    replay: int | None = None

    @property
    def members(self) -> dict[str, RunConfig]:
        """The recipe of each student alone by name; {"": the recipe} of a run with one."""
        return members_of(self.config)

    @property
    def is_resumed(self) -> bool:
        """Whether the run continues from a checkpoint."""
        return self.resume_from is not None

    def with_split(self, split: BatchSplit) -> Preflight:
        """Cut the batch in another way; the recipe and the next checkpoint's identity record it."""
        return replace(
            super().with_split(split), identity={**self.identity, "micro_batch": split.micro_batch}
        )

    @property
    def num_images(self) -> int:
        """Number of images in an epoch."""
        return num_in_share(self.shards.num_samples, self.config.data.share)

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return self.folder.run_dir

    @property
    def is_finished(self) -> bool:
        """Whether the run that is resumed has made its last step, and its exported files are of that step."""
        if self.resume_from is None or self.folder.read_state(self.resume_from)["step"] < self.num_steps:
            return False
        return StudentFiles(self.run_dir, {name: {} for name in self.members}).are_of(self.num_steps)

    @property
    def num_classes(self) -> int | None:
        """Number of classes of the training images, where an objective needs labels."""
        needs_labels = any(objective.needs_labels for objective in objectives_of(self.config))
        return len(self.shards.classes) if needs_labels else None


def prepare(config: RunConfig, world: World, *, resume: str, allow_pipe: bool = False) -> Preflight:
    """Check a recipe against this world and this machine.

    allow_pipe: whether data.train may be a command
    resume: `auto` continues from the newest checkpoint if there is one, `never` refuses a folder that holds
        a run
    Raises UserError.
    """
    folder = CheckpointFolder(Path(config.run.dir).expanduser())
    check_can_be_made(folder.run_dir)
    check_is_no_member(folder.run_dir)
    resume_from = folder.latest() if resume == "auto" else None
    saved = {} if resume_from is None else folder.read_state(resume_from)
    config = run_identity.as_it_began(config, saved)
    split = split_recipe(config, world.size, fitted=saved.get("micro_batch"))
    deepspeed = deepspeed_of(config, split, world)
    check_compile(config.compile, config.deepspeed, deepspeed)
    config.check_teacher()
    check_trackers(config.log)
    shards = open_train(config.data, allow_pipe=allow_pipe)
    members = members_of(config)
    for member in members.values():
        if member.objective.needs_labels:
            check_labelled(member, shards)
    if config.data.val is not None:
        ShardSet.open(config.data.val, label="data.val", access=Access.of(config.data))
    if config.eval.knn_every is not None:
        check_knn(config)
    if config.eval.dense_every is not None:
        open_dense_sets(config.eval, config.data)
    for name, member in members.items():
        if member.student.weights is not None:
            check_student_file(member.student, of_student(name))
    if config.eval.loss_every is not None and config.data.val is None:
        raise UserError("eval.loss_every requires data.val; give data.val=SHARDS, or remove eval.loss_every")
    for teacher in config.named_teachers().values():
        if teacher.placement != "cache":
            check_teacher_file(teacher)
        check_stages(teacher.stages, world.size, key=teacher.key("stages"))
    must_agree = run_identity.identity_of(
        config, shards, world_size=world.size, stage=zero_stage(deepspeed), micro_batch=split.micro_batch
    )
    if resume_from is not None:
        folder.check_same_run(resume_from, must_agree)
    num_images = num_in_share(shards.num_samples, config.data.share)
    steps = num_steps(config.optim.epochs, num_images, config.optim.global_batch)
    check_rates(config.optim, num_steps=steps, num_images=num_images)
    replay = check_stored(config, shards, num_steps=steps)
    if resume_from is None:
        check_members_are_new(folder.run_dir, members)
    check_may_begin(folder, resume)
    return Preflight(
        config=config,
        world=world,
        shards=shards,
        deepspeed=deepspeed,
        micro_batch=split.micro_batch,
        accumulation=split.accumulation,
        num_steps=steps,
        folder=folder,
        identity=must_agree,
        resume=resume,
        resume_from=resume_from,
        replay=replay,
    )


def describe_finished(preflight: Preflight) -> str:
    """Say that there is nothing to do in a finished run, where its student is, and how to go on."""
    return (
        f"'{preflight.run_dir}' is finished: step {preflight.num_steps:,} of {preflight.num_steps:,}; "
        f"nothing was done. Its student is {preflight.run_dir / STUDENT}; to train longer raise "
        "optim.epochs, to train again choose another run.dir"
    )


def check_may_begin(folder: CheckpointFolder, resume: str) -> None:
    """Raise UserError where a folder holds a run that this start would write over.

    resume: `never` refuses every run but one that ended before its first checkpoint, and has no result;
        `auto` continues a run, and refuses one whose newest checkpoint is not named
    """
    run_dir, checkpoints = folder.run_dir, folder.all()
    folders = (run_dir, *(path.parent for path in run_dir.glob("*/config.yaml")))  # those of a family
    if not (run_dir / "config.yaml").exists() or (resume == "auto" and folder.latest() is not None):
        return
    if resume == "never" and any(map(_holds_a_run, folders)):
        way_out = "continue it with --resume auto, or choose another run.dir"
        raise UserError(f"run.dir '{run_dir}' holds a run already; {way_out}")
    # One checkpoint and no student is what a kill in the first save leaves, shortly before its end.
    was_saved = len(checkpoints) > 1 or any((path / STUDENT).exists() for path in folders)
    if resume == "auto" and was_saved:
        pointer, way_out = folder.path / "latest", "choose another run.dir"
        if checkpoints:
            way_out = f"continue with `echo {checkpoints[-1].name} > {pointer}`, or {way_out}"
        raise UserError(f"run.dir '{run_dir}' holds a run, and '{pointer}' is missing; {way_out}")


def check_is_no_member(run_dir: Path) -> None:
    """Raise UserError where a folder is that of a student of a family, which is trained with the others."""
    if (family := family_of(run_dir)) is not None:
        raise UserError(
            f"run.dir '{run_dir}' is the folder of one student of the family '{family}', which is "
            f"trained as a whole; continue with {family / 'config.yaml'}, or choose another run.dir"
        )


def check_members_are_new(run_dir: Path, names: Iterable[str]) -> None:
    """Raise UserError where a new family's student would get the folder of another run."""
    for folder in (run_dir / name for name in names if name):
        if family_of(folder) is None and _holds_a_run(folder):
            raise UserError(
                f"run.dir '{run_dir}' holds the run '{folder}', whose folder students.{folder.name} of this "
                "family would get; choose another run.dir, or another name for this student"
            )


def _holds_a_run(folder: Path) -> bool:
    has_result = any((folder / name).exists() for name in (STUDENT, "results.jsonl"))
    return has_result or bool(CheckpointFolder(folder).all())


def check_teacher_file(teacher: TeacherConfig) -> None:
    """Raise UserError where the teacher's weights are neither a path that exists nor a name on the hub."""
    weights = teacher.weights
    if weights is not None and Path(weights).expanduser().exists():
        check_file(Path(weights).expanduser(), teacher, of_teacher(teacher.section))
    if weights is None or Path(weights).expanduser().exists() or looks_like_hub_id(weights):
        return
    raise UserError(
        f"{teacher.key('weights')} '{weights}' is not a file; give the path of a .safetensors or .pth file, "
        "of a folder, or a hub id such as facebook/vit-mae-large"
    )


def check_student_file(student: StudentConfig, label: Label = STUDENT_WEIGHTS) -> None:
    """Raise UserError where the student's initial weights are not here, or are those of another network."""
    path = Path(student.weights).expanduser()
    if not path.exists() and not looks_like_hub_id(student.weights):
        raise UserError(f"{label.weights} '{path}' not found; give a run folder, a weights file, or a hub id")
    check_file(path, student, label)


def check_stages(stages: int | None, world_size: int, *, key: str = "teacher.stages") -> None:
    """Raise UserError where the ranks cannot be divided into groups of `stages`."""
    if stages is None or world_size % stages == 0:
        return
    divisors = ", ".join(str(number) for number in range(1, world_size + 1) if world_size % number == 0)
    raise UserError(
        f"{key} {stages} does not divide the {world_size} ranks into groups; choose one of {divisors}"
    )


def check_labelled(config: RunConfig, shards: ShardSet | UnindexedShards) -> None:
    """Raise UserError where training images have no labels; reads the index, and no image."""
    name = config.objective.name
    if isinstance(shards, UnindexedShards):
        raise UserError(
            f"objective {name} needs labels, and unindexed tars (data.num_samples) have none that are known; "
            "make an index with `dmae-shards index`, and remove data.num_samples"
        )
    if len(shards.classes) < 2:
        raise UserError(
            f"objective {name} needs labels, and data.train '{shards.folder}' has "
            f"{len(shards.classes)} classes; make the shards from one folder for each class"
        )
    if config.data.val is not None:
        open_labelled(config.data)  # checks that both have the same classes
    unlabelled = int((read_labels(shards) < 0).sum())
    if unlabelled:
        raise UserError(
            f"objective {name} needs labels, and {unlabelled:,} of {shards.num_samples:,} samples "
            f"of data.train '{shards.folder}' have none; leave them out of the shards"
        )


def check_knn(config: RunConfig) -> None:
    """Raise UserError where k-NN during training would find no labelled images, or too few."""
    settings = config.eval
    try:
        train, _ = open_labelled(config.data)
        num_labelled = len(draw_subset(train, settings.knn_labels, 0))
    except UserError as error:
        raise UserError(f"eval.knn_every {settings.knn_every:g}: {error}") from None
    if num_labelled < settings.knn_k:
        raise UserError(
            f"eval.knn_k {settings.knn_k} is larger than the {num_labelled} labelled training images of "
            f"eval.knn_labels {settings.knn_labels}; choose a smaller one"
        )
