"""Draw the pictures of the pages from the CSV files in benchmarks/results: python benchmarks/report/pictures.py.

Each picture is written beside the CSV file of its name. The FLOPs in results.png are counted by running the networks.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common.chosen import chosen
from benchmarks.common.names import DENSE, DENSE_ARM, REFERENCES
from benchmarks.common.rows import RESULTS, groups, read_csv
from benchmarks.common.trained_networks import CHANNELS, SIZE, drawn, trained
from benchmarks.report.start_tables import SHOWN

COLOURS = {
    "cp": "#3b6fb6", "tucker": "#d9822b", "tt": "#8a5fb0", "tt-chain": "#4f9d69", "tr": "#c0504d", "btt": "#7f7f7f",
}  # fmt: skip
OTHERS = {"dense": "#111111", "ht": "#b8a13a", "blocktt": "#5bb1b5"}
MARKERS = "os^Dvp"

Rows = list[dict[str, str]]


def draw(axes: Axes, rows: Rows, rival: str, title: str) -> None:
    """Draw our time over a rival's against the keep ratio, one dot per row."""
    for family, colour in COLOURS.items():
        chosen = [row for row in rows if row["family"] == family and row[rival]]
        if chosen:
            kept = [float(row["keep_ratio"]) for row in chosen]
            ratios = [float(row["auto"]) / float(row[rival]) for row in chosen]
            axes.scatter(kept, ratios, s=18, color=colour, alpha=0.75, lw=0, label=family)
    axes.axhline(1, color="#444444", lw=0.8)
    axes.set(xscale="log", yscale="log", xlabel="keep ratio", title=title)
    plain(axes)


