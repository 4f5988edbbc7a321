"""Train a segmenter on label maps, measure its mIoU, and write its files.

dmae-ds eval segment RUN --recipe upernet_ade20k data.train=SHARDS data.val=SHARDS
torchrun --nproc_per_node 8 -m dmae_ds eval segment RUN --recipe upernet_ade20k ... precision=bf16

OUT = RUN/<recipe>, or run.dir; its files are those of loop.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dmae_ds.config.segmentation import SegmentConfig
from dmae_ds.data.dense import DenseSample
from dmae_ds.data.dense_transforms import SegmentationView
from dmae_ds.dense.backbone import open_backbone
from dmae_ds.dense.early import check_same_classes, check_segment
from dmae_ds.dense.loop import Training, train_dense
from dmae_ds.dense.predict import Predictor
from dmae_ds.dense.segment_task import LogitTeacher, SegmentTask
from dmae_ds.dense.segmenter import Segmenter
from dmae_ds.dense.segmenter_file import SegmenterFacts, load_segmenter, save_segmenter
from dmae_ds.dense.start import Start, open_start
from dmae_ds.distributed.world import world_from_env
from dmae_ds.evaluate.results import headline
from dmae_ds.finetune.optim import build_adamw
from dmae_ds.finetune.source import find_source
from dmae_ds.models.patches import Normalize

METRIC = "segment"


def evaluate(word: str, *, recipe: str, overrides: list[str], resume: str = "never") -> dict:
    """Train a segmenter and add its scores to results.jsonl. Collective.

    word: a run folder or a weights file; resume: `auto` continues a killed run, `never` refuses a folder that
    holds one
    Returns the line of results.jsonl, with the last scores.
    Raises UserError, and RunFailed for a loss that is not finite.
    """
    source = find_source(word, schema=SegmentConfig, recipe=recipe, overrides=overrides)
    check_segment(source, world_size=world_from_env().size, resume=resume)
    start = open_start(source)
    training, step = build_training(start)
    progress = train_dense(training, resume=resume)
    config: SegmentConfig = source.config
    result = start.add_result(
        progress,
        metric=METRIC,
        settings={
            "head": config.head.name,
            "frozen": config.frozen,
            "img_size": training.task.predict.window,
            "distill": config.distill is not None,
        },
        step=step,
    )
    if start.accelerator.is_main_process:
        best = max(row["miou"] for row in progress.epochs if "miou" in row)
        images = f"{result['num_train']} train, {result['num_val']} val"
        text = f"segment mIoU {headline(result):.1f}% ({source.recipe}, last of {start.total:,} steps; best"
        print(f"{text} {best:.1f}%), {images}: {config.run.dir}", flush=True)
    start.accelerator.wait_for_everyone()
    start.accelerator.end_training()
    return result


def build_training(start: Start) -> tuple[Training, int]:
    """Build segmenter, task, optimizer and batches. Returns the training, and the step of the weights."""
    config: SegmentConfig = start.config
    device, classes = start.accelerator.device, start.train_set.map_classes
    vit, step, note = open_backbone(start.source)
    img_size = vit.patch_embed.img_size[0]
    segmenter = Segmenter(
        vit, config.head, num_classes=len(classes), seed=config.run.seed, frozen=config.frozen
    ).to(device)
    predict = Predictor.of(config, img_size)
    task = SegmentTask(
        segmenter,
        Normalize(config.data.mean, config.data.std).to(device),
        auxiliary_weight=getattr(config.head, "auxiliary_weight", 0.0),
        teacher=_load_teacher(config, classes),
        predict=predict,
        no_class=start.train_set.ignore_index,
        val_images=start.val_images,
        processes=start.accelerator,
    ).to(device)
    facts = SegmenterFacts(
        network=config.network.model_copy(update={"img_size": img_size}),
        head=config.head,
        classes=classes,
        mean=config.data.mean,
        std=config.data.std,
        short_side=predict.short_side,
        window=predict.window,
        stride=predict.stride,
    )

    def save(path: Path, metadata: dict) -> None:
        save_segmenter(path, segmenter, facts, **metadata)

    training = Training(
        config=config,
        task=task,
        optimizer=build_adamw(vit, task, config.optim, lr=config.optim.lr),
        batches=start.batches(MapView(_view(config, img_size, no_class=start.train_set.ignore_index))),
        accelerator=start.accelerator,
        metric=METRIC,
        # Batch norms see the images of all ranks: with accumulation, ranks are part of the result.
        identity=start.identity(METRIC)
        | {"images at once on all ranks": start.micro_batch * start.accelerator.num_processes},
        save=save,
        summary=start.describe(
            task, kind=config.head.name, pixels=f"{img_size} px", num_classes=len(classes), note=note
        ),
    )
    return training, step


@dataclass(frozen=True)
class MapView:
    """What training sees of an image and its map; boxes and masks are left out."""

    view: SegmentationView

    def __call__(self, sample: DenseSample, epoch: int) -> DenseSample:
        """Draw the view of a sample in an epoch."""
        return self.view(DenseSample(sample.key, sample.image, sample.label_map), epoch=epoch)


def _view(config: SegmentConfig, img_size: int, *, no_class: int) -> SegmentationView:
    """Scale jitter, crops of img_size px, flip and colours as the recipe says."""
    augment = config.augment
    return SegmentationView(
        size=img_size,
        short_side=config.short_side,
        scale=augment.scale,
        max_class_share=augment.max_class_share,
        flip=augment.flip,
        photometric=augment.photometric,
        seed=config.run.seed,
        ignore_index=no_class,
        fill=tuple(round(255 * value) for value in config.data.mean),
    )


def _load_teacher(config: SegmentConfig, classes: list[str]) -> LogitTeacher | None:
    """The larger segmenter of a distillation, frozen. Raises UserError where its classes are others."""
    if config.distill is None:
        return None
    path = Path(config.distill.teacher).expanduser()
    segmenter, facts = load_segmenter(path, label="distill.teacher")
    check_same_classes(facts.classes, classes, path)
    normalize = Normalize(facts.mean, facts.std)
    return LogitTeacher(
        segmenter, normalize, weight=config.distill.weight, temperature=config.distill.temperature
    )
