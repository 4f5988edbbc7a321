"""dmae-ds: distil large frozen vision transformers into small ones while pre-training (DMAE, CVPR 2023)."""

__version__ = "0.1.0"
