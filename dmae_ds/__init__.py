"""dmae-ds: distil large frozen vision transformers into small ones while pre-training (DMAE, CVPR 2023).

In Python, each as the command of its name, and imported when it is first used:

    import dmae_ds

    run = dmae_ds.distill(images="photos", teacher="teacher.safetensors", student="vit_small_patch16_224")
    model = dmae_ds.load_student(run)    # a timm VisionTransformer in eval mode
    folder = dmae_ds.export(run, to="timm")
    run = dmae_ds.train("digits_dmae", {"optim.epochs": 8})
"""

import importlib
import os

__version__ = "0.1.0"
__all__ = ["distill", "export", "load_student", "train"]

if os.environ.get("DMAE_DS_DEVICE") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything looks for GPUs


def __getattr__(name: str) -> object:
    """Import a public function. Those with the name of a room are the room (output/callable_room.py)."""
    if name == "load_student":
        return importlib.import_module("dmae_ds.evaluate.features").load_student
    if name in __all__:
        return importlib.import_module(f"dmae_ds.{name}")
    raise AttributeError(f"module 'dmae_ds' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
