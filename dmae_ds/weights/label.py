"""Keys that messages about a weights file name: the key that set the file, and those that make it fit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Label:
    """Keys of one place in a recipe that names a weights file.

    weights: the key that holds the path or hub id, such as `teacher.weights`
    network: what the file has to fit, in words; name: the key that names it in timm
    format: the key of the file's format; None where there is none and the format is always found
    img_size: the key of the image size; None where there is none
    """

    weights: str
    network: str = "network"
    name: str = "network.name"
    format: str | None = None
    img_size: str | None = None

    def set_format(self, *formats: str) -> str:
        """Advice to try these formats; empty where no key sets one."""
        return f"try {self.format}={' or '.join(formats)}" if self.format and formats else ""

    def keys(self) -> str:
        """The keys that decide whether a file fits: "teacher.name and teacher.format"."""
        return self.name if self.format is None else f"{self.name} and {self.format}"


WEIGHTS = Label("weights", format="format", img_size="network.img_size")


def of_teacher(section: str) -> Label:
    """Keys of a teacher's section: `teacher`, or `teachers.dino` of one of several."""
    keys = (f"{section}.{key}" for key in ("name", "format", "img_size"))
    return Label(f"{section}.weights", "teacher", *keys)


TEACHER = of_teacher("teacher")
STUDENT = Label("student.weights", "student", "student.name", img_size="student.img_size")
# The fine-tuned classifier that distils into another one (`dmae-ds eval finetune`).
CLASSIFIER = Label("distill.teacher", "classifier", "distill.name", "distill.format", "network.img_size")


def of_student(name: str) -> Label:
    """Keys of one student of a family; those of `student` for the name ""."""
    if not name:
        return STUDENT
    section = f"students.{name}"
    return Label(f"{section}.weights", "student", f"{section}.name", img_size=f"{section}.img_size")
