"""Draw the README's figure from quickstart's runs of several seeds: reconstructions, and k-NN of all runs.
python launch/figure.py OUT.png runs/digits-seed0 runs/digits-seed1 runs/digits-seed2
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from dmae_ds.evaluate.results import headline, read_results

RUNS = {"plain MAE": "mae", "distilled (DMAE)": "dmae", "the teacher": "teacher"}
COLOURS = ["#c98500", "#2a78d6", "#8a8a86"]


def main() -> None:
    """Read every seed's k-NN and the first seed's reconstructions; write one PNG."""
    out, *seeds = sys.argv[1:]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), width_ratios=[1.6, 1], layout="constrained")
    reconstructions = plt.imread(Path(seeds[0]) / "dmae" / "comparison-figures" / "pictures-dmae.png")
    left.imshow(reconstructions, interpolation="nearest")
    left.set_axis_off()
    for row, (label, run) in enumerate(RUNS.items()):
        top1 = [newest_knn(Path(seed) / run) for seed in seeds]
        mean = sum(top1) / len(top1)
        right.barh(row, mean, color=COLOURS[row], height=0.6)
        right.plot(top1, [row] * len(top1), "o", color="black", markersize=4)
        right.text(1, row, f"{label}  {mean:.1f}%", va="center", color="white", fontsize=10, weight="bold")
    right.set(yticks=[], xlim=(0, 100), xlabel="k-NN top-1, %")
    right.spines[["top", "right", "left"]].set_visible(False)
    right.set_title(f"students at equal steps; dots: {len(seeds)} seeds", fontsize=10, loc="left")
    figure.savefig(out, dpi=110, facecolor="white")


def newest_knn(run: Path) -> float:
    """The newest k-NN top-1 of a run."""
    return [headline(result) for result in read_results(run) if result["metric"] == "knn"][-1]


if __name__ == "__main__":
    main()
