"""Weights files of vision transformers: kinds of files, formats of names, fit to a network, the hub."""
