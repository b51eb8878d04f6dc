"""Time the search for a plan, by number of cores: python benchmarks/planning.py.

A row is a layer of 64 channels split into some number of factors, at rank 4. The search is timed on settings it has
not seen (batches of 8 to 16), after one that has warmed Python up; milliseconds.
"""

import argparse
import statistics
import time
from itertools import product
from typing import Any

import torch

from provenance import REPOSITORY, csv_file, write_csv
from speed import FAMILIES
from tnlayers.formats import factorize
from tnlayers.plan import plan
from tnlayers.rates import MODES
from tnlayers.trail import Setting

OUT = REPOSITORY / "benchmarks" / "results" / "planning.csv"
FACTORS = (1, 2, 3)
BATCHES = range(8, 17)


def measure(family: str, factors: int, mode: str) -> dict[str, Any]:
    """One row."""
    kind, options = FAMILIES[family]
    shape = factorize(64, factors)
    layer = kind(64, 64, 3, padding=1, rank=4, in_shape=shape, out_shape=shape, device="meta", **options)
    times = []
    for batch in (7, *BATCHES):
        start = time.perf_counter()
        plan(layer.network, layer.geometry, Setting(batch, (32, 32), mode=mode))
        times.append(1e3 * (time.perf_counter() - start))
    return {
        "family": family,
        "cores": len(layer.cores),
        "mode": mode,
        "first": round(times[0], 2),
        "median": round(statistics.median(times[1:]), 2),
        "most": round(max(times[1:]), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=csv_file, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(*row) for row in product(FAMILIES, FACTORS, MODES)]
    for row in rows:
        print(*row.values())
    write_csv(arguments.out, rows)


if __name__ == "__main__":
    main()
