"""A recipe's teacher section -> the frozen teacher, found, opened, filled and looked at."""

from __future__ import annotations

from pathlib import Path

import torch

from dmae_ds.config.run import TeacherConfig
from dmae_ds.errors import UserError
from dmae_ds.models.vit import MaskedViT
from dmae_ds.teacher import identity, targets
from dmae_ds.teacher.decoder import TeacherDecoder, meta_decoder
from dmae_ds.teacher.fit import fits
from dmae_ds.teacher.formats import Weights, choose_format, open_weights
from dmae_ds.teacher.frozen import DTYPES, FrozenTeacher, TeacherParts, fill, meta_teacher, needed_depths, with_notes
from dmae_ds.teacher.grid import PatchView
from dmae_ds.teacher.hub import locate, pixel_statistics


def build_frozen_teacher(
    config: TeacherConfig, *, taps: tuple[str, ...], whole_blocks: int, mean: tuple, std: tuple, device: torch.device, standardize: bool = True
) -> FrozenTeacher:
    """Only the blocks up to the deepest tap, read strictly, checked on a fixed input.

    mean, std: of the data, which the student's patches are normalised with
    standardize: False leaves the features raw, to take their statistics
    Raises UserError.
    """
    vit, decoder, parts, path = _load(config, taps=taps, whole_blocks=whole_blocks, device=device)
    found, parts = check_identity(vit, parts, path, taps=taps, dtype=DTYPES[config.dtype], decoder=decoder)
    teacher_mean, teacher_std = pixel_statistics(config, mean, std)
    view = PatchView(vit.patch_size, mean=mean, std=std, teacher_mean=teacher_mean, teacher_std=teacher_std).to(device)
    stats = None
    if standardize and config.standardize in ("zscore", "phi_s"):
        stats_file = Path(config.stats).expanduser() if config.stats else targets.stats_path(path)
        stats, about = targets.read_stats(stats_file, taps)
        identity.check_fingerprint(found, about["fingerprint"], dtype=DTYPES[config.dtype], where=str(stats_file))
        if about["sees"] != config.sees:
            raise UserError(f"'{stats_file}' was made with teacher.sees={about['sees']}, the recipe says {config.sees}; make it again with dmae-ds teacher stats")
    target = targets.build_target(config.standardize if standardize else "none", taps, stats, device)
    if not view.same_pixels:
        parts = with_notes(parts, f"pixels normalised for the teacher: mean {list(teacher_mean)}, std {list(teacher_std)}")
    return FrozenTeacher(vit, taps, parts, view=view, sees=config.sees, target=target, decoder=decoder)


def _load(
    config: TeacherConfig, *, taps: tuple[str, ...], whole_blocks: int, device: torch.device
) -> tuple[MaskedViT, TeacherDecoder | None, TeacherParts, Path]:
    """The network with its weights, the account of what was left out, and where they came from."""
    depth, decoder_depth = needed_depths(taps, whole_blocks)
    if decoder_depth and config.sees == "all":
        raise UserError("teacher.sees=all leaves the teacher's decoder no masked patch to fill in; the objective taps it: set teacher.sees=visible")
    vit = meta_teacher(config.name, config.overrides(), depth, keep_norm=decoder_depth > 0)
    path = locate(config)
    weights = open_teacher(config, path, vit)
    decoder = None
    if decoder_depth:
        decoder = meta_decoder(weights, encoder_dim=vit.embed_dim, depth=decoder_depth, num_heads=config.decoder_num_heads, num_patches=vit.num_patches)
    parts = fill(
        vit, weights, whole_blocks=whole_blocks, may_resize=config.img_size is not None, dtype=DTYPES[config.dtype], device=device,
        said=(config.name, config.overrides()), decoder=decoder,
    )  # fmt: skip
    return vit, decoder, with_notes(parts, f"format {weights.format} (chosen by auto)" if config.format == "auto" else ""), path


def open_teacher(config: TeacherConfig, path: Path, vit: MaskedViT) -> Weights:
    """The weights file in its format; `auto` takes the one format under which it fits `vit`."""
    if config.format != "auto":
        return open_weights(path, config.format)
    needed = vit.state_dict()
    return choose_format(path, fits(needed, depth=vit.depth, may_resize=config.img_size is not None), needed.keys())


def check_identity(
    vit: MaskedViT, parts: TeacherParts, path: Path, *, taps: tuple[str, ...], dtype: torch.dtype, decoder: TeacherDecoder | None = None
) -> tuple[identity.Fingerprint, TeacherParts]:
    """The teacher's fingerprint, held against the one beside the weights where there is one.

    Raises UserError where features are dead or not those of the fingerprint; a teacher that looks untrained is noted.
    """
    probed = identity.probe(vit)
    features = {f"block/{number}": tokens for number, tokens in probed.features.items()}
    if decoder is not None:
        features |= identity.probe_decoder(decoder, vit.norm, probed.features[vit.depth])
    identity.check_alive({tap: features[tap] for tap in taps})
    found = identity.fingerprint(probed.features)
    known = identity.read_sidecar(path)
    if known is not None:
        identity.check_fingerprint(found, known["fingerprint"], dtype=dtype, where=str(identity.sidecar(path)))
        return found, with_notes(parts, f"features match the fingerprint in {identity.sidecar(path).name}")
    untrained = identity.find_untrained(vit, probed)
    if untrained:
        parts = with_notes(parts, f"WARNING: THIS TEACHER LOOKS UNTRAINED: {untrained}")
    return found, parts
