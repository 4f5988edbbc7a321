"""RESULTS.md: the papers' tables row by row beside what this project's own runs gave, and the study's table."""
