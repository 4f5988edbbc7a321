"""Views of a run's networks on a few validation images: reconstructions, CKA, patch features, attention.

The number of images is small and the same for every network: 16 through a ViT-L take half a minute on two
cores.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dmae_ds.data.pixels import PixelFormat
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.storage import Access
from dmae_ds.errors import UserError
from dmae_ds.evaluate.attention import choose_heads, cls_attention
from dmae_ds.evaluate.cka import cka_grid
from dmae_ds.evaluate.pca import pca_colours
from dmae_ds.evaluate.reconstruct import choose_images, reconstruct
from dmae_ds.evaluate.record import RunRecord
from dmae_ds.models.patches import Normalize, patchify
from dmae_ds.objectives.feature_distillation import TeacherShape
from dmae_ds.report.boards import Board, to_heat_map
from dmae_ds.report.reference import Reference, Teachers

NUM_COMPARED = 16  # images for CKA
NUM_SHOWN = 6
NUM_AT_RATIOS = 2
RATIOS = (0.5, 0.75, 0.9, 0.95)
NUM_TOKENS = 1024  # of the compared images: bounds CKA to 1024 x 1024 Gram matrices
NUM_HEADS = 2
IMAGE_SEED = 0  # not the run's: all runs of a page show the same images under the same masks


@dataclass
class Views:
    """The views of one run.

    boards, missing: by section, what there is or why there is none; cka: [student blocks, teacher blocks]
    """

    boards: dict[str, Board] = field(default_factory=dict)
    cka: np.ndarray | None = None
    teacher: str = ""  # the name of the teacher in the grid's columns
    pairs: list[tuple[int, int]] = field(default_factory=list)  # distilled (student block, teacher block)
    missing: dict[str, str] = field(default_factory=dict)


SECTIONS = ("pictures", "ratios", "cka", "patches", "attention")


def make_views(
    record: RunRecord, objective: nn.Module, shapes: dict[str, TeacherShape], teachers: Teachers
) -> Views:
    """Make all views of a run, with its weights loaded into `objective`.

    Raises nothing for a run that lacks something: the section gets a sentence in its place.
    """
    try:
        images, noise = _prepare(record, objective)
    except UserError as error:  # an unfinished run, or shards that were moved: the rest of the page works
        return Views(missing=dict.fromkeys(SECTIONS, str(error)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objective, images, noise = objective.to(device).eval(), images.to(device), noise.to(device)
    normalize = Normalize(record.config.data.mean, record.config.data.std).to(device)
    views = Views()
    if objective.reconstructs_pixels:
        views.boards["pictures"] = _show_reconstructions(
            objective, images[:NUM_SHOWN], noise[:NUM_SHOWN], normalize
        )
        views.boards["ratios"] = _show_ratios(
            objective, images[:NUM_AT_RATIOS], noise[:NUM_AT_RATIOS], normalize
        )
    else:
        views.missing |= dict.fromkeys(
            ("pictures", "ratios"), f"{record.config.objective.name} predicts no pixels"
        )
    patches = normalize(patchify(images, objective.student.patch_size))  # [N, L, P, P, 3]
    latent, student = _extract_student(objective.student, patches)
    try:
        reference = teachers.load_for(record, objective, shapes, device=device)
    except UserError as error:
        reference, views.missing["cka"] = None, str(error)
    teacher: dict[int, Tensor] = {}
    if reference is not None:
        teacher = reference.features(patches)
        views.teacher, views.pairs = reference.name, list(objective.pairs)
        views.cka = compute_cka(student, teacher)
        if reference.note:
            views.missing["cka"] = reference.note
    views.boards["patches"] = _show_patches(
        objective, images[:NUM_SHOWN], latent, student, teacher, reference
    )
    if objective.student.num_cls:
        shown = slice(NUM_SHOWN)
        views.boards["attention"] = _show_attention(objective.student, images[shown], patches[shown])
    else:
        views.missing["attention"] = "this student has no CLS token, whose attention is drawn"
    return views


def _prepare(record: RunRecord, objective: nn.Module) -> tuple[Tensor, Tensor]:
    """Load the run's weights and choose the images. Raises UserError if either is missing."""
    data, student = record.config.data, objective.student
    if data.val is None:
        raise UserError("data.val is null in the run's config.yaml, so there are no images to show")
    shard_set = ShardSet.open(data.val, label="data.val", access=Access.of(data))
    _load_weights(record, objective)
    return choose_images(
        shard_set,
        num=NUM_COMPARED,
        seed=IMAGE_SEED,
        img_size=student.grid[0] * student.patch_size,
        num_patches=student.num_patches,
        crop_pct=data.crop_pct,
        pixels=PixelFormat.of(data),
    )


