"""Stand-ins for plain data that trainers pickle next to their weights; its classes are never imported or run.

Lightning's hyper-parameters, omegaconf's configs, numpy's scalars and paths are not needed to read tensors,
but torch.load with weights_only=True refuses a file that names their classes. Such a name gets a stand-in
that only holds what it was given. Any other name is refused: os.system, or a class of unknown origin.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

# Modules whose classes hold settings and numbers, by the first part of their name.
_PLAIN_MODULES = (
    *("addict", "collections", "datetime", "decimal", "deepspeed", "easydict", "fractions", "lightning"),
    *("lightning_fabric", "lightning_utilities", "ml_collections", "mmcv", "mmengine", "numpy", "omegaconf"),
    *("pathlib", "pytorch_lightning", "timm", "transformers", "typing", "uuid", "yacs"),
)
_BUILTINS = ("bool", "complex", "dict", "float", "int", "list", "set", "str", "tuple")
# Classes that are filled like a dict while they are read.
_DICTS = ("AttributeDict", "CfgNode", "EasyDict", "ConfigDict", "defaultdict")


class StandIn:
    """Takes any arguments and any state, and holds them; it does nothing."""

    def __new__(cls, *args: object) -> StandIn:
        made = super().__new__(cls)
        made.held = [*args]
        return made

    def __init__(self, *args: object):
        pass

    def __setstate__(self, state: object) -> None:
        self.held.append(state)


class _DictStandIn:
    """Makes a plain dict where the file makes one of another class."""

    def __new__(cls, *args: object) -> dict:
        return {}


def allowed_globals(path: Path) -> list:
    """What `torch.serialization.safe_globals` gets for a file: argparse.Namespace, and stand-ins by name."""
    allowed: list = [argparse.Namespace]
    for name in torch.serialization.get_unsafe_globals_in_checkpoint(path):
        module, attribute = name.split(".")[0], name.split(".")[-1]
        if module in _PLAIN_MODULES or (module == "builtins" and attribute in _BUILTINS):
            allowed.append((_DictStandIn if attribute in _DICTS else StandIn, name))
    return allowed
