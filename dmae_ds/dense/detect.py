"""Train a detector on boxes and masks, measure its AP, and write its files.

dmae-ds eval detect RUN --recipe vitdet_coco data.train=SHARDS data.val=SHARDS
torchrun --nproc_per_node 8 -m dmae_ds eval detect RUN --recipe vitdet_coco ... precision=bf16

OUT = RUN/<recipe>, or run.dir; its files are those of loop.py
"""

from __future__ import annotations

from pathlib import Path

from dmae_ds.config.detection import DetectConfig
from dmae_ds.data.dense_transforms import LargeScaleJitter, ShortestEdge
from dmae_ds.dense.backbone import open_backbone
from dmae_ds.dense.detect_task import DetectTask
from dmae_ds.dense.detector import Detector
from dmae_ds.dense.detector_file import DetectorFacts, load_detector, put_together, save_detector
from dmae_ds.dense.early import check_detect
from dmae_ds.dense.loop import Training, train_dense
from dmae_ds.dense.start import Start, open_start
from dmae_ds.errors import UserError
from dmae_ds.evaluate.results import headline
from dmae_ds.finetune.optim import build_adamw
from dmae_ds.finetune.source import find_source

METRIC = "detect"


def evaluate(word: str, *, recipe: str, overrides: list[str], resume: str = "never") -> dict:
    """Train a detector and add its scores to results.jsonl. Collective.

    word: a run folder or a weights file; resume: `auto` continues a killed run, `never` refuses a folder that
    holds one
    Returns the line of results.jsonl, with the last scores.
    Raises UserError, and RunFailed for a loss that is not finite.
    """
    source = find_source(word, schema=DetectConfig, recipe=recipe, overrides=overrides)
    start = open_start(source, boxes=True)
    check_detect(source, world_size=start.accelerator.num_processes, resume=resume)
    training, step = build_training(start)
    progress = train_dense(training, resume=resume)
    config: DetectConfig = source.config
    result = start.add_result(
        progress,
        metric=METRIC,
        settings={
            "pyramid": config.detector.pyramid,
            "window": config.detector.window,
            "heads": config.detector.heads,
            "img_size": training.task.detector.transform.max_size,
            "distill": config.distill is not None,
        },
        step=step,
    )
    if start.accelerator.is_main_process:
        best = max(row["box_ap"] for row in progress.epochs if "box_ap" in row)
        images = f"{result['num_train']} train, {result['num_val']} val"
        scores = f"box AP {headline(result):.1f}, mask AP {result['scores']['mask_ap']:.1f}"
        text = f"detect {scores} ({source.recipe}, last of {start.total:,} steps; best box AP {best:.1f})"
        print(f"{text}, {images}: {config.run.dir}", flush=True)
    start.accelerator.wait_for_everyone()
    start.accelerator.end_training()
    return result


def build_training(start: Start) -> tuple[Training, int]:
    """Build detector, task, optimizer and batches. Returns the training, and the step of the weights."""
    config: DetectConfig = start.config
    vit, step, note = open_backbone(start.source)
    img_size = vit.patch_embed.img_size[0]
    facts = DetectorFacts.of(config, img_size=img_size, classes=start.train_set.box_classes)
    detector = put_together(vit, facts, seed=config.run.seed)
    task = DetectTask(
        detector,
        num_classes=len(facts.classes),
        distill=config.distill,
        teacher=_load_teacher(config, facts, detector),
        accumulation=start.accumulation,
        seed=config.run.seed,
        val_images=start.val_images,
        processes=start.accelerator,
    ).to(start.accelerator.device)

    def save(path: Path, metadata: dict) -> None:
        save_detector(path, detector, facts, **metadata)

    training = Training(
        config=config,
        task=task,
        optimizer=build_adamw(vit, task, config.optim, lr=config.optim.lr),
        batches=start.batches(_view(config, img_size)),
        accelerator=start.accelerator,
        metric=METRIC,
        identity=start.identity(METRIC),
        save=save,
        summary=start.describe(
            task,
            kind=f"{config.detector.pyramid} pyramid",
            pixels=f"{facts.sizes[0]} to {facts.sizes[1]} px",
            num_classes=len(facts.classes),
            note=note,
        ),
    )
    return training, step


def _view(config: DetectConfig, img_size: int) -> LargeScaleJitter | ShortestEdge:
    """Jitter or resizing, and flip, as the recipe says; padding is 0 once it is normalised."""
    if config.jitter is None:
        short, long = config.resize or (img_size, img_size)
        return ShortestEdge((short,), long, flip=config.flip, seed=config.run.seed)
    fill = tuple(round(255 * mean) for mean in config.data.mean)
    return LargeScaleJitter(img_size, config.jitter, flip=config.flip, seed=config.run.seed, fill=fill)


def _load_teacher(config: DetectConfig, facts: DetectorFacts, detector: Detector) -> Detector | None:
    """The larger detector of a distillation, frozen. Raises UserError where it can't take the same images."""
    if config.distill is None:
        return None
    path = Path(config.distill.teacher).expanduser()
    teacher, its = load_detector(path, label="distill.teacher")
    if (its.mean, its.std) != (facts.mean, facts.std):
        raise UserError(
            f"distill.teacher '{path}' was trained with data.mean {list(its.mean)} and data.std "
            f"{list(its.std)}, this recipe has {list(facts.mean)} and {list(facts.std)}; both get the same "
            "pixels: make them equal"
        )
    patches = [one.backbone.trunk.patch_size for one in (teacher, detector)]
    if patches[0] != patches[1]:
        raise UserError(
            f"distill.teacher '{path}' has patches of {patches[0]} px and the student of {patches[1]} px, so "
            "their pyramids have other strides; choose networks with equal patches"
        )
    return teacher.requires_grad_(False)
