"""Segmentation and detection on a plain ViT: training, evaluation and distillation (on accelerate)."""
