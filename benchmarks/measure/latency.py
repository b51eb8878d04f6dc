"""Time the networks of results.csv at inference, against their dense one: python benchmarks/latency.py.

A row is one of its networks, as drawn, and a batch of 32x32 images; the median of a forward in eval mode without
gradients, in float32, channels first. All that results.csv has of a network runs interleaved, round after round, each
once, in random order.
"""

import argparse
import statistics
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn

from config import DENSE, Config
from provenance import REPOSITORY, csv_file, read_csv, write_csv
from report import groups
from speed import rounds

RESULTS = REPOSITORY / "benchmarks" / "results"
BATCHES = (1, 32)
CHANNELS, CLASSES, SIZE = 3, 10, 32
LIMITS = (7, 100)  # rounds, at least and at most


def trained(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows of results.csv of a CIFAR-10 network that was compressed to a size, or is its dense one, and trained."""
    return [row for row in rows if row["dataset"] == "cifar10" and row["ratio"] and row["accuracy"]]


def drawn(row: dict[str, str]) -> nn.Module:
    """The network of such a row, as drawn."""
    rank = float(row["rank"]) if row["rank"] else None
    return Config(model=row["model"], conv=row["conv"], rank=rank).network(CHANNELS, CLASSES)


def measure(rows: list[dict[str, str]], batch: int, seconds: float) -> list[dict[str, Any]]:
    """The rows of one network: its dense one is among them."""
    images = torch.randn(batch, CHANNELS, SIZE, SIZE)
    steps = {}
    for row in rows:
        steps[row["conv"], row["rank"]] = partial(drawn(row).eval(), images)
    with torch.no_grad():
        for step in (*steps.values(), *steps.values()):  # the first call of all searches, the second fills caches
            step()
        medians = {arm: 1e3 * statistics.median(times) for arm, times in rounds(steps, seconds, LIMITS, ()).items()}
    dense = medians[DENSE, ""]
    return [
        {"model": rows[0]["model"], "conv": conv, "rank": rank, "batch": batch}
        | {"ms": round(ms, 3), "over_dense": round(ms / dense, 4)}
        for (conv, rank), ms in medians.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS / "results.csv")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each network and batch, but at least 7 rounds")
    parser.add_argument("--out", type=csv_file, default=RESULTS / "latency.csv")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    cells = [*product(groups(trained(read_csv(arguments.results)), "model"), BATCHES)]
    found = [measure(rows, batch, arguments.seconds) for (_, rows), batch in track(cells, description="latency")]
    write_csv(arguments.out, [row for cell in found for row in cell])


if __name__ == "__main__":
    main()
