"""Predictions of memory and time on machines that are not here, and the choice of a teacher's placement."""
