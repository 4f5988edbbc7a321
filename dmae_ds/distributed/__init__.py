"""Processes that train together: the process group, which rank this is, who is missing, how ranks meet."""
