"""Grids of a teacher and a student: their patches cover the same places of the image.

One mask serves both, so both cut the image into the same rows and columns. At 224 px a /14 teacher has 16x16
patches and a /16 student 14x14; the recipe chooses one of two solutions:

    teacher.img_size=196    the teacher sees 14x14 patches: its positional embedding is fitted to that grid
    student.img_size=256    the student has 16x16 patches of a larger crop

Either way each patch is resized by itself from the student's pixels to the teacher's: no pixel of a masked
neighbour leaks into a visible token, and only patches that are used are resized.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmae_ds.errors import UserError


def check_grids(
    *,
    student_grid: tuple[int, int],
    student_patch: int,
    teacher_grid: tuple[int, int],
    teacher_patch: int,
    section: str = "teacher",
) -> None:
    """Raise UserError unless teacher and student cut the image into the same rows and columns.

    section: the teacher's in the recipe, for the message
    """
    if student_grid == teacher_grid:
        return
    raise UserError(
        f"`{section}` cuts an image into {teacher_grid[0]}x{teacher_grid[1]} patches of {teacher_patch} px, "
        f"the student into {student_grid[0]}x{student_grid[1]} of {student_patch} px, so one mask can't "
        f"serve both; set {section}.img_size={student_grid[0] * teacher_patch} (the teacher sees the same "
        f"crop resized), or student.img_size={teacher_grid[0] * student_patch} (a larger crop for the "
        "student)"
    )


def explain_grids(*, grid: tuple[int, int], student_patch: int, teacher_patch: int) -> str:
    """One line about the grid for the start of a run; empty where both have patches of the same size."""
    if student_patch == teacher_patch:
        return ""
    return (
        f"{grid[0]}x{grid[1]} patches for both: {student_patch} px for the student "
        f"({grid[0] * student_patch} px crop), each resized by itself to {teacher_patch} px for the teacher "
        f"({grid[0] * teacher_patch} px)"
    )


class PatchView(nn.Module):
    """Turn the student's normalised patches into the teacher's: resized, with the teacher's pixel statistics.

    patch_size: the teacher's; mean, std, teacher_mean, teacher_std: one number a channel
    """

    def __init__(self, patch_size: int, *, mean: tuple, std: tuple, teacher_mean: tuple, teacher_std: tuple):
        super().__init__()
        self.patch_size = patch_size
        self.teacher_mean, self.teacher_std = tuple(teacher_mean), tuple(teacher_std)
        self.same_pixels = tuple(mean) == tuple(teacher_mean) and tuple(std) == tuple(teacher_std)
        mean, std, teacher_mean, teacher_std = (
            torch.tensor(values, dtype=torch.float64) for values in (mean, std, teacher_mean, teacher_std)
        )
        self.register_buffer("scale", (std / teacher_std).float(), persistent=False)
        self.register_buffer("shift", ((mean - teacher_mean) / teacher_std).float(), persistent=False)

    def forward(self, patches: Tensor) -> Tensor:
        """Convert patches [N, K, P, P, C] to [N, K, P_t, P_t, C]."""
        if patches.shape[2] != self.patch_size:
            # [N, K, P, P, C] -> [N * K, C, P, P] -> [N * K, C, P_t, P_t] -> [N, K, P_t, P_t, C]
            images = patches.flatten(0, 1).permute(0, 3, 1, 2)
            resized = nn.functional.interpolate(
                images, size=(self.patch_size, self.patch_size), mode="bicubic", antialias=True
            )
            patches = resized.permute(0, 2, 3, 1).unflatten(0, patches.shape[:2])
        return patches if self.same_pixels else torch.addcmul(self.shift, patches, self.scale)
