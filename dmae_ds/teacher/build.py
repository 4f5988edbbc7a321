"""Build the teacher of a recipe: find its file, read it, check its features."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import torch

from dmae_ds.config.networks import NamedTeacherConfig, TeacherConfig
from dmae_ds.errors import UserError
from dmae_ds.models.masking import num_visible
from dmae_ds.teacher import identity, targets
from dmae_ds.teacher.fill import fill
from dmae_ds.teacher.fp8 import check_fp8, to_fp8
from dmae_ds.teacher.frozen import (
    DTYPES,
    TAPS_IN_ENCODER,
    FrozenTeacher,
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
from dmae_ds.weights.hub import locate, locate_pretrained, timm_tag
from dmae_ds.weights.label import of_teacher
from dmae_ds.weights.load import open_format
from dmae_ds.weights.named import Weights, with_own_decoder


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
    """Load and verify the replicated teacher.

    standardize: False leaves its features raw, to take their statistics
    """
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
    """Load the blocks up to the deepest tap, without a collective.

    In a pipeline a rank loads its own stage alone.

    mean, std: of the data, with which the student's patches are normalised
    group: the pipeline's, if there is one
    sharded: read the embedding alone; `verify` spreads the blocks over the ranks
    num_classes: of the data, which a classifier must share; None: whatever it has
    Raises UserError.
    """
    if config.dtype == "fp8":
        check_fp8(device)
    depth, decoder_depth = needed_depths(taps, whole_blocks, config.decoder_depth)
    if decoder_depth and config.sees != "visible":
        raise UserError(
            f"{config.key('sees')}={config.sees} shows the teacher masked patches, and the objective taps "
            f"its decoder, which fills them in; set {config.key('sees')}=visible"
        )
    vit = meta_teacher(
        config.name, config.overrides(), depth, keep_norm=needs_top(taps), where=config.section
    )
    norm, vit.norm = vit.norm, None  # a top begins with the encoder's final norm
    path = locate_teacher(config)
    resize = config.img_size is not None
    weights = open_format(
        path,
        vit.state_dict(),
        format=config.format,
        depth=depth,
        may_resize=resize,
        label=of_teacher(config.section),
    )
    if sharded:
        _check_complete(weights, path)
    weights = with_own_decoder(weights) if decoder_depth else weights
    top = meta_top(
        config, vit, norm, taps=taps, decoder_depth=decoder_depth, num_classes=num_classes, weights=weights
    )
    parts = fill(
        vit,
        weights,
        whole_blocks=whole_blocks,
        may_resize=resize,
        dtype=DTYPES[config.dtype],
        device=device,
        network=(config.name, config.overrides()),
        top=top,
        blocks=_blocks_to_read(depth, group, sharded),
    )
    view = _build_view(config, vit.patch_size, mean, std, taps).to(device)
    parts = with_notes(parts, *_describe_choices(config, weights, view))
    kwargs = {"view": view, "sees": seen_patches(config, vit.num_patches), "top": top, "path": path}
    if sharded:
        kwargs |= {"weights": weights, "dtype": DTYPES[config.dtype], "device": device}
        return ShardedTeacher(vit, taps, parts, **kwargs)
    if group is None:
        return FrozenTeacher(vit, taps, parts, **kwargs)
    return StreamedTeacher(vit, taps, parts, **kwargs, group=group)


@contextmanager
def naming(config: TeacherConfig) -> Iterator[None]:
    """Let messages of UserErrors begin with the teacher's section where it is one of several."""
    try:
        yield
    except UserError as error:
        if not isinstance(config, NamedTeacherConfig) or config.section in str(error):
            raise
        raise UserError(f"{config.section}: {error}") from None


def locate_teacher(config: TeacherConfig) -> Path:
    """The file or folder of a teacher's weights, on this machine. Raises UserError."""
    if config.pretrained:
        return locate_pretrained(config.name, label=of_teacher(config.section))
    if config.weights is None:
        raise UserError(
            f"{config.key('placement')} {config.placement} reads stored features, and this needs the "
            f"network: give {config.key('weights')} in the recipe or in the run's config.yaml"
        )
    return locate(config.weights, label=of_teacher(config.section))


def seen_patches(config: TeacherConfig, num_patches: int) -> str | int:
    """What a FrozenTeacher takes as `sees`: `visible`, `all`, or the number of patches of a superset."""
    if config.sees != "superset":
        return config.sees
    return num_visible(num_patches, config.mask_ratio, "round", key=config.key("mask_ratio"))


