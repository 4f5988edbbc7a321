"""Exports of a student: written in another library's layout, loaded back with it, compared, described."""
