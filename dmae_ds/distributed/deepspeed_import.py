"""DeepSpeed, imported late (it takes seconds) and quietly, on whatever this machine computes with."""

from __future__ import annotations

import logging
import os

import torch


def import_deepspeed(device: torch.device):
    """The module, once its logger is quiet and, on CPUs, its compiled op is left alone."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if device.type == "cpu":
        # Its shared-memory op takes 40 s to compile and needs a compiler; gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
