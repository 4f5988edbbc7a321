"""Evaluation of a trained student: frozen features (k-NN, probe), reconstructions, and the facts of a run."""
