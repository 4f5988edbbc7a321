"""Mistakes in `dmae-ds eval finetune` and `eval linear` that are found before torch is imported."""

from __future__ import annotations

from pathlib import Path

from dmae_ds.config.batch import split_batch
from dmae_ds.config.evaluation import FinetuneConfig, LinearConfig
from dmae_ds.config.networks import looks_like_hub_id
from dmae_ds.data.order import num_steps
from dmae_ds.errors import UserError
from dmae_ds.evaluate.subsets import draw_subset, open_labelled, warn_of_same_images
from dmae_ds.finetune.source import Source, find_source
from dmae_ds.train.learning_rate import check_rates
from dmae_ds.weights.early import check_file
from dmae_ds.weights.label import CLASSIFIER, WEIGHTS

SCHEMAS = {"finetune": FinetuneConfig, "linear": LinearConfig}


def check(command: str, word: str, *, resume: str, world_size: int, **given) -> None:
    """Raise UserError for what can be known without torch; the arguments are those of `run.evaluate`.

    Recipe, classes of train and val, labels, an existing result, widths of the weights, and the batch. The
    index of the shards is read, and no image.
    """
    source = find_source(word, schema=SCHEMAS[command], **given)
    config = source.config
    train, val = open_labelled(config.data)
    if resume == "never":
        check_is_new(Path(config.run.dir).expanduser())
    _check_weights(source)
    optim = config.optim
    micro_batch, _ = split_batch(optim.global_batch, optim.micro_batch, world_size, exact=True)
    check_micro_batch(config, micro_batch)
    num_images = len(draw_subset(train, config.labels, config.subset_seed or 0))
    steps = num_steps(optim.epochs, num_images, optim.global_batch)
    check_rates(optim, num_steps=steps, num_images=num_images)
    warn_of_same_images(train, val)


def check_is_new(out: Path) -> None:
    """Raise UserError for a folder that holds an evaluation."""
    if (out / "config.yaml").exists():
        raise UserError(
            f"'{out}' already holds an evaluation; continue it with --resume auto, or choose another run.dir"
        )


def check_micro_batch(config: FinetuneConfig | LinearConfig, micro_batch: int) -> None:
    """Raise UserError for a micro-batch that can't be mixed in pairs, or that batch norm can't take."""
    if isinstance(config, FinetuneConfig) and config.augment.mixes and micro_batch % 2:
        raise UserError(
            f"mixup and cutmix mix the images of a micro-batch in pairs, but its size {micro_batch} is odd; "
            "set optim.micro_batch to an even number, or augment.mixup=0 augment.cutmix=0"
        )
    normed = None
    if isinstance(config, LinearConfig):
        normed = "the linear probe's batch norm"
    elif config.distill is not None and config.distill.srrl is not None:
        normed = "the batch norm of distill.method srrl"
    if normed is not None and micro_batch < 2:
        raise UserError(
            f"{normed} requires at least 2 images in a micro-batch; raise optim.micro_batch, "
            f"or use fewer ranks"
        )


def _check_weights(source: Source) -> None:
    config = source.config
    if getattr(config, "init", "weights") == "weights":
        check_file(source.file, config.network, WEIGHTS)
    distill = getattr(config, "distill", None)
    if distill is None:
        return
    teacher = Path(distill.teacher).expanduser()
    if not teacher.exists() and not looks_like_hub_id(distill.teacher):
        raise UserError(f"distill.teacher '{teacher}' not found; give a weights file of a classifier")
    check_file(teacher, None, CLASSIFIER)
