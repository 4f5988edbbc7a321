"""Training: preflight (no torch) -> run (wiring) -> loop, on the DeepSpeed engine."""
