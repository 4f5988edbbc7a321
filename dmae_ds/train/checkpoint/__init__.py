"""What a run keeps on disk: saving and loading, the folder of checkpoints, DeepSpeed's files, resharding, the run's lock."""
