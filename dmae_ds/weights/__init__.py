"""Weights files of vision transformers: kinds of files, formats of names, whether a file fits a network, the hub."""
