"""Recipes: schemas with plain values, and the files that hold them. Nothing here imports torch."""
