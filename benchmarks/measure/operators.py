"""Time torch's operators of a layer one by one, beside the layer: python benchmarks/measure/operators.py.

A row is a layer of images at batch 32. `dense` and `layer` are a pass through the dense layer and through ours.
`operators` is the sum over the operators of that pass, each run alone on the same tensors: matrix products,
convolutions, copies and sums. So layer / operators is what is lost between them, and the FLOPs at the dense layer's
rate over `operators` is the most that a plan of these operators could reach. Medians in milliseconds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from rich.progress import track
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common.families import FAMILIES, IMAGE, KINDS, LayerCase
from benchmarks.common.provenance import csv_file, write_csv
from benchmarks.common.rows import RESULTS
from benchmarks.common.timing import rounds
from tnlayers.measuring.timing import keep_freed_memory

MODES = ("train", "infer")
RANKS = (10, 0.1, 0.25)
ROUNDS = (7, 15)
OUT = RESULTS / "operators.csv"


class Recorder(TorchDispatchMode):
    """Records the operators that run, with their arguments. Views are left out: they move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and note it."""
        result = operator(*args, **(kwargs or {}))
        if not operator.is_view:
            self.calls.append(lambda: operator(*args, **(kwargs or {})))
        return result


def alone(call: Callable[[], Any]) -> float:
    """Return the median seconds of an operator that runs again and again."""
    times = []
    for _ in range(ROUNDS[0]):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(row: LayerCase, budget: float) -> dict[str, Any]:
    """Return all columns of a row."""
    x = torch.randn(row.batch, row.shape[0], *row.input_size, requires_grad=row.mode == "train")
    layer, dense = row.layer(), row.dense()
    steps = {name: row.step(module, x) for name, module in {"dense": dense, "layer": layer}.items()}
    for step in (*steps.values(), *steps.values()):  # the first call plans, the second fills caches
        step()
    with Recorder() as recorder:
        steps["layer"]()
    times = rounds(steps, budget, ROUNDS, twins=())
    medians = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    with torch.no_grad():
        operators = 1e3 * sum(map(alone, recorder.calls))
    plan = layer._executor.latest
    outputs = plan.geometry.output_size(row.input_size)
    dense_flops = 2 * row.batch * plan.network.dense_params * outputs[0] * outputs[1]
    return {
        "family": row.family, "in_channels": row.shape[0], "out_channels": row.shape[1], "size": row.shape[2],
        "stride": row.shape[3], "rank": row.rank, "batch": row.batch, "mode": row.mode,
        **{name: round(value, 4) for name, value in medians.items()}, "operators": round(operators, 4),
        "calls": len(recorder.calls), "order": plan.order, "flops": plan.flops, "dense_flops": dense_flops,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=0.5, help="seconds of timing per row; at least 7 rounds")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=[*FAMILIES])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=csv_file, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    rows = []
    cases = [*product(arguments.families, KINDS[IMAGE].shapes, RANKS, MODES)]
    for family, (*shape, kernel), rank, mode in track(cases):
        case = LayerCase(family, tuple(shape), rank, arguments.batch, mode, IMAGE, kernel)
        try:
            case.layer(device="meta")
        except ValueError as error:  # a rank that does not fit the shape
            print(f"{case}: {error}")
            continue
        rows.append(measure(case, arguments.budget))
        write_csv(arguments.out, rows)


if __name__ == "__main__":
    main()
