"""Frozen patch features on dense labels: mIoU, mean and pixel accuracy by k-NN or one linear layer.

    dmae-ds eval dense RUN [--task knn linear] [data.train=SHARDS data.val=SHARDS]

Images are resized and cut into windows, windows give patch features, and the task turns every feature into a
score for each class. Scores are enlarged to pixels, averaged over windows, and enlarged to the label map.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from dmae_ds.data.dense import DenseSet
from dmae_ds.distributed.device import device_name
from dmae_ds.errors import UserError
from dmae_ds.evaluate.dense_features import DenseNetwork, DenseOptions, Embedded, embed_chunks
from dmae_ds.evaluate.dense_knn import Vote, build_memory
from dmae_ds.evaluate.dense_linear import LinearOptions, check_linear, enlarge, train_head
from dmae_ds.evaluate.dense_sets import open_maps
from dmae_ds.evaluate.features import Processes, precision_of, start_processes
from dmae_ds.evaluate.results import METRICS, MeasuredOn, append_result, make_result
from dmae_ds.evaluate.segmentation_scores import ConfusionMatrix
from dmae_ds.evaluate.source import FrozenSource, source_of_run
from dmae_ds.evaluate.subsets import ALL, warn_of_same_images
from dmae_ds.evaluate.windows import join_windows
from dmae_ds.models.numerics import fp32_products

Classify = Callable[[Tensor], Tensor]  # patch features [M, D] to scores [M, C]


@dataclass(frozen=True)
class KnnOptions:
    """How patches vote; the defaults are Hummingbird's, the memory a tenth of its largest.

    patches: of the memory; memory_gib: of the search, besides the memory
    """

    k: int = 30
    temperature: float = 0.02
    patches: int = 1_024_000
    seed: int = 0
    memory_gib: float = 1.0


def evaluate_run(
    run: Path | FrozenSource,
    *,
    tasks: list[KnnOptions | LinearOptions],
    size: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> list[dict]:
    """Measure a run or file; print a line for each task and add it to RUN/results.jsonl. Collective.

    size, window, stride, batch_size: as in `DenseOptions.of`
    Returns the results, on the main process. Raises UserError for data without label maps, and for numbers
    out of range.
    """
    source = run if isinstance(run, FrozenSource) else source_of_run(run)
    check_tasks(tasks)
    shard_sets = open_maps(source.data.train, source.data.val, source.data)
    accelerator = start_processes(source.run)
    if accelerator.is_main_process:
        source.results.mkdir(parents=True, exist_ok=True)
    step, vit = source.read_step(), source.load()
    network = DenseNetwork(vit).to(accelerator.device)
    options = DenseOptions.of(
        source.data,
        patch_size=network.patch_size,
        batch_size=batch_size,
        size=size,
        window=window,
        stride=stride,
    )
    train, val = (DenseSet(shard_set, boxes=False) for shard_set in shard_sets)
    results = []
    for task in tasks:
        start = time.monotonic()
        with fp32_products(accelerator.device, tf32=source.tf32):
            scores = measure(network, train, val, options, task, processes=accelerator)
        if accelerator.is_main_process:
            result = make_dense_result(
                scores,
                task,
                options,
                sets=(train, val),
                step=step,
                seconds=time.monotonic() - start,
                processes=accelerator,
            )
            result["settings"] |= source.settings()
            results.append(append_result(source.results, result))
            print(line_of(result, num_classes=len(train.classes)), flush=True)
    warn_of_same_images(*shard_sets)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results


def check_tasks(tasks: list[KnnOptions | LinearOptions]) -> None:
    """Raise UserError for options that are out of range."""
    for task in tasks:
        if isinstance(task, LinearOptions):
            check_linear(task)
        elif min(task.k, task.patches) < 1 or not task.temperature > 0 or task.seed < 0:
            raise UserError(
                f"k {task.k}, patches {task.patches}, temperature {task.temperature:g}, seed {task.seed}: "
                "expected numbers above 0, and a seed of at least 0"
            )


def measure(
    network: DenseNetwork,
    train: DenseSet,
    val: DenseSet,
    options: DenseOptions,
    task: KnnOptions | LinearOptions,
    *,
    processes: Processes,
    is_shown: bool = True,
) -> dict[str, float]:
    """Compute miou, mean_accuracy and pixel_accuracy of a task in percent, equal on all ranks. Collective."""
    if isinstance(task, LinearOptions):
        title = "linear segmentation" if is_shown else None
        classify: Classify = train_head(network, train, options, task, processes=processes, title=title)
    else:
        memory = build_memory(
            network,
            train,
            options,
            num_patches=task.patches,
            seed=task.seed,
            processes=processes,
            title="memory of patches" if is_shown else None,
        )
        classify = Vote(memory, k=task.k, temperature=task.temperature, memory_gib=task.memory_gib)
    title = "val images" if is_shown else None
    return score(network, val, options, classify, processes=processes, title=title)


def score(
    network: DenseNetwork,
    dense_set: DenseSet,
    options: DenseOptions,
    classify: Classify,
    *,
    processes: Processes,
    title: str | None,
) -> dict[str, float]:
    """Score the classes of all pixels of a set, at the resolution of its label maps. Collective."""
    device = processes.device
    matrix = ConfusionMatrix(len(dense_set.classes), device=device, no_class=dense_set.ignore_index)
    for chunk in embed_chunks(network, dense_set, options, processes=processes, title=title):
        for image, predicted in zip(chunk, predict(chunk, classify, network.patch_size), strict=True):
            matrix.add(predicted, image.sample.label_map.to(device))
    return matrix.scores(processes)


def predict(chunk: list[Embedded], classify: Classify, patch_size: int) -> list[Tensor]:
    """The likeliest class of every pixel [H, W] of each image of a chunk, the lowest among equals."""
    windows = [window for image in chunk for window in image.features]
    # [D, h, w] of each window -> [M, D] of the chunk -> [M, C]
    scores = classify(torch.cat([window.flatten(1).T for window in windows]))
    by_window = iter(scores.split([window[0].numel() for window in windows]))
    predicted = []
    for image in chunk:
        enlarged = []
        for place, window in zip(image.places, image.features, strict=True):
            # [L, C] -> [C, L] -> [1, C, h, w] -> pixels of the window
            grid = next(by_window).T.unflatten(1, window.shape[1:])[None]
            size = tuple(side.stop - side.start for side in place)
            enlarged.append(enlarge(grid, size, patch_size))
        whole = join_windows(enlarged, image.places, height=image.height, width=image.width)
        size = image.sample.label_map.shape
        if whole.shape[2:] != size:
            whole = functional.interpolate(whole, size, mode="bilinear", align_corners=False)
        predicted.append(whole[0].argmax(dim=0))
    return predicted


def make_dense_result(
    scores: dict[str, float],
    task: KnnOptions | LinearOptions,
    options: DenseOptions,
    *,
    sets: tuple[DenseSet, DenseSet],
    step: int,
    seconds: float,
    processes: Processes,
) -> dict:
    """Put a result of a task together, for `append_result`."""
    settings = asdict(task)
    settings.pop("memory_gib", None)  # changes no number
    settings |= {"size": options.size, "window": options.window, "stride": options.stride}
    measured_on = MeasuredOn(
        labels=ALL,
        subset_seed=None,
        step=step,
        num_train=len(sets[0]),
        num_val=len(sets[1]),
        data=sets[0].fingerprint,
        val=sets[1].fingerprint,
        device=device_name(processes.device),
        world_size=processes.num_processes,
    )
    return make_result(
        measured_on,
        metric="dense_linear" if isinstance(task, LinearOptions) else "dense_knn",
        scores=scores,
        settings={**settings, "precision": precision_of(processes)},
        seconds=round(seconds, 3),
    )


def line_of(result: dict, *, num_classes: int) -> str:
    """The line that is printed: the scores, and what they were measured on."""
    metric, settings = METRICS[result["metric"]], result["settings"]
    scores = ", ".join(
        f"{metric.scores[name].title} {value:.1f}%" for name, value in result["scores"].items()
    )
    if result["metric"] == "dense_knn":
        how = f"k {settings['k']}, T {settings['temperature']:g}"
    else:
        how = f"{settings['iterations']} iterations of {settings['batch']} crops"
    images = f"{result['num_train']} train, {result['num_val']} val, {num_classes} classes"
    return f"{metric.title}: {scores} ({how}, windows of {settings['window']} px; {images})"