def plain(axes: Axes) -> None:
    """Set a light grid behind the points, and remove two spines."""
    axes.grid(color="#e8e8e8", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def speed(rows: Rows) -> Figure:
    """Draw our time over the dense layer's and the peers', one dot per row."""
    training = [row for row in rows if row["mode"] == "train"]
    figure = Figure(figsize=(9, 7), dpi=140, layout="constrained")
    panels = figure.subplots(2, 2).flat
    draw(panels[0], [row for row in training if row["batch"] == "32"], "dense", "/ dense, training, batch 32")
    draw(panels[1], [row for row in training if row["batch"] == "1"], "dense", "/ dense, training, batch 1")
    draw(panels[2], rows, "tednet", "/ tednet, all rows")
    draw(panels[3], rows, "tltorch", "/ tensorly-torch, all rows")
    panels[0].set_ylabel("our time over theirs")
    panels[2].set_ylabel("our time over theirs")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def compress(rows: Rows) -> Figure:
    """Draw test accuracy after fine-tuning against parameters and latency. Colours are formats, markers networks."""
    tuned = [row for row in rows if row["split"] == "test" and row["accuracy_after"]]
    markers = dict(zip(dict.fromkeys(row["weights"] for row in tuned), MARKERS, strict=False))
    figure = Figure(figsize=(11, 4.2), dpi=140, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for row in tuned:
        latency = float(row["dense_ms_32"]) * (1 if row["format"] == "dense" else float(row["latency_32"]))
        style = {"color": (COLOURS | OTHERS)[row["format"]], "marker": markers[row["weights"]], "alpha": 0.8, "lw": 0}
        for axes, x in zip(panels, (int(row["parameters"]), latency), strict=True):
            axes.scatter(x, 100 * float(row["accuracy_after"]), s=30, **style)
    for axes, label in zip(panels, ("parameters", "milliseconds for 32 images"), strict=True):
        axes.set(xscale="log", xlabel=label)
        plain(axes)
    panels[0].set_ylabel("test accuracy after the fine-tune, %")
    for family in dict.fromkeys(row["format"] for row in tuned):
        panels[1].scatter([], [], color=(COLOURS | OTHERS)[family], s=30, lw=0, label=family)
    for network, marker in markers.items():
        panels[1].scatter([], [], color="#aaaaaa", marker=marker, s=30, lw=0, label=network)
    panels[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def results(rows: Rows) -> Figure:
    """Draw CIFAR-10 test accuracy against parameters, FLOPs and latency. Colours are formats, markers networks."""
    shown = trained(rows)
    times = {
        (row["model"], row["conv"], row["rank"]): float(row["ms"])
        for row in (read_csv(RESULTS / "latency.csv") if (RESULTS / "latency.csv").exists() else ())
        if row["batch"] == "32"
    }
    markers = dict(zip(dict.fromkeys(row["model"] for row in shown), MARKERS, strict=False))
    figure = Figure(figsize=(14, 4.2), dpi=140, layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    labels = "parameters", "FLOPs of one image, as the plan runs them", "milliseconds for 32 images"
    for (model, conv), runs in groups(shown, "model", "conv"):
        style = {"color": (COLOURS | OTHERS)[conv], "marker": markers[model], "ms": 5, "lw": 1.2, "alpha": 0.85}
        sizes, counts = [float(row["parameters"]) for row in runs], [float(flops(row)) for row in runs]
        waits = [times.get((model, conv, row["rank"]), math.nan) for row in runs]  # not drawn where not measured
        for axes, x in zip(panels, (sizes, counts, waits), strict=True):
            axes.plot(*zip(*sorted(_means(x, runs).items()), strict=True), **style)
    for axes, label in zip(panels, labels, strict=True):
        axes.set(xscale="log", xlabel=label)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.xaxis.set_minor_formatter(NullFormatter())
        plain(axes)
    panels[0].set_ylabel("test accuracy, %")
    for conv in dict.fromkeys(row["conv"] for row in shown):
        panels[2].plot([], [], color=(COLOURS | OTHERS)[conv], lw=1.2, label=conv)
    for model, marker in markers.items():
        panels[2].plot([], [], color="#aaaaaa", marker=marker, ms=5, lw=0, label=model)
    panels[2].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _means(x: Sequence[float], runs: Rows) -> dict[float, float]:
    """Return the accuracy in percent, averaged over seeds, by x value."""
    found: dict[float, list[float]] = {}
    for value, row in zip(x, runs, strict=True):
        found.setdefault(value, []).append(100 * float(row["accuracy"]))
    return {value: statistics.fmean(accuracies) for value, accuracies in found.items()}


def flops(row: dict[str, str]) -> int:
    """Return the FLOPs per image of a training forward pass, with the batch size of the training."""
    model, batch = drawn(row), int(row["batch_size"])
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(batch, CHANNELS, SIZE, SIZE))
    return int(counter.get_total_flops() // batch)


def depth(rows: Rows) -> Figure:
    """Draw signal and gradient in the deepest zero-padded networks: a panel per format, a line per initialisation."""
    deepest = max(int(row["depth"]) for row in rows if row["depth"])
    chosen = [row for row in rows if row["depth"] == str(deepest) and row["border"] == "zeros"]
    networks = [name for name in dict.fromkeys(row["network"] for row in chosen) if name != "dense"]
    figure = Figure(figsize=(13, 5), dpi=140, layout="constrained")
    panels = figure.subplots(2, len(networks), sharex=True, sharey=True, squeeze=False)
    for column, network in enumerate(networks):
        for init, colour in zip(INITS, COLOURS.values(), strict=True):
            lines = [row for row in chosen if row["network"] == network and row["init"] == init]
            _lines(panels[:, column], lines, color=colour, lw=1.4, label=SHOWN[init].strip("`"))
        _lines(panels[:, column], [row for row in chosen if row["network"] == "dense" and row["init"] == "default"],
               color="#111111", lw=1, ls=":", label="dense, He")  # fmt: skip
        panels[0, column].set_title(network, fontsize=9)
        panels[1, column].set_xlabel("layer")
    panels[0, 0].set(ylabel="log E[h²] behind it", ylim=(-25, 12))
    panels[1, 0].set_ylabel("log E[g²] in front of it")
    panels[1, -1].legend(frameon=False, fontsize=7, loc="lower right")
    return figure


def convergence(rows: Rows) -> Figure:
    """Draw test accuracy by start: a row of panels per network, a column per data set, one dot per format."""
    reached = [choice for choice in chosen(rows) if choice["accuracy"] is not None]
    formats = [choice for choice in reached if choice["family"] not in REFERENCES]
    starts = [start for start in SHOWN if any(choice["arm"] == start for choice in formats)]
    datasets, networks = ([*dict.fromkeys(choice[key] for choice in reached)] for key in ("dataset", "network"))
    figure = Figure(figsize=(13, 8), dpi=140, layout="constrained")
    panels = figure.subplots(len(networks), len(datasets), sharex=True, squeeze=False)
    for axes, (network, dataset) in zip(panels.flat, product(networks, datasets), strict=True):
        here = [choice for choice in reached if (choice["network"], choice["dataset"]) == (network, dataset)]
        for place, (family, colour) in enumerate(COLOURS.items()):
            dots = [choice for choice in here if choice["family"] == family and choice["arm"] in starts]
            x = [starts.index(choice["arm"]) + (place - 2.5) / 10 for choice in dots]
            style = {"s": 20, "color": colour, "lw": 0, "label": family if dots else None}
            axes.scatter(x, [100 * choice["accuracy"] for choice in dots], **style)
        dense = [100 * one["accuracy"] for one in here if (one["family"], one["arm"]) == (DENSE, DENSE_ARM)]
        axes.axhline(*dense, color="#111111", lw=1, ls=":", label="dense, He")
        axes.set(title=f"{network}, {dataset}", ylim=(-4, 108 * max(choice["accuracy"] for choice in here)))
        axes.set_xticks(range(len(starts)), [SHOWN[start].strip("`") for start in starts], rotation=40, ha="right")
        plain(axes)
    for axes in panels[:, 0]:
        axes.set_ylabel("test accuracy, %")
    panels[0, -1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


INITS = ("default", "paper", "kaiming", "xavier", "tednet", "calibrated")


def _lines(panels: Sequence[Axes], rows: Rows, **style: Any) -> None:
    for axes, name in zip(panels, ("forward", "backward"), strict=True):
        shown = [row for row in rows if row[name]]
        axes.plot([int(row["layer"]) for row in shown], [float(row[name]) for row in shown], **style)
        plain(axes)


FIGURES = {"speed": speed, "compress": compress, "depth": depth, "convergence": convergence, "results": results}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    for name, figure in FIGURES.items():
        path = RESULTS / f"{name}.csv"
        if path.exists():
            figure(read_csv(path)).savefig(path.with_suffix(".png"))


if __name__ == "__main__":
    main()
