"""Samples: the shard format, the order they are read in, and the batches made of them."""