def _load_weights(record: RunRecord, objective: nn.Module) -> None:
    weights = {}
    for name, prefix in (("student", "student."), ("decoder", "")):
        path = record.path / f"{name}.safetensors"
        try:
            weights |= {prefix + key: tensor for key, tensor in load_file(path).items()}
        except FileNotFoundError:
            raise UserError(f"no {path.name} yet: the run writes it with its first checkpoint") from None
        except SafetensorError as error:
            raise UserError(f"{path.name} is not a whole safetensors file ({error}); copy it again") from None
    try:
        objective.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"the weights don't fit config.yaml ({reason}); copy the files of this run") from None


# ---- reconstructions


def _show_reconstructions(objective: nn.Module, images: Tensor, noise: Tensor, normalize: Normalize) -> Board:
    masked, reconstructed = reconstruct(objective, images, noise, normalize)
    rows = {"original": images, "visible": masked, "reconstructed": reconstructed}
    return Board([(label, _to_list(row)) for label, row in rows.items()])


def _show_ratios(objective: nn.Module, images: Tensor, noise: Tensor, normalize: Normalize) -> Board:
    """Two rows for each image, visible and reconstructed; after the original a column for each mask ratio."""
    total = objective.student.num_patches
    counts = {
        ratio: objective.visible_at(ratio) for ratio in RATIOS if 0 < round(total * (1 - ratio)) < total
    }
    pairs = [reconstruct(objective, images, noise, normalize, num_visible=count) for count in counts.values()]
    visible = [_to_list(masked) for masked, _ in pairs]
    reconstructed = [_to_list(image) for _, image in pairs]
    rows = []
    for number, original in enumerate(_to_list(images)):
        rows.append(("visible", [original, *(column[number] for column in visible)]))
        rows.append(("reconstructed", [original, *(column[number] for column in reconstructed)]))
    return Board(rows, heads=["original", *(f"{ratio:.0%} masked" for ratio in counts)])


# ---- student and teacher


@torch.inference_mode()
def _extract_student(student: nn.Module, patches: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    """The student's features of whole images.

    Returns [N, 1 + L, D] after the final norm, and {block: [N, 1 + L, D]} of every block.
    """
    ids = torch.arange(student.num_patches, device=patches.device).expand(len(patches), -1)
    return student(patches, ids, taps=range(1, student.depth + 1))


def compute_cka(student: dict[int, Tensor], teacher: dict[int, Tensor]) -> np.ndarray:
    """CKA of every block with every block, [student blocks, teacher blocks], over tokens that both have.

    These are the patches, and CLS unless the teacher has none.
    """
    num_tokens = min(next(iter(student.values())).shape[1], next(iter(teacher.values())).shape[1])
    num_rows = len(student[1]) * num_tokens
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))
    chosen = order[:NUM_TOKENS].to(student[1].device)

    def rows(features: dict[int, Tensor]):
        # [N, T, D] -> [N * T, D]; a teacher without CLS has the patches alone, so tokens count from the end
        return (features[block][:, -num_tokens:].flatten(0, 1)[chosen] for block in sorted(features))

    return cka_grid(rows(student), rows(teacher)).cpu().numpy()


def _show_patches(
    objective: nn.Module,
    images: Tensor,
    latent: Tensor,
    student: dict[int, Tensor],
    teacher: dict[int, Tensor],
    reference: Reference | None,
) -> Board:
    """Patch features as colours: the student's last ones and, with a teacher, the deepest distilled pair."""
    grid = objective.student.grid
    brightness = patchify(images, objective.student.patch_size).float().mean(dim=(-3, -2, -1))  # [N, L]
    rows = [("original", _to_list(images))]
    sources = {"student, last": latent}
    if reference is not None:
        distilled = [mine for mine, theirs in objective.pairs if theirs == reference.tapped]
        sources |= {f"student, block {block}": student[block] for block in distilled[-1:]}
        sources[f"teacher, block {reference.tapped}"] = teacher[reference.tapped]
    for label, tokens in sources.items():
        features = tokens[: len(images), -objective.student.num_patches :].float()
        colours = pca_colours(features.cpu(), brightness.cpu())  # [N, L, 3]
        rows.append((label, list(colours.unflatten(1, grid).numpy())))
    return Board(rows)


def _show_attention(student: nn.Module, images: Tensor, patches: Tensor) -> Board:
    attention = cls_attention(student, patches, student.depth).cpu()  # [N, heads, L]
    maps = {"all heads": attention.mean(dim=1)}  # [N, L]
    maps |= {f"head {head + 1}": attention[:, head] for head in choose_heads(attention, NUM_HEADS)}
    rows = [("original", _to_list(images))]
    for label, values in maps.items():
        grids = values.unflatten(1, student.grid)  # [N, rows, columns]
        rows.append((label, [to_heat_map(grid.numpy()) for grid in grids]))
    return Board(rows)


def _to_list(images: Tensor) -> list[np.ndarray]:
    """[N, C, H, W] -> N times [H, W, 3] uint8: the first three channels, or the first one as grey."""
    channels = [0, 1, 2] if images.shape[1] >= 3 else [0, 0, 0]
    return list(images[:, channels].movedim(1, -1).to(torch.uint8).cpu().numpy())
