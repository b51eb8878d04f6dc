"""Draw benchmarks/results/speed.png from speed.csv: python benchmarks/plots.py."""

import argparse

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from provenance import REPOSITORY, read_csv

RESULTS = REPOSITORY / "benchmarks" / "results"
COLOURS = {
    "cp": "#3b6fb6", "tucker": "#d9822b", "tt": "#8a5fb0", "tt-chain": "#4f9d69", "tr": "#c0504d", "btt": "#7f7f7f",
}  # fmt: skip


def draw(axes: Axes, rows: list[dict[str, str]], rival: str, title: str) -> None:
    """Our time over another's against the keep ratio, a dot per row."""
    for family, colour in COLOURS.items():
        chosen = [row for row in rows if row["family"] == family and row[rival]]
        if chosen:
            kept = [float(row["keep_ratio"]) for row in chosen]
            ratios = [float(row["auto"]) / float(row[rival]) for row in chosen]
            axes.scatter(kept, ratios, s=18, color=colour, alpha=0.75, lw=0, label=family)
    axes.axhline(1, color="#444444", lw=0.8)
    axes.set(xscale="log", yscale="log", xlabel="keep ratio", title=title)
    axes.grid(color="#e8e8e8", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = read_csv(RESULTS / "speed.csv")
    training = [row for row in rows if row["mode"] == "train"]
    figure = Figure(figsize=(13, 4.2), dpi=140, layout="constrained")
    panels = figure.subplots(1, 4)
    draw(panels[0], [row for row in training if row["batch"] == "32"], "dense", "/ dense, training, batch 32")
    draw(panels[1], [row for row in training if row["batch"] == "1"], "dense", "/ dense, training, batch 1")
    draw(panels[2], rows, "tednet", "/ tednet, all rows")
    draw(panels[3], rows, "tltorch", "/ tensorly-torch, all rows")
    panels[0].set_ylabel("our time over theirs")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(RESULTS / "speed.png")


if __name__ == "__main__":
    main()
