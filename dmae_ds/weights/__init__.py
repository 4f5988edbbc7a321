"""Vision transformers' weight files: containers of bytes, formats of names, whether a file fits a network, the hub."""
