"""A page about one run or several: facts, losses, health of the features, throughput and views of images.

    dmae-ds report RUN [RUN ...] [--out page.html]

The page is one file without scripts or requests and follows the reader's light or dark mode. Its figures are
also written as PNG files into the first run's `figures/`.
"""

from dmae_ds.report.write import name_runs, write_report

__all__ = ["name_runs", "write_report"]
