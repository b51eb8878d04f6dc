"""Picture of second moments over the layers of a model."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

NAMES = 40
"""Number of names below the axis that can be read."""


def draw(lines: Mapping[str, Sequence[float | None]], names: Sequence[str], marked: Sequence[int], ax: Any) -> Any:
    """Draw lines over places with names, on a logarithmic axis. Return the axes.

    Args:
        lines: labels and values.
        names: of the places. If there are too many, every second, third or later one is written.
        marked: places with a vertical line.
        ax: axes of matplotlib, or None for new ones.

    Raises:
        TypeError: ``ax`` is no axes.
        ImportError: matplotlib is missing.
    """
    if ax is None:
        try:
            ax = import_module("matplotlib.pyplot").subplots(layout="constrained")[1]
        except ImportError as error:
            raise ImportError("matplotlib is missing; pip install 'tnlayers[plot]'") from error
    elif not (hasattr(ax, "plot") and hasattr(ax, "set_xticks")):
        raise TypeError(f"ax is of type {type(ax).__name__}; it must be axes of matplotlib, or None for new ones")
    for label, values in lines.items():
        shown = [value or float("nan") for value in values]  # no zeros on a logarithmic axis
        ax.plot(range(len(shown)), shown, marker=".", label=label)
    for number, x in enumerate(marked):
        ax.axvline(x, color="tab:red", linestyle=":", label="" if number else "problem")
    ax.set_yscale("log")
    step = -(-len(names) // NAMES)
    ticks = range(0, len(names), step or 1)
    ax.set_xticks(ticks, [names[k] for k in ticks], rotation=90, fontsize="x-small")
    ax.set_ylabel("second moment")
    ax.legend()
    return ax
