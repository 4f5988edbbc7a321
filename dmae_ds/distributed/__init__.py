"""Processes that train together: the process group, this rank, missing ranks, how ranks meet."""
