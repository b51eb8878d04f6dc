"""Draw the pictures of the pages from the CSV files in benchmarks/results: python benchmarks/report/pictures.py.

PICTURES names them and their files. The FLOPs in results.png are counted by running the networks. `training/demo.py`
draws demo.png.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
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
from benchmarks.report.drawing import ALL_COLOURS, COLOURS, DENSE_COLOUR, MARKERS, key, legend, plain, sheet, ticks
from benchmarks.report.markdown import by
from benchmarks.report.published import EVERY
from benchmarks.report.start_tables import SHOWN
from benchmarks.report.training_tables import check_recipe

Rows = list[dict[str, str]]


def speed(rows: Rows) -> Figure:
    """Draw our time over the dense layer's and the peers': a small dot per row, a large one per format and rank."""
    training = [row for row in rows if row["mode"] == "train"]
    figure = sheet(6.6)
    panels = figure.subplots(2, 2, sharex=True).flat
    panels[1].sharey(panels[0])
    for axes, batch in zip(panels, ("32", "1"), strict=False):
        title = f"time over the dense layer's,\ntraining, batch {batch}"
        _ratios(axes, [row for row in training if row["batch"] == batch], "dense", title)
    _ratios(panels[2], rows, "tednet", "time over tednet's,\nall rows")
    _ratios(panels[3], rows, "tltorch", "time over tensorly-torch's,\nall rows")
    for axes in figure.axes:
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    for axes in panels[::2]:
        axes.set_ylabel("ours over theirs")
    entries = [key(family, colour, marker="o", ms=7) for family, colour in COLOURS.items()]
    legend(figure, [*entries, key("a row", marker=".", ms=5), key("median of a rank", marker="o", ms=7)], 4)
    return figure


def _ratios(axes: Axes, rows: Rows, rival: str, title: str) -> None:
    """Draw our time over a rival's against the keep ratio, with the medians of each format's ranks."""
    for family, colour in COLOURS.items():
        medians = []
        for _, runs in by([row for row in rows if row["family"] == family and row[rival]], "rank"):
            kept = [float(row["keep_ratio"]) for row in runs]
            ratios = [float(row["auto"]) / float(row[rival]) for row in runs]
            axes.scatter(kept, ratios, s=7, color=colour, alpha=0.55, lw=0)
            medians.append((statistics.median(kept), statistics.median(ratios)))
        if medians:
            style = {"marker": "o", "ms": 7, "mec": "white", "mew": 0.8, "lw": 1.5, "zorder": 3}
            axes.plot(*zip(*sorted(medians), strict=True), color=colour, **style)
    axes.axhline(1, color="#444444", lw=1)
    axes.set(xscale="log", yscale="log", xlabel="keep ratio")
    axes.set_title(title, fontsize=10)
    axes.xaxis.set_tick_params(labelbottom=True)
    ticks(axes, (0.01, 0.1, 1, 10))
    plain(axes)


def compress(rows: Rows) -> Figure:
    """Draw test accuracy after fine-tuning against parameters and time: a row of panels per network."""
    tuned = [row for row in rows if row["split"] == "test" and row["accuracy_after"] and row["format"] != DENSE]
    keeps = sorted({row["keep"] for row in tuned}, key=float, reverse=True)
    networks = [*by(tuned, "weights")]
    figure = sheet(0.9 + 2.9 * len(networks))
    panels = figure.subplots(len(networks), 2, sharey="row", squeeze=False)
    for pair, (network, some) in zip(panels, networks, strict=True):
        for family, runs in by(some, "format"):
            y = [100 * float(row["accuracy_after"]) for row in runs]
            sizes = [int(row["parameters"]) / 1000 for row in runs]
            for axes, x in zip(pair, (sizes, [float(row["latency_32"]) for row in runs]), strict=True):
                axes.plot(x, y, color=ALL_COLOURS[family], lw=1.2)
                for left, up, row in zip(x, y, runs, strict=True):
                    axes.plot(left, up, MARKERS[keeps.index(row["keep"])], color=ALL_COLOURS[family], ms=6)
        dense = int(some[0]["dense_parameters"]) / 1000, 1.0
        for axes, x in zip(pair, dense, strict=True):
            axes.plot(x, 100 * float(some[0]["accuracy_dense"]), "*", color=DENSE_COLOUR, ms=11)
            axes.axhline(100 * float(some[0]["accuracy_dense"]), color=DENSE_COLOUR, lw=1, ls=":")
            plain(axes)
        pair[0].set(xlabel="parameters, thousands", ylabel=f"{network}: test accuracy\nafter the fine-tune, %")
        pair[0].set_xlim(0, None)
        pair[1].set_xlabel("time over dense, 32 images")
    formats = [key(family, ALL_COLOURS[family]) for family, _ in by(tuned, "format")]
    legend(figure, [*formats, *(key(f"keep {keep}", marker=MARKERS[keeps.index(keep)]) for keep in keeps),
                    key("dense", DENSE_COLOUR, marker="*", ms=11)], 5)  # fmt: skip
    return figure


TUNED = {"ms": 7, "mec": "#111111", "mew": 0.9, "lw": 0}  # markers of networks that were fine-tuned
LOWEST = 85  # per cent: published accuracies below are in the table alone


def results(rows: Rows) -> Figure:
    """Draw CIFAR-10 test accuracy against parameters, FLOPs and latency. Colours are formats, markers networks.

    Beside parameters are also the fine-tuned networks of compress.csv, and published accuracies.
    """
    check_recipe(rows)
    shown = trained(rows)
    times = {
        (row["model"], row["conv"], row["rank"]): float(row["ms"]) for row in _others("latency") if row["batch"] == "32"
    }
    markers = dict(zip(dict.fromkeys(row["model"] for row in shown), MARKERS, strict=False))
    figure = sheet(6.4)
    *panels, corner = figure.subplots(2, 2, sharey=True).flat
    labels = "parameters", "FLOPs of one image,\nas the plan runs them", "milliseconds for 32 images"
    for (model, conv), runs in groups(shown, "model", "conv"):
        style = {"color": ALL_COLOURS[conv], "marker": markers[model], "ms": 5, "lw": 1.2, "alpha": 0.85}
        sizes, counts = [float(row["parameters"]) for row in runs], [float(flops(row)) for row in runs]
        waits = [times.get((model, conv, row["rank"]), math.nan) for row in runs]  # not drawn where not measured
        for axes, x in zip(panels, (sizes, counts, waits), strict=True):
            axes.plot(*zip(*sorted(_means(x, runs).items()), strict=True), **style)
    whole = {row["model"]: int(row["dense_parameters"]) for row in shown}
    tuned = [
        row
        for row in _others("compress")
        if row["weights"] in whole and row["split"] == "test" and row["accuracy_after"]
    ]
    for row in tuned:
        style = {"color": ALL_COLOURS[row["format"]], "marker": markers[row["weights"]]}
        panels[0].plot(int(row["parameters"]), 100 * float(row["accuracy_after"]), **style | TUNED)
    others = [one for one in EVERY if one.model in whole and one.accuracy > LOWEST]
    for other in others:
        style = {"color": "#555555", "marker": markers[other.model], "fillstyle": "full" if other.trained else "none"}
        panels[0].plot(whole[other.model] / other.ratio, other.accuracy, ms=5, lw=0, alpha=0.7, **style)
    for axes, label in zip(panels, labels, strict=True):
        axes.set(xscale="log", xlabel=label)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.xaxis.set_minor_formatter(NullFormatter())
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0.45 * high), 1.1 * high)  # a tick at least where the points lie close
        plain(axes)
    ticks(panels[2], (25, 30, 40, 50, 60))
    for axes in panels[::2]:
        axes.set_ylabel("test accuracy, %")
    corner.remove()
    names = dict.fromkeys([*(row["conv"] for row in shown), *(row["format"] for row in tuned)])
    formats = [key(conv, ALL_COLOURS[conv]) for conv in names]
    networks = [key(model, marker=marker) for model, marker in markers.items()]
    kinds = [key("fine-tuned", marker="o", **TUNED)] if tuned else []
    styles = {"published": "none", "published, fine-tuned": "full"}
    for (name, style), some in zip(styles.items(), (False, True), strict=True):
        if any(other.trained == some for other in others):
            kinds.append(key(name, "#555555", marker="o", fillstyle=style))
    entries = [*formats, *networks, *kinds]
    figure.legend(handles=entries, frameon=False, loc="center", bbox_to_anchor=(0.77, 0.27), ncols=2, fontsize=9)
    return figure


def _others(name: str) -> Rows:
    """Return the rows of another results file, if it is there."""
    path = RESULTS / f"{name}.csv"
    return read_csv(path) if path.exists() else []


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


INITS = ("default", "paper", "kaiming", "xavier", "tednet", "calibrated")


def depth(rows: Rows) -> Figure:
    """Draw signal and gradient in the deepest zero-padded networks: a row per format, a line per initialisation."""
    deepest = max(int(row["depth"]) for row in rows if row["depth"])
    chosen = [row for row in rows if row["depth"] == str(deepest) and row["border"] == "zeros"]
    networks = [name for name in dict.fromkeys(row["network"] for row in chosen) if name != "dense"]
    figure = sheet(1.2 + 1.75 * len(networks))
    panels = figure.subplots(len(networks), 2, sharex=True, sharey=True, squeeze=False)
    dense = {"color": DENSE_COLOUR, "lw": 1.5, "ls": ":"}
    for pair, network in zip(panels, networks, strict=True):
        for init, colour in zip(INITS, COLOURS.values(), strict=True):
            lines = [row for row in chosen if row["network"] == network and row["init"] == init]
            _lines(pair, lines, color=colour, lw=1.6)
        _lines(pair, [row for row in chosen if row["network"] == "dense" and row["init"] == "default"], **dense)
        pair[0].set_ylabel(network)
        pair[0].set(yscale="log", ylim=(1e-11, 1e6), yticks=[1e-10, 1e-5, 1, 1e5])
        pair[0].yaxis.set_minor_formatter(NullFormatter())
    panels[0, 0].set_title("second moment of the signal\nafter layer k", fontsize=10)
    panels[0, 1].set_title("second moment of the gradient\nbefore layer k", fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("layer k")
    entries = [key(SHOWN[init].strip("`"), colour) for init, colour in zip(INITS, COLOURS.values(), strict=True)]
    legend(figure, [*entries, key("dense, He's rule", DENSE_COLOUR, ls=":")], 3)
    return figure


def _lines(panels: Sequence[Axes], rows: Rows, **style: Any) -> None:
    """Draw second moments by layer. The files have their natural logarithms."""
    for axes, name in zip(panels, ("forward", "backward"), strict=True):
        shown = [row for row in rows if row[name]]
        axes.plot([int(row["layer"]) for row in shown], [math.exp(float(row[name])) for row in shown], **style)
        plain(axes)


def convergence(rows: Rows, network: str) -> Figure:
    """Draw the test accuracies of a network: a panel per set of images, a line per start, one dot per format.

    A line through a dot is the standard error over seeds, where there is one.
    """
    reached = [one for one in chosen([row for row in rows if row["network"] == network]) if one["accuracy"] is not None]
    formats = [one for one in reached if one["family"] not in REFERENCES]
    starts = [start for start in SHOWN if any(one["arm"] == start for one in formats)]
    families = [family for family in COLOURS if any(one["family"] == family for one in formats)]
    datasets = dict.fromkeys(one["dataset"] for one in reached)
    figure = sheet(0.7 + 2.7 * len(datasets))
    for axes, dataset in zip(figure.subplots(len(datasets), squeeze=False).flat, datasets, strict=True):
        edge = axes.get_yaxis_transform()  # x as a share of the panel: accuracy 0 would leave no room for the others
        for one in formats:
            if one["dataset"] == dataset and one["arm"] in starts:
                place = families.index(one["family"])
                y = starts.index(one["arm"]) + 0.14 * (place - (len(families) - 1) / 2)
                style = {"color": COLOURS[one["family"]], "elinewidth": 1.2}
                if one["accuracy"]:
                    error = 100 * (one["error"] or 0)
                    axes.errorbar(100 * one["accuracy"], y, xerr=error, fmt="o", ms=4.5, **style)
                else:
                    axes.errorbar(0.02, y, fmt="X", ms=7, transform=edge, **style)
        for one in reached:
            if (one["dataset"], one["family"], one["arm"]) == (dataset, DENSE, DENSE_ARM):
                axes.axvline(100 * one["accuracy"], color=DENSE_COLOUR, lw=1.5, ls=":")
        axes.set_yticks(range(len(starts)), [SHOWN[start].strip("`") for start in starts])
        axes.set(ylim=(len(starts) - 0.5, -0.5), xlabel=f"test accuracy on {dataset}, %")
        plain(axes)
        axes.grid(visible=False, axis="y")
        for place in range(1, len(starts)):
            axes.axhline(place - 0.5, color="#e0e0e0", lw=0.6, zorder=0)
    entries = [key(family, COLOURS[family], marker="o") for family in families]
    lost = [key("every run diverged", marker="X", ms=7)] * any(one["accuracy"] == 0 for one in formats)
    legend(figure, [*entries, key("dense, He's rule", DENSE_COLOUR, ls=":"), *lost], 4)
    return figure


def scale(rows: Rows) -> Figure:
    """Draw the megabytes that a process sends in a step: a panel per number of processes, a line per format."""
    kinds = [*dict.fromkeys(row["conv"] for row in rows)]
    ways = dict(zip(dict.fromkeys(row["way"] for row in rows), MARKERS, strict=False))
    colours = dict(zip(ways, (COLOURS["cp"], COLOURS["tucker"]), strict=True))
    processes = [*by(rows, "processes")]
    figure = sheet(3.3)
    panels = figure.subplots(1, len(processes), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (number, some) in zip(panels, processes, strict=True):
        for row in some:
            x, y = float(row["sent"]) / 1e6, kinds.index(row["conv"])
            axes.plot(x, y, ways[row["way"]], color=colours[row["way"]], ms=7)
            if row["conv"] == DENSE:
                axes.axvline(x, color=colours[row["way"]], lw=1, ls=":", zorder=0)
        axes.set(xscale="log", xlabel="MB sent in a step")
        axes.set_title(f"{int(number):,} processes", fontsize=10)
        plain(axes)
    ticks(panels[0], (10, 100, 1000, 10_000), "{:,}")
    panels[0].set_xlim(20, 20_000)
    panels[0].set_yticks(range(len(kinds)), kinds)
    panels[0].set_ylim(len(kinds) - 0.5, -0.5)
    legend(figure, [*(key(way, colours[way], marker=marker, ms=7) for way, marker in ways.items()),
                    key("dense", ls=":")], 3)  # fmt: skip
    return figure


def construct(rows: Rows) -> Figure:
    """Draw the milliseconds of construction by channels: a line per format, nn.Conv2d's, and the limit."""
    figure = sheet(3.9)
    axes = figure.subplots()
    sizes = [*dict.fromkeys(int(row["channels"]) for row in rows)]
    for family, runs in by(rows, "family"):
        style = {"color": ALL_COLOURS[family], "marker": "o", "ms": 5, "lw": 1.6, "label": family}
        axes.plot([int(row["channels"]) for row in runs], [float(row["default"]) for row in runs], **style)
    sized = [runs for _, runs in by(rows, "channels")]
    dense = [statistics.median(float(row["dense"]) for row in runs) for runs in sized]
    limits = [statistics.median(float(row["default"]) / float(row["over_limit"]) for row in runs) for runs in sized]
    axes.plot(sizes, dense, color=DENSE_COLOUR, lw=1.5, ls=":", label="nn.Conv2d")
    axes.plot(sizes, limits, color=DENSE_COLOUR, lw=1.5, ls="--", label="limit")
    axes.set(xscale="log", yscale="log", xlabel="channels, in and out", ylabel="milliseconds to construct")
    ticks(axes, sizes)
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    plain(axes)
    legend(figure, axes.get_lines(), 4)
    return figure


