"""Time every family against the dense layer, other plans and peers: python benchmarks/measure/speed.py.

All columns of a row run interleaved in one process: each once per round, in random order. A row holds medians in
milliseconds. `train` is forward and backward. `infer` is a forward in eval mode without gradients. `frozen` is the
same, with the cached weights of `tnlayers.freeze_` in our layers; peers run as in `infer`. Layers have no bias, as in
a ResNet.

`--kinds` names other kinds of layer than images; their rows go to speed_kinds.csv. A row of a file without the columns
`kind` and `kernel` is of images, with a kernel of 3 x 3.

The peers are tednet and tensorly-torch; `pip install .[peers]` installs them. The cell of a peer is empty if it is not
installed or does not support the row.
"""

import argparse
import gc
import math
import statistics
from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import islice, product
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from benchmarks.common.families import ALL_FAMILIES, IMAGE, KINDS, LayerCase
from benchmarks.common.peers import peers
from benchmarks.common.provenance import csv_file, write_csv
from benchmarks.common.rows import RESULTS, read_csv
from benchmarks.common.timing import Step, once, rounds
from tnlayers.backend.rate_tables import rates_of as layer_rates
from tnlayers.backend.rates import Rate, Rates, lanes
from tnlayers.measuring.timing import keep_freed_memory
from tnlayers.planning.search import Search
from tnlayers.planning.search_space import space_of
from tnlayers.planning.setting import Setting

PASSES = {"train": "train", "infer": "infer", "frozen": "cached"}  # values: the planner's names
CANDIDATES = 4  # number of orders that the oracle times
HOPELESS = 4  # a column slower than this times the fastest is not timed in rounds; it keeps its warm-up time
PATIENCE = 0.5  # seconds; a column whose first call takes longer has no second warm-up call
ROOM = 4e9  # bytes; plans that need more are not run
OUT, OUT_KINDS = RESULTS / "speed.csv", RESULTS / "speed_kinds.csv"


def oracle(row: LayerCase, layer: Any, setting: Setting) -> Iterator[Any]:
    """Yield layers with other orders of contraction than the chosen one: those with the best estimates."""
    found = list(islice(layer._executor.candidates(setting), 40))
    likely = [plan for plan in found if plan.seconds < HOPELESS * found[0].seconds and plan.peak < ROOM]
    for order in list(dict.fromkeys(plan.order for plan in likely))[1 : CANDIDATES + 1]:
        yield row.layer(strategy=order)


def least_flops(layer: Any, setting: Setting) -> int:
    """Return the FLOPs of the order that needs the fewest."""
    kinds = layer_rates("cpu", "float32").infer
    table = dict.fromkeys(kinds, Rate(0.0, 1.0, 0.0))
    counted = Rates.counting(table, lanes(1, 1, 1))
    path = next(iter(Search(space_of(layer.network, layer.geometry), setting, counted)))
    return round(path.seconds)


def measure(row: LayerCase, budget: float, compiled: bool) -> dict[str, Any]:
    """Return all columns of a row."""
    inputs, outputs, size, stride = row.shape
    x = torch.randn(row.batch, inputs, *row.input_size, requires_grad=row.mode == "train")
    layer = row.layer()
    setting = Setting(row.batch, row.input_size, mode=PASSES[row.mode])
    plan = layer._executor.plan(setting)
    dense = row.dense()
    modules: dict[str, nn.Module] = {"dense": dense, "dense_again": deepcopy(dense)}
    modules |= {"auto": layer, "auto_again": row.layer()}
    for name in ("reconstruct", "factorized"):
        other = row.layer(strategy=name)
        found = other._executor.plan(setting)
        if found.order != plan.order and found.peak < ROOM:
            modules[name] = other
    low = row.layer(memory="low")
    if row.mode == "train":
        modules["low"] = low
    modules |= {f"oracle{number}": other for number, other in enumerate(oracle(row, layer, setting))}
    modules |= dict(peers(row, layer))
    steps: dict[str, Step] = {}
    first: dict[str, float] = {}
    for name, module in modules.items():
        try:
            step = row.step(module, x)
            first[name] = once(step)
            if first[name] < PATIENCE:  # the first call plans, the second fills caches
                first[name] = once(step)
            steps[name] = step
        except Exception as error:
            if not name.startswith(("tednet", "tltorch")):
                raise
            print(f"{row}: {name} fails: {error}")
    twins = ("dense", "dense_again", "auto", "auto_again")
    limit = HOPELESS * min(first.values())
    hopeless = {name: seconds for name, seconds in first.items() if seconds > limit and name not in twins}
    steps = {name: step for name, step in steps.items() if name not in hopeless}
    if compiled:
        steps |= dict(compile_all(row, x, {name: modules[name] for name in steps}))
    times = rounds(steps, budget)
    medians = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    medians |= {name: 1e3 * seconds for name, seconds in hopeless.items()}

    def least(prefix: str) -> float | str:
        found = [value for name, value in medians.items() if name.startswith(prefix)]
        return round(min(found), 4) if found else ""

    result: dict[str, Any] = {
        "family": row.family, "kind": row.kind, "kernel": row.kernel, "in_channels": inputs, "out_channels": outputs,
        "size": size, "stride": stride,
        "rank": row.rank, "keep_ratio": round(layer.keep_ratio, 4), "batch": row.batch, "mode": row.mode,
    }  # fmt: skip
    result |= {name: round(medians[name], 4) for name in twins}
    result |= {
        name: round(medians[name], 4) if name in medians else "" for name in ("reconstruct", "factorized", "low")
    }
    result |= {"oracle": least("oracle"), "tednet": least("tednet"), "tltorch": least("tltorch")}
    if compiled:
        result |= {f"compiled_{name}": least(f"compiled {name}") for name in ("dense", "auto", "tednet", "tltorch")}
    # A transposed convolution multiplies every tap at each position of its input.
    positions = row.input_size if layer.geometry.transposed else layer.geometry.output_size(row.input_size)
    weights = math.prod(layer.geometry.kernel_size) * inputs * outputs
    memory = [peak(module, x.detach()) if row.mode == "train" else "" for module in (dense, layer, low)]
    return result | {
        "order": plan.order, "parts": plan.chunks, "flops": plan.flops, "least_flops": least_flops(layer, setting),
        "dense_flops": 2 * weights * row.batch * math.prod(positions), "dense_peak": memory[0], "auto_peak": memory[1],
        "low_peak": memory[2],
        "rounds": len(times["dense"]),
    }  # fmt: skip


