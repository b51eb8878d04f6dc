"""Choice of learning rates by accuracy on held-out images."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

GROUP = ("dataset", "network", "family", "arm")

Row = dict[str, Any]


def identity(row: Row, columns: Sequence[str]) -> tuple[str, ...]:
    """Return values as a CSV file has them, in which None is an empty cell."""
    return tuple("" if row[column] is None else str(row[column]) for column in columns)


def chosen(rows: Sequence[dict[str, str]]) -> list[Row]:
    """Return the learning rate that is best on held-out images, for every dataset, network, family and arm.

    A diverged run has accuracy 0. Of equally good rates, the smallest is chosen.

    Returns:
        dictionaries of these four columns, and `lr`; `accuracy` and `error`: mean and standard error over seeds on the
        test images; `diverged`: the share of diverged runs, over all rates and seeds; `lost`: the same at the chosen
        rate; `steps_to`: mean over seeds, or None if one of them never reaches the loss; `note`: why there is no such
        network. All others are then None.
    """

    def accuracies(runs: Sequence[dict[str, str]], images: str) -> list[float]:
        return [0.0 if run["diverged"] == "True" else float(run[f"accuracy_{images}"]) for run in runs]

    groups: dict[tuple[str, ...], dict[str, list[dict[str, str]]]] = {}
    for row in rows:
        groups.setdefault(identity(row, GROUP), {}).setdefault(row["lr"], []).append(row)
    found = []
    for group, rates in groups.items():
        nowhere = rates.pop("", [{"note": ""}])
        choice: Row = dict(zip(GROUP, group, strict=True))
        choice |= dict.fromkeys(("lr", "accuracy", "error", "diverged", "lost", "steps_to"))
        choice["note"] = nowhere[0]["note"]
        if rates:
            lr = max(rates, key=lambda rate: (statistics.fmean(accuracies(rates[rate], "heldout")), -float(rate)))
            test, steps = accuracies(rates[lr], "test"), [run["steps_to"] for run in rates[lr]]
            choice |= {
                "lr": lr,
                "accuracy": statistics.fmean(test),
                "error": statistics.stdev(test) / math.sqrt(len(test)) if len(test) > 1 else None,
                "diverged": statistics.fmean(run["diverged"] == "True" for runs in rates.values() for run in runs),
                "lost": statistics.fmean(run["diverged"] == "True" for run in rates[lr]),
                "steps_to": statistics.fmean(map(float, steps)) if all(steps) else None,
                "note": "",
            }
        found.append(choice)
    return found
