"""What a run's networks make of a few validation pictures: what the decoder reconstructs, how alike student and teacher are, where CLS looks.

Always the same small number of pictures, whatever the network: a ViT-L teacher looks at 16 of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.storage import Access
from dmae_ds.errors import UserError
from dmae_ds.evaluate.attention import cls_attention, telling_heads
from dmae_ds.evaluate.cka import cka_grid
from dmae_ds.evaluate.pca import pca_colours
from dmae_ds.evaluate.reconstruct import choose_pictures, reconstruct
from dmae_ds.evaluate.record import RunRecord
from dmae_ds.models.patches import Normalize, patchify
from dmae_ds.objectives.feature_distillation import TeacherShape
from dmae_ds.report.boards import Board, heat_picture
from dmae_ds.report.reference import Reference, Teachers

NUM_COMPARED = 16  # pictures for CKA
NUM_SHOWN = 6
NUM_AT_RATIOS = 2
RATIOS = (0.5, 0.75, 0.9, 0.95)
NUM_TOKENS = 1024  # of the compared pictures: bounds CKA to 1024 x 1024 Gram matrices
NUM_HEADS = 2
PICTURE_SEED = 0  # not the run's: every run of a page shows the same pictures under the same masks


@dataclass
class Views:
    """Of one run: boards by section, the CKA grid [student blocks, teacher blocks], and for what is missing a sentence why."""

    boards: dict[str, Board] = field(default_factory=dict)
    cka: np.ndarray | None = None
    teacher: str = ""  # whose blocks the grid's columns are
    pairs: list[tuple[int, int]] = field(default_factory=list)  # distilled (student block, teacher block)
    missing: dict[str, str] = field(default_factory=dict)


SECTIONS = ("pictures", "ratios", "cka", "patches", "attention")


def look(record: RunRecord, objective: nn.Module, shape: TeacherShape | None, teachers: Teachers) -> Views:
    """Everything a run's networks show, with its weights loaded into `objective`. Raises nothing that a run can be to blame for."""
    try:
        images, noise = _prepare(record, objective)
    except UserError as error:  # a run under way, or shards that moved: the rest of the page still stands
        return Views(missing=dict.fromkeys(SECTIONS, str(error)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objective, images, noise = objective.to(device).eval(), images.to(device), noise.to(device)
    normalize = Normalize(record.config.data.mean, record.config.data.std).to(device)
    views = Views()
    if objective.reconstructs_pixels:
        views.boards["pictures"] = _reconstructed(objective, images[:NUM_SHOWN], noise[:NUM_SHOWN], normalize)
        views.boards["ratios"] = _reconstructed_at_ratios(
            objective, images[:NUM_AT_RATIOS], noise[:NUM_AT_RATIOS], normalize
        )
    else:
        views.missing |= dict.fromkeys(
            ("pictures", "ratios"), f"{record.config.objective.name} predicts no pixels"
        )
    patches = normalize(patchify(images, objective.student.patch_size))  # [N, L, P, P, 3]
    latent, student = _student_features(objective.student, patches)
    try:
        reference = teachers.of(record, objective, shape, device=device)
    except UserError as error:
        reference, views.missing["cka"] = None, str(error)
    teacher: dict[int, Tensor] = {}
    if reference is not None:
        teacher = reference.features(patches)
        views.teacher, views.pairs = reference.name, list(objective.pairs)
        views.cka = _compare(student, teacher)
        if reference.note:
            views.missing["cka"] = reference.note
    views.boards["patches"] = _coloured(objective, images[:NUM_SHOWN], latent, student, teacher, reference)
    views.boards["attention"] = _attended(objective.student, images[:NUM_SHOWN], patches[:NUM_SHOWN])
    return views


def _prepare(record: RunRecord, objective: nn.Module) -> tuple[Tensor, Tensor]:
    """Load the run's weights and choose the pictures. Raises UserError where either is missing."""
    data, student = record.config.data, objective.student
    if data.val is None:
        raise UserError("data.val is null in the run's config.yaml, so there are no pictures to show")
    shard_set = ShardSet.open(data.val, label="data.val", access=Access.of(data))
    _load_weights(record, objective)
    return choose_pictures(
        shard_set,
        num=NUM_COMPARED,
        seed=PICTURE_SEED,
        img_size=student.grid[0] * student.patch_size,
        num_patches=student.num_patches,
        crop_pct=data.crop_pct,
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
        raise UserError(
            f"the weights don't fit config.yaml ({' '.join(str(error).split())[:160]}); are the files another run's?"
        ) from None


# ---- what the decoder reconstructs


def _reconstructed(objective: nn.Module, images: Tensor, noise: Tensor, normalize: Normalize) -> Board:
    masked, reconstructed = reconstruct(objective, images, noise, normalize)
    return Board(
        [
            ("original", _pictures(images)),
            ("what it saw", _pictures(masked)),
            ("what it reconstructed", _pictures(reconstructed)),
        ]
    )


def _reconstructed_at_ratios(
    objective: nn.Module, images: Tensor, noise: Tensor, normalize: Normalize
) -> Board:
    """Each picture at every ratio: what was seen above what was reconstructed; the first column is the original."""
    total = objective.student.num_patches
    counts = {
        ratio: objective.visible_at(ratio) for ratio in RATIOS if 0 < round(total * (1 - ratio)) < total
    }
    found = [reconstruct(objective, images, noise, normalize, num_visible=count) for count in counts.values()]
    rows = []
    for number, original in enumerate(_pictures(images)):
        for kind, label in enumerate(("seen", "reconstructed")):
            rows.append((label, [original, *(_pictures(pair[kind])[number] for pair in found)]))
    return Board(rows, heads=["original", *(f"{ratio:.0%} masked" for ratio in counts)])


# ---- student beside teacher


@torch.inference_mode()
def _student_features(student: nn.Module, patches: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    """The student on the whole picture: [N, 1 + L, D] after the final norm, and {block: [N, 1 + L, D]} of every block."""
    ids = torch.arange(student.num_patches, device=patches.device).expand(len(patches), -1)
    return student(patches, ids, taps=range(1, student.depth + 1))


def _compare(student: dict[int, Tensor], teacher: dict[int, Tensor]) -> np.ndarray:
    """[student blocks, teacher blocks] of CKA, over the same tokens of both: patches, and CLS where both have it."""
    num_tokens = min(next(iter(student.values())).shape[1], next(iter(teacher.values())).shape[1])
    num_rows = len(student[1]) * num_tokens
    chosen = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))[:NUM_TOKENS].to(
        student[1].device
    )

    def rows(features: dict[int, Tensor]):
        # [N, T, D] -> [N * T, D], a teacher without CLS has the patches alone: both from the end
        return (features[block][:, -num_tokens:].flatten(0, 1)[chosen] for block in sorted(features))

    return cka_grid(rows(student), rows(teacher)).cpu().numpy()


def _coloured(
    objective: nn.Module,
    images: Tensor,
    latent: Tensor,
    student: dict[int, Tensor],
    teacher: dict[int, Tensor],
    reference: Reference | None,
) -> Board:
    """The pictures above their patch features: the student's last, and where there is a teacher the deepest distilled pair."""
    grid = objective.student.grid
    brightness = patchify(images, objective.student.patch_size).float().mean(dim=(-3, -2, -1))  # [N, L]
    rows = [("original", _pictures(images))]
    sources = {"student, last": latent}
    if reference is not None:
        imitating = [mine for mine, theirs in objective.pairs if theirs == reference.tapped]
        sources |= {f"student, block {block}": student[block] for block in imitating[-1:]}
        sources[f"teacher, block {reference.tapped}"] = teacher[reference.tapped]
    for label, tokens in sources.items():
        features = tokens[: len(images), -objective.student.num_patches :].float()
        colours = pca_colours(features.cpu(), brightness.cpu())  # [N, L, 3]
        rows.append((label, list(colours.unflatten(1, grid).numpy())))
    return Board(rows)


def _attended(student: nn.Module, images: Tensor, patches: Tensor) -> Board:
    maps = cls_attention(student, patches, student.depth).cpu()  # [N, heads, L]
    rows = [("original", _pictures(images)), ("all heads", maps.mean(dim=1))]
    rows += [(f"head {head + 1}", maps[:, head]) for head in telling_heads(maps, NUM_HEADS)]
    return Board(
        [
            (
                label,
                found
                if label == "original"
                else [heat_picture(one.numpy()) for one in found.unflatten(1, student.grid)],
            )
            for label, found in rows
        ]
    )


def _pictures(images: Tensor) -> list[np.ndarray]:
    """[N, 3, H, W] -> N times [H, W, 3]."""
    return list(images.movedim(1, -1).cpu().numpy())
