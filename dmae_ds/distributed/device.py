"""Names of devices, for results and tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def device_name(device: torch.device) -> str:
    """Name of a GPU, or "cpu"."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def hardware_name(device: torch.device) -> str:
    """Name of a GPU or of the processor; "cpu" where the system does not give one."""
    return device_name(device) if device.type == "cuda" else processor_name() or device.type


def processor_name() -> str | None:
    """Name of the processor; None where the system does not give one."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return None
