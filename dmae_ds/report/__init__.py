"""One page about one run or several: what they are, how they learned, whether they are healthy, what they see.

    dmae-ds report RUN [RUN ...] [--out page.html]

The page needs nothing but itself (no script, no request) and follows the reader's light or dark mode. Its
figures lie as PNG in the first run's `figures/`.
"""

from dmae_ds.report.write import name_runs, write_report

__all__ = ["name_runs", "write_report"]