def compile_all(row: LayerCase, x: Tensor, modules: dict[str, nn.Module]) -> Iterator[tuple[str, Step]]:
    """Yield compiled steps of the modules that torch.compile turns into one graph."""
    for name, module in modules.items():
        if not name.startswith(("dense", "auto", "tednet", "tltorch")) or name.endswith("_again"):
            continue
        torch._dynamo.reset()
        try:
            step = row.step(torch.compile(module, fullgraph=True), x)
            step()
            yield f"compiled {name}", step
        except Exception as error:
            print(f"{row}: {name} does not compile: {type(error).__name__}")


def peak(module: nn.Module, x: Tensor) -> int:
    """Return the peak bytes of a training step: parameters, gradients, momentum, activations and temporaries."""
    module.train()
    x = x.clone().requires_grad_()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-6, momentum=0.9)
    gradient = torch.randn_like(module(x).detach())

    def step() -> None:
        optimizer.zero_grad()
        x.grad = None
        module(x).backward(gradient)
        optimizer.step()

    step()
    held = sum(p.nbytes * 2 for p in module.parameters()) + x.nbytes + gradient.nbytes
    optimizer.zero_grad()
    x.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    total = highest = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            total += event.nbytes()
            highest = max(highest, total)
    return held + highest


def cases(kind: str, arguments: argparse.Namespace) -> Iterator[LayerCase]:
    """Yield the rows of a kind that the arguments choose."""
    default = KINDS[kind]
    shapes = default.shapes if arguments.shapes is None else [default.shapes[number] for number in arguments.shapes]
    grid = product(
        arguments.families or default.families, shapes, arguments.ranks or default.ranks,
        arguments.batches or default.batches, arguments.modes,
    )  # fmt: skip
    for family, (*shape, kernel), rank, batch, mode in grid:
        yield LayerCase(family, tuple(shape), rank, batch, mode, kind, kernel)


def kept(rows: list[dict[str, str]], kinds: Sequence[str], modes: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows of other kinds or modes. Rows without the columns of the kind get them."""
    found = [{"family": row["family"], "kind": IMAGE, "kernel": "3"} | row for row in rows]
    return [row for row in found if row["mode"] not in modes or row["kind"] not in kinds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of timing per row; at least 5 rounds")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[IMAGE], help="kinds of layer; default: image")
    parser.add_argument("--families", nargs="+", choices=ALL_FAMILIES, help="default: those of the kind")
    parser.add_argument(
        "--ranks",
        nargs="+",
        type=lambda text: float(text) if "." in text else int(text),
        help="default: those of the kind",
    )
    parser.add_argument("--batches", nargs="+", type=int, help="default: those of the kind")
    parser.add_argument("--modes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--shapes", nargs="+", type=int, help="indices of the kind's shapes; default: all")
    parser.add_argument("--update", action="store_true", help="keep the file's rows of other modes and kinds")
    parser.add_argument("--compile", action="store_true", help="add columns with torch.compile; takes a minute per row")
    parser.add_argument("--out", type=csv_file, help=f"default: {OUT.name}; with other kinds {OUT_KINDS.name}")
    arguments = parser.parse_args()
    out = arguments.out or (OUT if arguments.kinds == [IMAGE] else OUT_KINDS)
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    rows = kept(read_csv(out), arguments.kinds, arguments.modes) if arguments.update else []
    for row in track([case for kind in arguments.kinds for case in cases(kind, arguments)]):
        try:
            row.layer(device="meta")
        except ValueError as error:  # a keep ratio too small for the format, or a rank too large for the shape
            print(f"{row}: {error}")
            continue
        rows.append(measure(row, arguments.budget, arguments.compile))
        gc.collect()
        write_csv(out, rows)


if __name__ == "__main__":
    main()
