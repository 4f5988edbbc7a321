"""The earlier place of `open_weights` (now weights/named.py); scripts that import it from here still work."""

from dmae_ds.weights.named import open_weights

__all__ = ["open_weights"]
