"""The recipe: what a run is made of, in plain values. Nothing in this room imports torch."""
