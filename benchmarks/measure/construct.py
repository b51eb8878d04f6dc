"""Time the construction of layers against that of nn.Conv2d: python benchmarks/measure/construct.py.

A row is a 3x3 layer without bias, by format and number of channels, at one keep ratio. Its columns run interleaved in
one process and thread: each once per round, in random order. A row holds medians in milliseconds. `dense` is
nn.Conv2d; `default` is a layer with default arguments; `paper` uses only the paper's rule, without making the draws
exact. `over_limit` is the time of `default` over the larger of AT_LEAST and PROMISED times that of `dense`.
"""

import argparse
import statistics
from functools import partial
from itertools import product

import torch
from rich.progress import track
from torch import nn

from benchmarks.common.families import FAMILIES, WIDTHS, SquareLayer
from benchmarks.common.initialisations import RULES
from benchmarks.common.provenance import csv_file, write_csv
from benchmarks.common.rows import RESULTS
from benchmarks.common.timing import LIMITS, rounds

KEEP = 0.1
PROMISED, AT_LEAST = 5, 20.0  # limits of a layer's time: times the dense one's, and milliseconds
OUT = RESULTS / "construct.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="seconds of timing per row; at least 7 rounds")
    parser.add_argument("--out", type=csv_file, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = []
    for family, channels in track([*product(FAMILIES, WIDTHS)], description="construct"):
        steps = {"dense": partial(nn.Conv2d, channels, channels, 3, bias=False)} | {
            rule: partial(SquareLayer(family, channels, KEEP).layer, init=RULES[rule]) for rule in ("default", "paper")
        }
        for step in (*steps.values(), *steps.values()):
            step()
        times = rounds(steps, arguments.seconds, LIMITS, twins=())
        medians = {name: 1e3 * statistics.median(values) for name, values in times.items()}
        limit = max(AT_LEAST, PROMISED * medians["dense"])
        found.append(
            {"family": family, "channels": channels, "keep": KEEP}
            | {name: round(median, 3) for name, median in medians.items()}
            | {"over_limit": round(medians["default"] / limit, 4), "rounds": len(times["dense"])}
        )
    write_csv(arguments.out, found)


if __name__ == "__main__":
    main()
