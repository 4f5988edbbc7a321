"""Agreement of neighbours: how many of an image's nearest images student and teacher have in common.

    dmae-ds eval agreement RUN [data.val=SHARDS] [--k 20]

No labels are used. For every image of data.val its k nearest others are found twice, in the student's
features and in the whole teacher's; the number is the mean share that is in both (mutual k-NN of Huh et al.
2024, "The Platonic Representation Hypothesis"). Chance gives about k / images.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from dmae_ds.config.data import DataConfig
from dmae_ds.config.load import read_saved_config
from dmae_ds.config.networks import ModelConfig, TeacherConfig
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.storage import Access
from dmae_ds.distributed.device import device_name
from dmae_ds.errors import UserError
from dmae_ds.evaluate.feature_cache import FeatureCache
from dmae_ds.evaluate.features import FeatureOptions, Processes, start_processes
from dmae_ds.evaluate.frozen import check_pool, check_pool_of, settings_of
from dmae_ds.evaluate.neighbours import choose_blocks, nearest
from dmae_ds.evaluate.results import MeasuredOn, append_result, make_result
from dmae_ds.evaluate.source import FrozenSource, source_of_run
from dmae_ds.evaluate.subsets import ALL
from dmae_ds.models.numerics import fp32_products
from dmae_ds.teacher.build import locate_teacher, pixel_statistics
from dmae_ds.weights.label import TEACHER


def evaluate_run(
    run: Path | FrozenSource,
    *,
    k: int = 20,
    pool: str = "mean",
    batch_size: int = 256,
    memory_gib: float = 1.0,
    cache_gib: float = 16.0,
) -> dict | None:
    """Compare a run's student with its teacher; print a line and add it to results.jsonl. Collective.

    The options are those of k-NN. Returns the result, on the main process. Raises UserError for a run without
    a teacher or data.val, and for numbers out of range.
    """
    source = run if isinstance(run, FrozenSource) else source_of_run(run)
    start, accelerator = time.monotonic(), start_processes(source.run)
    check_pool(pool)
    teacher = _source_of_teacher(source)
    if source.data.val is None:
        raise UserError("data.val is null, and neighbours are compared on its images; give data.val=SHARDS")
    val = ShardSet.open(source.data.val, label="data.val", access=Access.of(source.data))
    if not 1 <= k < val.num_samples:
        raise UserError(f"k {k}: data.val has {val.num_samples} images; choose 1 to {val.num_samples - 1}")
    both = []
    for one, folder in ((source, source.results), (teacher, source.results / "teacher")):
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
        network = one.load()
        check_pool_of(network, pool)
        cache = FeatureCache(folder, network, one.network, gib=cache_gib)
        options = FeatureOptions.of(one.data, pool=pool, batch_size=batch_size)
        network.to(accelerator.device)
        title = "student" if one is source else "teacher"
        with fp32_products(accelerator.device, tf32=source.tf32):
            both.append(cache.embed(network, val, options, processes=accelerator, title=title)[0])
    share = agreement(*both, k=k, memory_gib=memory_gib, processes=accelerator)
    result = None
    if accelerator.is_main_process:
        result = make_result(
            MeasuredOn(
                labels=ALL,
                subset_seed=None,
                step=source.read_step(),
                num_train=0,
                num_val=val.num_samples,
                data=val.fingerprint,
                val=val.fingerprint,
                device=device_name(accelerator.device),
                world_size=accelerator.num_processes,
            ),
            metric="agreement",
            scores={"overlap": 100 * share},
            settings={"k": k, **settings_of(accelerator, pool=pool)},
            seconds=round(time.monotonic() - start, 3),
        )
        result = append_result(source.results, result)
        print(
            f"agreement of neighbours {100 * share:.1f}% (k {k}, {pool} pool, {val.num_samples} images of "
            f"data.val; chance {100 * k / (val.num_samples - 1):.2g}%)",
            flush=True,
        )
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


def _source_of_teacher(source: FrozenSource) -> FrozenSource:
    """The whole teacher of a run's recipe, on the same images. Raises UserError where there is none."""
    teacher: TeacherConfig | None = None
    if source.run is not None:
        config = read_saved_config(source.run, student_only=True)
        teacher = config.teacher
        if config.teachers is not None:
            raise UserError(
                f"'{source.run}' has the teachers {', '.join(config.named_teachers())}, and neighbours are "
                "compared with those of one; give the run of a recipe with a teacher section"
            )
    if teacher is None:
        raise UserError(
            f"'{source.run or source.file}' has no teacher to compare with; give the run of a recipe with a "
            "teacher section"
        )
    mean, std = pixel_statistics(teacher, source.data.mean, source.data.std)
    data: DataConfig = source.data.model_copy(update={"mean": mean, "std": std})
    network = ModelConfig(name=teacher.name, **teacher.overrides())
    return FrozenSource(
        network, data, source.results, file=locate_teacher(teacher), format=teacher.format, label=TEACHER
    )


def agreement(ours: Tensor, theirs: Tensor, *, k: int, memory_gib: float, processes: Processes) -> float:
    """Mean share of the k nearest other rows that are the same in both. Collective.

    ours [N, D], theirs [N, D_t]: float32 features of the same images
    Raises UserError for features that are not finite.
    """
    if not (ours.isfinite().all() and theirs.isfinite().all()):
        raise UserError("features are not finite; check the training with `dmae-ds report`")
    part = slice(processes.process_index, None, processes.num_processes)
    found = [_neighbours(features, part, k=k, memory_gib=memory_gib) for features in (ours, theirs)]
    # [m, k, 1] == [m, 1, k] -> [m, k]: a neighbour of the one that is among those of the other
    shared = (found[0][:, :, None] == found[1][:, None, :]).any(dim=2).sum()
    return float(processes.reduce(shared[None].double())[0]) / (k * len(ours))


def _neighbours(features: Tensor, part: slice, *, k: int, memory_gib: float) -> Tensor:
    """The k nearest other rows [m, k] of the rows in a part."""
    own = torch.arange(len(features), device=features.device)[part]
    queries = features[part].contiguous()
    blocks = choose_blocks(
        num_queries=len(queries),
        num_train=len(features),
        dim=features.shape[1],
        k=k + 1,
        num_classes=0,
        memory_gib=memory_gib,
    )
    rows = torch.cat(
        [
            torch.empty(0, k + 1, dtype=torch.int64, device=features.device),
            *(rows for _, rows in nearest(features, queries, k=k + 1, blocks=blocks)),
        ]
    )
    # Each row is among its own nearest, unless others are equal to it: then the last one is left out.
    is_own = rows == own[:, None]
    is_own[:, -1] |= ~is_own.any(dim=1)
    return rows[~is_own].unflatten(0, (len(own), k))