def pixel_statistics(config: TeacherConfig, mean: tuple, std: tuple) -> tuple[tuple, tuple]:
    """The mean and std of the teacher's pixels: its own, its timm tag's, or the data's."""
    if config.mean is not None:
        return config.mean, config.std
    tag = timm_tag(config.name) if "." in config.name and ":" not in config.name else None
    is_of_data = tag is None or len(tag.mean) != len(mean)  # timm's tags are of RGB
    return (mean, std) if is_of_data else (tuple(tag.mean), tuple(tag.std))


def _blocks_to_read(depth: int, group: StageGroup | None, sharded: bool) -> range | None:
    """The blocks that this rank reads now, counted from 0; None: all."""
    if sharded:
        return range(0)
    return None if group is None else held_blocks(depth, group.num_stages)[group.stage]


def _check_complete(weights: Weights, path: Path) -> None:
    absent = weights.container.absent
    if absent:
        raise UserError(
            f"teacher.weights '{path}' lacks {', '.join(absent)}; with teacher.placement=zero3 the first "
            "rank reads every file of the index"
        )


def _build_view(
    config: TeacherConfig, patch_size: int, mean: tuple, std: tuple, taps: tuple[str, ...]
) -> PatchView:
    teacher_mean, teacher_std = pixel_statistics(config, mean, std)
    view = PatchView(patch_size, mean=mean, std=std, teacher_mean=teacher_mean, teacher_std=teacher_std)
    if "prediction" in taps and not view.same_pixels:
        raise UserError(
            "the objective taps the teacher's predicted pixels, which are normalised differently from the "
            "data's; set data.mean and data.std to the teacher's"
        )
    return view


def _describe_choices(config: TeacherConfig, weights: Weights, view: PatchView) -> list[str]:
    """Lines for the start of a run: format and network of the file, the teacher's pixel statistics."""
    notes = []
    if config.format == "auto":
        notes.append(f"format {weights.format} (chosen by auto)")
    notes.append(weights.container.note)
    if not view.same_pixels:
        notes.append(
            f"pixels normalised for the teacher: mean {list(view.teacher_mean)}, std {list(view.teacher_std)}"
        )
    return notes


def verify(teacher: FrozenTeacher, config: TeacherConfig) -> None:
    """Check a teacher by its features of a fixed input, and read the targets' statistics.

    The features are compared with the fingerprint next to the weights. A teacher that looks untrained gets a
    note. Collective in a pipeline's group, and over all ranks where they share the weights. Raises UserError
    where features are dead or not those of the fingerprint, and where statistics are missing or of other
    weights.
    """
    dtype, path = DTYPES[config.dtype], teacher.path
    teacher.spread()
    probed = teacher.probe()
    # A block's output stands for its relations, which are gone when the block is.
    features = {
        f"{kind}/{number}": tokens for kind in TAPS_IN_ENCODER for number, tokens in probed.features.items()
    }
    if teacher.top is not None:
        features |= identity.probe_top(teacher.top, teacher.vit, probed.features[teacher.vit.depth])
    identity.check_alive({tap: features[tap] for tap in teacher.taps})
    fingerprint = identity.fingerprint(probed.features)
    sidecar = identity.read_sidecar(path)
    if sidecar is not None:
        file = identity.sidecar(path)
        identity.check_fingerprint(fingerprint, sidecar["fingerprint"], dtype=dtype, where=str(file))
        teacher.parts = with_notes(teacher.parts, f"features match the fingerprint in {file.name}")
    else:
        untrained = identity.find_untrained(teacher.vit, probed)
        if untrained:
            teacher.parts = with_notes(teacher.parts, f"WARNING: THIS TEACHER LOOKS UNTRAINED: {untrained}")
    stats = None
    if config.standardize in ("zscore", "phi_s"):
        stats = _read_stats(teacher, config, fingerprint)
    device = teacher.vit.patch_embed.proj.weight.device
    teacher.target = targets.build_target(config.standardize, teacher.taps, stats, device)
    if config.dtype == "fp8":
        teacher.parts = with_notes(teacher.parts, to_fp8(teacher))


def _read_stats(
    teacher: FrozenTeacher, config: TeacherConfig, fingerprint: identity.Fingerprint
) -> dict[str, torch.Tensor]:
    """Statistics of the features of exactly these weights, seen in the same way. Raises UserError."""
    file = Path(config.stats).expanduser() if config.stats else targets.stats_path(teacher.path)
    stats, about = targets.read_stats(file, teacher.taps)
    identity.check_fingerprint(fingerprint, about["fingerprint"], dtype=DTYPES[config.dtype], where=str(file))
    if about["sees"] != config.sees:
        raise UserError(
            f"'{file}' was made with {config.key('sees')}={about['sees']}, the recipe has {config.sees}; "
            "make it again with dmae-ds teacher stats"
        )
    return stats
