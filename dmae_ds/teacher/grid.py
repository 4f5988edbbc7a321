"""Where a teacher's patches and a student's must be the same places of the picture."""

from __future__ import annotations

from dmae_ds.errors import UserError


def check_grids(*, student_grid: tuple[int, int], student_patch: int, teacher_grid: tuple[int, int], teacher_patch: int) -> None:
    """Raise UserError unless teacher and student cut the same picture into the same patches."""
    if student_grid == teacher_grid and student_patch == teacher_patch:
        return
    raise UserError(
        f"the teacher cuts a picture into {teacher_grid[0]}x{teacher_grid[1]} patches of {teacher_patch} px, the student into "
        f"{student_grid[0]}x{student_grid[1]} of {student_patch} px, so their masks can't agree; "
        f"set student.patch_size={teacher_patch} student.img_size={teacher_grid[0] * teacher_patch}, or take a teacher with {student_patch} px patches"
    )
