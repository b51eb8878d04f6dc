"""Sizes, colours and legends of the pictures.

A page is 620 pixels wide, and a figure of WIDTH inches is as wide as that. So a font has the size on the page that it
has here, and no picture has more than two columns.
"""

from collections.abc import Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

WIDTH = 6.4
COLOURS = {
    "cp": "#3b6fb6", "tucker": "#d9822b", "tt": "#8a5fb0", "tt-chain": "#4f9d69", "tr": "#c0504d", "btt": "#7f7f7f",
}  # fmt: skip
DENSE_COLOUR = "#111111"
OTHERS = {"dense": DENSE_COLOUR, "ht": "#b8a13a", "blocktt": "#5bb1b5"}
ALL_COLOURS = COLOURS | OTHERS
MARKERS = "os^Dvp<>hPX8"


def sheet(height: float) -> Figure:
    """Return an empty figure of the width of a page."""
    return Figure(figsize=(WIDTH, height), dpi=200, layout="constrained")


def plain(axes: Axes) -> None:
    """Set a light grid behind the points, and remove two spines."""
    axes.grid(color="#e8e8e8", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def ticks(axes: Axes, values: Iterable[float], form: str = "{:g}") -> None:
    """Set the ticks of a logarithmic x axis, without other labels."""
    shown = [*values]
    axes.set_xticks(shown, [form.format(value) for value in shown])
    axes.xaxis.set_minor_formatter(NullFormatter())


def key(label: str, colour: str = "#8a8a8a", marker: str = "", **style: Any) -> Line2D:
    """Return an entry of a legend: a marker, or a line if there is none."""
    return Line2D([], [], color=colour, marker=marker, label=label, **({"lw": 0 if marker else 2, "ms": 6} | style))


def legend(figure: Figure, entries: Iterable[Line2D], columns: int) -> None:
    """Put a legend above the panels."""
    figure.legend(
        handles=[*entries], loc="outside upper center", ncols=columns, frameon=False, fontsize=9.5, columnspacing=1.4
    )
