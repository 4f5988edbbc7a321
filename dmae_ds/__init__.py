"""dmae-ds: distil large frozen vision transformers into small ones while pre-training (DMAE, CVPR 2023)."""

import os

__version__ = "0.1.0"

if os.environ.get("DMAE_DS_DEVICE") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything looks for GPUs
