"""The networks: what a patch is, which ones stay, the encoder that sees only those, the decoder that reconstructs the rest."""
