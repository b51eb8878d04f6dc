"""Time the squared norm of a kernel against building the kernel: python benchmarks/measure/penalty.py.

A row is a 3x3 layer with a format, channels and a keep ratio. Its columns run interleaved in one process: each once
per round, in random order. A row holds medians in milliseconds. `kernel` is `layer.weight.square().sum()`, `penalty`
is `squared_norm(layer)`. Both include forward and backward.
"""

import argparse
import statistics
from itertools import product
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.common.families import ALL_FAMILIES, WIDTHS, SquareLayer
from benchmarks.common.provenance import csv_file, write_csv
from benchmarks.common.rows import RESULTS
from benchmarks.common.timing import rounds
from tnlayers.ops.squared_norm import fastest
from tnlayers.training.penalty import squared_norm

KEEPS = (0.05, 0.1, 0.25)
PROMISED = 0.1  # up to this keep ratio, the penalty must be faster than the kernel
ROUNDS = (7, 400)  # minimum and maximum
OUT = RESULTS / "penalty.csv"


def measure(row: SquareLayer, budget: float) -> dict[str, Any]:
    """Return all columns of a row."""
    layer = row.layer()
    cores = [*layer.cores]
    way = fastest(layer.network, "cpu", "float32")

    def kernel() -> object:
        return torch.autograd.grad(layer.weight.square().sum(), cores)

    def penalty() -> object:
        return torch.autograd.grad(squared_norm(layer), cores)

    steps = {"kernel": kernel, "kernel_again": kernel, "penalty": penalty}
    for step in (*steps.values(), *steps.values()):  # the first call searches plans, the second fills caches
        step()
    times = rounds(steps, budget, ROUNDS, twins=())
    medians = {name: round(1e3 * statistics.median(values), 4) for name, values in times.items()}
    return {
        "family": row.family, "channels": row.channels, "keep": row.keep, "keep_ratio": round(layer.keep_ratio, 4),
        **medians, "ratio": round(medians["penalty"] / medians["kernel"], 4),
        "way": "kernel" if way.whole is None else "copies", "flops": way.flops,
        "kernel_flops": layer._executor.contraction.flops + 2 * layer.network.dense_params,
        "rounds": len(times["kernel"]),
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table of ratios by family and channels, and every row where the penalty is slower."""
    keeps = sorted({row["keep"] for row in rows})
    table = Table(
        "family", "channels", *(f"keep {keep}" for keep in keeps), title="time of the penalty / of the kernel"
    )
    cells = {(row["family"], row["channels"], row["keep"]): row for row in rows}
    for family, channels in dict.fromkeys((row["family"], row["channels"]) for row in rows):
        found = [cells.get((family, channels, keep)) for keep in keeps]
        table.add_row(family, str(channels), *(f"{row['ratio']:.2f} by {row['way']}" if row else "" for row in found))
    console = Console(width=100)
    console.print(table)
    noise = [row["kernel_again"] / row["kernel"] for row in rows]
    small = [row["ratio"] for row in rows if row["keep"] <= PROMISED]
    console.print(f"the kernel against itself: {min(noise):.2f} to {max(noise):.2f}")
    if small:
        mean = statistics.geometric_mean(small)
        console.print(f"keep <= {PROMISED}: geometric mean {mean:.2f}, worst {max(small):.2f}, of {len(small)} rows")
    slower = [row for row in rows if row["ratio"] >= 1]
    for row in slower:
        console.print(f"slower: {SquareLayer(row['family'], row['channels'], row['keep'])}: {row['ratio']:.2f}")
    if not slower:
        console.print("no row is slower")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of timing per row; at least 7 rounds")
    parser.add_argument("--families", nargs="+", choices=ALL_FAMILIES, default=list(ALL_FAMILIES))
    parser.add_argument("--channels", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--keeps", nargs="+", type=float, default=KEEPS)
    parser.add_argument("--out", type=csv_file, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = []
    for row in track(
        [SquareLayer(*found) for found in product(arguments.families, arguments.channels, arguments.keeps)]
    ):
        try:
            row.layer(device="meta")
        except ValueError as error:  # a keep ratio too small for the format
            print(f"{row}: {error}")
            continue
        rows.append(measure(row, arguments.budget))
        write_csv(arguments.out, rows)
    show(rows)


if __name__ == "__main__":
    main()
