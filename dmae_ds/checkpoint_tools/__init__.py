"""dmae-ds checkpoint: look at a run's checkpoints, check them to the last byte, convert them for others."""
