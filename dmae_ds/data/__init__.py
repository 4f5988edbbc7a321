"""Shard folders, the order of their samples, and the batches that are read from them."""
