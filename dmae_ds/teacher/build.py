"""A recipe's teacher section -> the frozen teacher, found, opened, filled and looked at."""

from __future__ import annotations

from pathlib import Path

import torch

from dmae_ds.config.run import TeacherConfig
from dmae_ds.errors import UserError
from dmae_ds.models.vit import MaskedViT
from dmae_ds.teacher import identity, targets
from dmae_ds.teacher.fp8 import check_fp8, to_fp8
from dmae_ds.teacher.frozen import (
    DTYPES,
    FrozenTeacher,
    fill,
    meta_teacher,
    needed_depths,
    needs_top,
    with_notes,
)
from dmae_ds.teacher.grid import PatchView
from dmae_ds.teacher.pipeline import StageGroup, StreamedTeacher
from dmae_ds.teacher.sharded import ShardedTeacher
from dmae_ds.teacher.stages import held_blocks
from dmae_ds.teacher.top import meta_top
from dmae_ds.weights.fit import fits
from dmae_ds.weights.formats import Weights, choose_format, open_weights, with_own_decoder
from dmae_ds.weights.hub import locate, pixel_statistics


def build_frozen_teacher(
    config: TeacherConfig,
    *,
    taps: tuple[str, ...],
    whole_blocks: int,
    mean: tuple,
    std: tuple,
    device: torch.device,
    standardize: bool = True,
) -> FrozenTeacher:
    """The replicated teacher, loaded and verified. `standardize=False` leaves its features raw, to take their statistics."""
    config = config if standardize else config.model_copy(update={"standardize": "none"})
    teacher = load_frozen_teacher(
        config, taps=taps, whole_blocks=whole_blocks, mean=mean, std=std, device=device
    )
    verify(teacher, config)
    return teacher


def load_frozen_teacher(
    config: TeacherConfig,
    *,
    taps: tuple[str, ...],
    whole_blocks: int,
    mean: tuple,
    std: tuple,
    device: torch.device,
    group: StageGroup | None = None,
    sharded: bool = False,
    num_classes: int | None = None,
) -> FrozenTeacher:
    """Only the blocks up to the deepest tap, read strictly; of a pipeline, only this rank's stage. No collective.

    mean, std: of the data, which the student's patches are normalised with
    sharded: read the embedding alone; `verify` spreads the blocks over the ranks
    num_classes: of the data, which a classifier must share; None: whatever it has
    Raises UserError.
    """
    if config.dtype == "fp8":
        check_fp8(device)
    depth, decoder_depth = needed_depths(taps, whole_blocks, config.decoder_depth)
    if decoder_depth and config.sees == "all":
        raise UserError(
            "teacher.sees=all leaves the teacher's decoder no masked patch to fill in; the objective taps it: set teacher.sees=visible"
        )
    stage = (
        range(0) if sharded else None if group is None else held_blocks(depth, group.num_stages)[group.stage]
    )
    vit = meta_teacher(config.name, config.overrides(), depth, keep_norm=needs_top(taps))
    norm, vit.norm = vit.norm, None  # a top begins with the encoder's final norm
    path = locate(config)
    weights = open_teacher(config, path, vit)
    if sharded and weights.container.absent:
        raise UserError(
            f"teacher.weights '{path}' lacks {', '.join(weights.container.absent)}; teacher.placement=zero3 reads every part on the first rank"
        )
    weights = with_own_decoder(weights) if decoder_depth else weights
    top = meta_top(
        config, vit, norm, taps=taps, decoder_depth=decoder_depth, num_classes=num_classes, weights=weights
    )
    parts = fill(
        vit,
        weights,
        whole_blocks=whole_blocks,
        may_resize=config.img_size is not None,
        dtype=DTYPES[config.dtype],
        device=device,
        said=(config.name, config.overrides()),
        top=top,
        blocks=stage,
    )
    teacher_mean, teacher_std = pixel_statistics(config, mean, std)
    view = PatchView(
        vit.patch_size, mean=mean, std=std, teacher_mean=teacher_mean, teacher_std=teacher_std
    ).to(device)
    if "prediction" in taps and not view.same_pixels:
        raise UserError(
            "the objective taps the teacher's predicted pixels, which are normalised otherwise than the data's; set data.mean and data.std to the teacher's"
        )
    notes = [] if config.format != "auto" else [f"format {weights.format} (chosen by auto)"]
    notes += (
        []
        if view.same_pixels
        else [f"pixels normalised for the teacher: mean {list(teacher_mean)}, std {list(teacher_std)}"]
    )
    keys = {"view": view, "sees": config.sees, "top": top, "path": path}
    parts = with_notes(parts, *notes)
    if sharded:
        return ShardedTeacher(
            vit, taps, parts, **keys, weights=weights, dtype=DTYPES[config.dtype], device=device
        )
    if group is None:
        return FrozenTeacher(vit, taps, parts, **keys)
    return StreamedTeacher(vit, taps, parts, **keys, group=group)


def verify(teacher: FrozenTeacher, config: TeacherConfig) -> None:
    """Look at a fixed input's features, hold them against the fingerprint beside the weights, and fetch the targets' statistics.

    Collective in a pipeline's group, and of all ranks where they share the weights out. Raises UserError where features are dead or not those of the fingerprint, and where
    statistics are missing or of other weights; a teacher that looks untrained is noted.
    """
    dtype, path = DTYPES[config.dtype], teacher.path
    teacher.spread()
    probed = teacher.probe()
    features = {f"block/{number}": tokens for number, tokens in probed.features.items()}
    if teacher.top is not None:
        features |= identity.probe_top(teacher.top, teacher.vit, probed.features[teacher.vit.depth])
    identity.check_alive({tap: features[tap] for tap in teacher.taps})
    found = identity.fingerprint(probed.features)
    known = identity.read_sidecar(path)
    if known is not None:
        identity.check_fingerprint(
            found, known["fingerprint"], dtype=dtype, where=str(identity.sidecar(path))
        )
        teacher.parts = with_notes(
            teacher.parts, f"features match the fingerprint in {identity.sidecar(path).name}"
        )
    else:
        untrained = identity.find_untrained(teacher.vit, probed)
        if untrained:
            teacher.parts = with_notes(teacher.parts, f"WARNING: THIS TEACHER LOOKS UNTRAINED: {untrained}")
    stats = None
    if config.standardize in ("zscore", "phi_s"):
        stats_file = Path(config.stats).expanduser() if config.stats else targets.stats_path(path)
        stats, about = targets.read_stats(stats_file, teacher.taps)
        identity.check_fingerprint(found, about["fingerprint"], dtype=dtype, where=str(stats_file))
        if about["sees"] != config.sees:
            raise UserError(
                f"'{stats_file}' was made with teacher.sees={about['sees']}, the recipe says {config.sees}; make it again with dmae-ds teacher stats"
            )
    teacher.target = targets.build_target(
        config.standardize, teacher.taps, stats, teacher.vit.patch_embed.proj.weight.device
    )
    if config.dtype == "fp8":
        teacher.parts = with_notes(teacher.parts, to_fp8(teacher))


def open_teacher(config: TeacherConfig, path: Path, vit: MaskedViT) -> Weights:
    """The weights file in its format; `auto` takes the one format under which it fits `vit`."""
    if config.format != "auto":
        return open_weights(path, config.format)
    needed = vit.state_dict()
    return choose_format(
        path, fits(needed, depth=vit.depth, may_resize=config.img_size is not None), needed.keys()
    )
