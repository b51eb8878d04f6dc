"""Time inference of the networks of results.csv against the dense ones: python benchmarks/measure/latency.py.

A row is an untrained network of results.csv and a batch of 32x32 images. It holds the median time of a forward in eval
mode without gradients, in float32, channels first. All versions of a network run interleaved: each once per round, in
random order.
"""

import argparse
import statistics
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from benchmarks.common.names import DENSE
from benchmarks.common.provenance import csv_file, write_csv
from benchmarks.common.rows import RESULTS, groups, read_csv
from benchmarks.common.timing import LIMITS, rounds
from benchmarks.common.trained_networks import CHANNELS, SIZE, drawn, trained

BATCHES = (1, 32)


def measure(rows: list[dict[str, str]], batch: int, seconds: float) -> list[dict[str, Any]]:
    """Return the rows of one network. `rows` must include its dense version."""
    images = torch.randn(batch, CHANNELS, SIZE, SIZE)
    steps = {}
    for row in rows:
        steps[row["conv"], row["rank"]] = partial(drawn(row).eval(), images)
    with torch.no_grad():
        for step in (*steps.values(), *steps.values()):  # the first call searches plans, the second fills caches
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
    parser.add_argument("--seconds", type=float, default=60.0, help="per network and batch; at least 7 rounds")
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
