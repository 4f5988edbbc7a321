"""The shard tool `dmae-shards`: image folders in, WebDataset tars with an index out."""
