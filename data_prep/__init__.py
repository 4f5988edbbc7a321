"""Shard tool `dmae-shards`, which converts image folders to WebDataset tars with an index."""
