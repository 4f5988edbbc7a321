"""--max-skip: above it the command goes on and fails at its end, so that the whole number is told at once."""

import sys


class SkipLimit:
    """Tells once, as soon as more is skipped than --max-skip allows, that the rest is only counted."""

    def __init__(self, max_skip: int):
        self.max_skip, self.is_told = max_skip, False

    def check(self, skipped: list[dict]) -> None:
        """Print one line the first time that `skipped` has too many entries."""
        if self.is_told or len(skipped) <= self.max_skip:
            return
        self.is_told = True
        from tqdm import tqdm  # takes 50 ms

        tqdm.write(
            f"{len(skipped):,} files cannot be used so far, first {skipped[0]['source']!r} "
            f"({skipped[0]['reason']}), and --max-skip allows {self.max_skip:,}; going on to find them all",
            file=sys.stdout,
        )
