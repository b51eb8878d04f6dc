"""Time planning by number of cores: python benchmarks/measure/planning.py.

A row is a layer of 64 channels split into one to three factors, at rank 4; or a layer of 256 channels in factors of
two; or a network of 64 cores. `first` is the first plan of a new network, at batch 9 and 28x28: it searches both
corners of the range of sizes. `new_size` is a plan for a further batch and size of that range. In milliseconds.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

import tnlayers
from benchmarks.common.families import FAMILIES
from benchmarks.common.provenance import csv_file, write_csv
from benchmarks.common.rows import RESULTS
from tnlayers import Geometry, TensorNetwork
from tnlayers.backend.rates import RUN_MODES
from tnlayers.formats import factorize
from tnlayers.planning.choose import plan
from tnlayers.planning.setting import Setting

OUT = RESULTS / "planning.csv"
FACTORS = (1, 2, 3)
LARGE = ("cp", "tt", "tt-chain", "tr")  # families whose cores stay small with eight factors
BATCHES, SIZES = range(9, 16), (20, 28)
MOST = ", ".join([f"{axis}{k}:2 r:16" for axis in "io" for k in range(31)] + ["h:3 r", "w:3 r"])


def networks() -> Iterator[tuple[str, TensorNetwork, Geometry]]:
    """Yield the family, the network and the geometry of each row."""
    settings = [*product((64,), FAMILIES, FACTORS), *product((256,), LARGE, (8,))]
    for channels, family, factors in settings:
        kind, options = FAMILIES[family]
        shape = factorize(channels, factors)
        options = options | {"rank": 4, "in_shape": shape, "out_shape": shape, "device": "meta"}
        layer = kind(channels, channels, 3, padding=1, **options)
        yield family, layer.network, layer.geometry
    yield "cp", TensorNetwork.parse(MOST), Geometry(2**31, 2**31, (3, 3), padding=1)


def forget() -> None:
    """Clear the planner's caches, so that the next plan is the first of its network."""
    for module in (
        tnlayers.planning.choose,
        tnlayers.planning.options,
        tnlayers.planning.plan,
        tnlayers.planning.search_space,
    ):
        for value in vars(module).values():
            getattr(value, "cache_clear", lambda: None)()
    gc.collect()


def measure(family: str, network: TensorNetwork, geometry: Geometry, mode: str) -> dict[str, Any]:
    """Return a row."""
    first, times = [], []
    for _ in range(5):
        forget()
        for batch, size in product(BATCHES, SIZES[::-1]):
            start = time.perf_counter()
            plan(network, geometry, Setting(batch, (size, size), mode=mode))
            times.append(1e3 * (time.perf_counter() - start))
        first.append(times.pop(-len(BATCHES) * len(SIZES)))
    return {
        "family": family,
        "cores": len(network.cores),
        "mode": mode,
        "first": round(statistics.median(first), 2),
        "most": round(max(first), 2),
        "new_size": round(statistics.median(times), 2),
        "most_new_size": round(max(times), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=csv_file, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(*row, mode) for row, mode in product(networks(), RUN_MODES)]
    for row in rows:
        print(*row.values())
    write_csv(arguments.out, rows)


if __name__ == "__main__":
    main()