def tools(rows: Rows) -> Figure:
    """Draw a grid of tools by formats: a full dot where all kinds of layers pass, else the kinds that do not."""
    names = [*dict.fromkeys(row["tool"] for row in rows)]
    formats = [*dict.fromkeys(row["layer"].removesuffix(row["kind"]) for row in rows)]
    failed: dict[tuple[int, int], list[str]] = {}
    for row in rows:
        place = formats.index(row["layer"].removesuffix(row["kind"])), names.index(row["tool"])
        failed.setdefault(place, []).extend([row["kind"]] if row["result"] else [])
    figure = sheet(0.9 + 0.24 * len(names))
    axes = figure.subplots()
    for (x, y), kinds in failed.items():
        axes.plot(x, y, "" if kinds else "o", color=COLOURS["tt-chain"])
        axes.text(x, y, "\n".join(kinds), color=COLOURS["tr"], ha="center", va="center", fontsize=9)
    axes.set_xticks(range(len(formats)), formats, rotation=35, ha="left")
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(names)), names)
    axes.set(xlim=(-0.5, len(formats) - 0.5), ylim=(len(names) - 0.5, -0.5))
    plain(axes)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def encoder(rows: Rows) -> Figure:
    """Draw the cosine to the original embeddings by parameters: a line per form, fitted to weights or to inputs."""
    figure = sheet(3.3)
    axes = figure.subplots()
    forms = {"svd": DENSE_COLOUR, "matrices": COLOURS["cp"]}
    forms |= {name: ALL_COLOURS[name] for name in ("tucker", "tr", "blocktt")}
    for (form, inputs, ranks), runs in groups(rows, "format", "calibrated", "ranks"):
        if form in forms and (form == "svd" or inputs == "True"):
            share = [100 * float(row["parameters"]) / float(row["dense_parameters"]) for row in runs]
            style = "o-" if ranks == "layer" else "^:"
            axes.plot(share, [float(row["cosine"]) for row in runs], style, color=forms[form], ms=6)
    axes.set(
        xlabel="% of the parameters of the linear layers", ylabel="cosine to the original", ylim=(0, 1), xlim=(0, 60)
    )
    plain(axes)
    names = {"svd": "truncated SVD", "matrices": "two matrices", "tucker": "Tucker", "tr": "TR", "blocktt": "BlockTT"}
    budget = key("ranks from a budget", marker="^")
    legend(figure, [*(key(name, forms[form], marker="o") for form, name in names.items()), budget], 3)
    return figure


PICTURES: dict[str, tuple[str, Callable[[Rows], Figure]]] = {
    "speed": ("speed", speed),
    "compress": ("compress", compress),
    "depth": ("depth", depth),
    "convergence-plain": ("convergence", partial(convergence, network="plain")),
    "convergence-resnet": ("convergence", partial(convergence, network="resnet")),
    "convergence-resnet-no-norm": ("convergence", partial(convergence, network="resnet-no-norm")),
    "results": ("results", results),
    "scale": ("scale", scale),
    "construct": ("construct", construct),
    "encoder": ("encoder", encoder),
    "tools": ("tools", tools),
}
"""File and function of each picture."""


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    for name, (file, figure) in PICTURES.items():
        path = RESULTS / f"{file}.csv"
        if path.exists():
            figure(read_csv(path)).savefig(RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
