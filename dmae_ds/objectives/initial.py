"""A student that begins with the weights of an earlier run, or of somebody's file, instead of random ones (G2SD: the specific stage)."""

from __future__ import annotations

from pathlib import Path

from dmae_ds.config.run import ModelConfig, TeacherConfig, looks_like_hub_id
from dmae_ds.errors import UserError
from dmae_ds.models.vit import MaskedViT
from dmae_ds.teacher.frozen import check_same_network, own_network
from dmae_ds.weights.fit import check_fit, fits
from dmae_ds.weights.formats import choose_format
from dmae_ds.weights.hub import locate
from dmae_ds.weights.positions import fit_positions


def fill_student(student: MaskedViT, weights: str, network: ModelConfig) -> None:
    """Read every tensor of a student on the CPU from a run folder, a file of any known format, or a hub id; heads and decoders stay there.

    Position codes of another grid are fitted. Raises UserError (one line) where the file isn't there or doesn't fit.
    """
    if not Path(weights).expanduser().exists() and not looks_like_hub_id(weights):
        raise UserError(
            f"student.weights '{weights}' is neither a run folder nor a weights file; give one that `dmae-ds train` wrote, a .safetensors or .pth file, or a hub id"
        )
    try:
        _fill(student, locate(TeacherConfig(name="-", weights=weights)), network)
    except UserError as error:  # the teacher's room speaks of its own keys
        raise UserError(
            str(error)
            .replace("teacher", "student")
            .replace(
                "; set student.name and student.format",
                "; make student.name and its numbers agree with the file",
            )
        ) from None


def _fill(student: MaskedViT, path: Path, network: ModelConfig) -> None:
    needed = student.state_dict()
    found = choose_format(path, fits(needed, depth=student.depth, may_resize=True), needed.keys())
    dropped = check_fit(needed, found, depth=student.depth, may_resize=True)
    if dropped.blocks:
        raise UserError(
            f"student.weights '{path}' has more than {student.depth} blocks; make student.depth agree with the file"
        )
    own = own_network(found.container)
    if own is not None:
        check_same_network(path, own, (network.name, network.overrides()))
    tensors = {name: found[name].float() for name in needed}
    if tensors["pos_embed"].shape != needed["pos_embed"].shape:
        tensors["pos_embed"], _ = fit_positions(tensors["pos_embed"], num_prefix=1, grid=student.grid)
    student.load_state_dict(tensors)
