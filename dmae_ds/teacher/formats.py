"""The earlier place of `open_weights`; it belongs to weights/named.py, and scripts that import it here work."""

from dmae_ds.weights.named import open_weights

__all__ = ["open_weights"]
