"""From a folder of images and a teacher to a student, in one call: `dmae_ds.distill`, `dmae-ds distill`.

Shards, networks, rules (config/distill_rules.py), a recipe in the run folder, and the start of its ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from dmae_ds.output.callable_room import make_callable


def distill(
    images: str | Path,
    teacher: str | Path,
    student: str,
    *,
    epochs: float | None = None,
    shards: str | Path | None = None,
    ranks: int | None = None,
    max_skip: int = 0,
    overrides: Mapping[str, object] | Iterable[str] = (),
) -> Path:
    """Distil a teacher into a student on a folder of images; returns the run folder.

    images: a flat folder of JPEGs and PNGs, a folder of class folders, one of `train` and `val`, or shards
    teacher: a weights file or folder, whose network is found by its content; a hub id; or timm's name
    student: timm's name of a plain vision transformer, such as vit_small_patch16_224
    epochs: length of the run; None: by the number of images, and on CPUs by the time that an epoch takes
    shards: where shards are made; None: a folder next to the images
    ranks: processes; None: one a GPU, else one for every 8 cores. Several are started by DeepSpeed's launcher
    max_skip: unusable images that are left out
    overrides: other keys of the recipe, {"run.dir": "runs/mine"} or words such as "run.dir=runs/mine"

    A call that was killed continues when it is repeated. Raises UserError for what you can fix, RunFailed
    where the run breaks, Requeue after Ctrl-C, once it has saved. Training has a process of its own.
    """
    from dmae_ds.config.load import override_words
    from dmae_ds.distill.request import Request
    from dmae_ds.distill.resolve import resolve
    from dmae_ds.distill.start import start

    request = Request(
        images=Path(images),
        teacher=str(teacher),
        student=student,
        epochs=epochs,
        shards=None if shards is None else Path(shards),
        ranks=ranks,
        max_skip=max_skip,
        overrides=tuple(override_words(overrides)),
    )
    recipe, num_ranks = resolve(request)
    start(recipe, num_ranks, in_place=False)
    return request.run_dir


make_callable(distill)
