"""Checkpoints: saving, loading, their folder, DeepSpeed's files, resharding, exported student, run lock."""
