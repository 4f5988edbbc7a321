"""Late and quiet import of DeepSpeed, which takes seconds, for the accelerator of this machine."""

from __future__ import annotations

import logging
import os

import torch


def import_deepspeed(device: torch.device):
    """Import DeepSpeed with a quiet logger and, on CPUs, without its compiled op; returns the module."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if device.type == "cpu":
        # Its shared-memory op takes 40 s to compile and requires a compiler; gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
