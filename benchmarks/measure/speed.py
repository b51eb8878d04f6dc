"""Time every family against the dense layer, its other plans, tednet and tensorly-torch: python benchmarks/speed.py.

All columns of a row run interleaved, in one process: round after round, each once, in random order. A row holds
medians in milliseconds. `train` is forward and backward, `infer` a forward in eval mode without gradients, `frozen` one
in which our layers keep their weights (`tnlayers.freeze_`) and peers do what they do. Layers have no bias, as in a
ResNet.
Peers come with `pip install .[peers]`; where one is missing, or cannot do a row, its cell is empty.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib
import io
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

import tnlayers
from provenance import REPOSITORY, csv_file, read_csv, write_csv
from tnlayers.backend.rates import Rate, Rates, lanes
from tnlayers.backend.rates import rates as layer_rates
from tnlayers.formats import factorize
from tnlayers.planning.path import Setting
from tnlayers.planning.search import Search
from tnlayers.planning.search_space import space

SHAPES = ((64, 64, 32, 1), (64, 128, 32, 2), (128, 128, 16, 1), (256, 256, 14, 1), (512, 512, 7, 1), (64, 64, 56, 1))
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "cp": (tnlayers.CPConv2d, {}),
    "tucker": (tnlayers.TuckerConv2d, {}),
    "tt": (tnlayers.TTConv2d, {}),
    "tt-chain": (tnlayers.TTConv2d, {"layout": "chain"}),
    "tr": (tnlayers.TRConv2d, {}),
    "btt": (tnlayers.BTTConv2d, {}),
}
SPLIT = ("tt", "tr", "btt")  # three factors at tednet's ranks, as tednet's users have them
RANKS = (8, 10, 16, 0.05, 0.1, 0.25)
BATCHES = (1, 32)
PASSES = {"train": "train", "infer": "infer", "frozen": "cached"}  # and what the planner calls them
CANDIDATES = 4  # orders that the oracle times
HOPELESS = 4  # times the fastest; such a column keeps the time of its second call alone
PATIENCE = 0.5  # seconds; what takes longer is called once before it is timed, or not at all
ROOM = 4e9  # bytes; a plan that needs more is not run
ROUNDS = (5, 40)  # at least and at most
QUIET = 0.02  # rounds go on, within the limits, until dense and auto agree with their twins to this share
OUT = REPOSITORY / "benchmarks" / "results" / "speed.csv"

Step = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """What is timed."""

    family: str
    shape: tuple[int, int, int, int]
    rank: float
    batch: int
    mode: str

    def layer(self, **kwargs: Any) -> Any:
        """Our layer."""
        kind, options = FAMILIES[self.family]
        inputs, outputs, _, stride = self.shape
        if isinstance(self.rank, int) and self.family in SPLIT:
            options = options | {"in_shape": factorize(inputs, 3), "out_shape": factorize(outputs, 3)}
        return kind(inputs, outputs, 3, stride=stride, padding=1, bias=False, rank=self.rank, **options, **kwargs)

    def step(self, module: nn.Module, x: Tensor) -> Step:
        """One pass through a module."""
        if self.mode != "train":
            module.eval()
            if self.mode == "frozen" and isinstance(module, tnlayers.TensorLayer):
                tnlayers.freeze_(module)

            def infer() -> object:
                with torch.no_grad():
                    return module(x)

            return infer
        parameters = [*module.parameters()]
        with torch.no_grad():
            gradient = torch.randn_like(module(x))

        def train() -> object:
            return torch.autograd.grad(module(x), [x, *parameters], gradient)

        return train


def tednet_peer(row: Row, layer: Any) -> nn.Module | None:
    """The same network in tednet."""
    shape, (inputs, outputs, _, stride) = layer.network, row.shape
    ranks = list(layer.rank.values())
    arguments = {"kernel_size": 3, "stride": stride, "padding": 1, "bias": False}
    factors = list(shape.shape(shape.inputs)), list(shape.shape(shape.outputs))

    def find(module: str, name: str) -> Any:
        return getattr(importlib.import_module(f"tednet.tnn.{module}"), name)

    if row.family == "cp":
        return find("cp", "CPConv2D")(inputs, outputs, ranks[0], **arguments)
    if row.family == "tucker":
        return find("tucker2", "TK2Conv2D")(inputs, outputs, ranks, **arguments)
    if row.family == "tt":
        return find("tensor_train", "TTConv2D")(*factors, ranks, **arguments)
    if row.family == "tr":
        return find("tensor_ring", "TRConv2D")(*factors, ranks, **arguments)
    if row.family == "btt" and len(set(ranks)) == 1:
        return find("bt_tucker", "BTTConv2D")(*factors, ranks, 4, **arguments)
    return None


def tltorch_peer(row: Row, layer: Any, implementation: str = "factorized") -> nn.Module | None:
    """The same format and ranks in tensorly-torch, as its constructor leaves it."""
    inputs, outputs, _, stride = row.shape
    ranks = list(layer.rank.values())
    kind = {"cp": "cp", "tucker": "tucker", "tt-chain": "tt"}.get(row.family)
    if kind is None:
        return None
    rank: Any = {"cp": ranks[0], "tucker": (ranks[-1], ranks[0], 3, 3), "tt": (1, *ranks, 1)}[kind]
    make: Any = importlib.import_module("tltorch").FactorizedConv
    peer: nn.Module = make(
        inputs, outputs, 3, order=2, stride=stride, padding=1, bias=False, factorization=kind, rank=rank,
        implementation=implementation,
    )  # fmt: skip
    return peer


def tltorch_peers(row: Row, layer: Any) -> Iterator[nn.Module]:
    """The same format and ranks in tensorly-torch, in each of its implementations."""
    for implementation in ("factorized", "reconstructed", *(["mobilenet"] if row.family == "cp" else [])):
        peer = tltorch_peer(row, layer, implementation)
        if peer is not None:
            for parameter in peer.parameters():
                nn.init.normal_(parameter, std=0.1)
            yield peer


def peers(row: Row, layer: Any) -> Iterator[tuple[str, nn.Module]]:
    """Whatever peers can do the row."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(Exception):
            peer = tednet_peer(row, layer)
            if peer is not None:
                yield "tednet", peer
        with contextlib.suppress(Exception):
            for number, peer in enumerate(tltorch_peers(row, layer)):
                yield f"tltorch{number}", peer


def oracle(row: Row, layer: Any, setting: Setting) -> Iterator[Any]:
    """Layers with other orders of contraction than the chosen one, the likeliest by estimate."""
    found = list(islice(layer._planner.candidates(setting), 40))
    likely = [plan for plan in found if plan.seconds < HOPELESS * found[0].seconds and plan.peak < ROOM]
    for order in list(dict.fromkeys(plan.order for plan in likely))[1 : CANDIDATES + 1]:
        yield row.layer(strategy=order)


def least_flops(layer: Any, setting: Setting) -> int:
    """Floating-point operations of the order that needs the fewest."""
    kinds = layer_rates("cpu", "float32").infer
    table = dict.fromkeys(kinds, Rate(0.0, 1.0, 0.0))
    counted = Rates.counting(table, lanes(1, 1, 1))
    trail = next(iter(Search(space(layer.network, layer.geometry), setting, counted)))
    return round(trail.seconds)


def keep_freed_memory() -> None:
    """Let glibc, where it is, keep what is freed, but for what is mapped on its own.

    Else it gives pages back, and takes the time to get them again, by how things happen to lie: one step has none,
    the next 40,000 of them.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        trim_threshold, mmap_threshold = -1, -3
        allocator = ctypes.CDLL(None)
        allocator.mallopt(trim_threshold, 2**31 - 1)
        allocator.mallopt(mmap_threshold, 2**25)  # up to which glibc's own moves


def once(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def rounds(
    steps: dict[str, Step],
    seconds: float,
    limits: tuple[int, int] = ROUNDS,
    twins: Sequence[str] = ("dense", "auto"),
) -> dict[str, list[float]]:
    """Times of all steps, interleaved, until the twins agree, if there are any, or the time is up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, start = list(steps), time.perf_counter()

    def quiet() -> bool:
        pairs = [(times[name], times[f"{name}_again"]) for name in twins]
        return bool(pairs) and all(abs(statistics.median(a) / statistics.median(b) - 1) < QUIET for a, b in pairs)

    least, most = limits
    for number in range(most):
        if number >= least and (time.perf_counter() - start > seconds or (number >= 2 * least and quiet())):
            break
        random.shuffle(order)  # what ran before decides what is in the caches
        for name in order:
            times[name].append(once(steps[name]))
    return times


def measure(row: Row, budget: float, compiled: bool) -> dict[str, Any]:
    """All columns of a row."""
    inputs, outputs, size, stride = row.shape
    x = torch.randn(row.batch, inputs, size, size, requires_grad=row.mode == "train")
    layer = row.layer()
    setting = Setting(row.batch, (size, size), mode=PASSES[row.mode])
    plan = layer._planner.plan(setting)
    dense = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    modules: dict[str, nn.Module] = {"dense": dense, "dense_again": deepcopy(dense)}
    modules |= {"auto": layer, "auto_again": row.layer()}
    for name in ("reconstruct", "factorized"):
        other = row.layer(strategy=name)
        found = other._planner.plan(setting)
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
            if first[name] < PATIENCE:  # the first call of all plans, and fills caches
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
        "family": row.family, "in_channels": inputs, "out_channels": outputs, "size": size, "stride": stride,
        "rank": row.rank, "keep_ratio": round(layer.keep_ratio, 4), "batch": row.batch, "mode": row.mode,
    }  # fmt: skip
    result |= {name: round(medians[name], 4) for name in twins}
    result |= {
        name: round(medians[name], 4) if name in medians else "" for name in ("reconstruct", "factorized", "low")
    }
    result |= {"oracle": least("oracle"), "tednet": least("tednet"), "tltorch": least("tltorch")}
    if compiled:
        result |= {f"compiled_{name}": least(f"compiled {name}") for name in ("dense", "auto", "tednet", "tltorch")}
    places = (-(-size // stride)) ** 2
    memory = [peak(module, x.detach()) if row.mode == "train" else "" for module in (dense, layer, low)]
    return result | {
        "order": plan.order, "parts": plan.parts, "flops": plan.flops, "least_flops": least_flops(layer, setting),
        "dense_flops": 2 * dense.weight.numel() * row.batch * places, "dense_peak": memory[0], "auto_peak": memory[1],
        "low_peak": memory[2],
        "rounds": len(times["dense"]),
    }  # fmt: skip


def compile_all(row: Row, x: Tensor, modules: dict[str, nn.Module]) -> Iterator[tuple[str, Step]]:
    """Steps through torch.compile, of what compiles in one graph."""
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
    """Bytes of a training step at its peak: parameters, gradients, momentum, activations and all that comes between."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of timing per row, but at least 5 rounds")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument(
        "--ranks", nargs="+", type=lambda text: float(text) if "." in text else int(text), default=RANKS
    )
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--modes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--shapes", nargs="+", type=int, default=range(len(SHAPES)), help="numbers of the shapes")
    parser.add_argument("--update", action="store_true", help="keep the file's rows of other modes")
    parser.add_argument("--compile", action="store_true", help="columns through torch.compile too, a minute per row")
    parser.add_argument("--out", type=csv_file, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    chosen = [SHAPES[number] for number in arguments.shapes]
    rows = read_csv(arguments.out) if arguments.update else []
    rows = [row for row in rows if row["mode"] not in arguments.modes]
    for family, shape, rank, batch, mode in track(
        list(product(arguments.families, chosen, arguments.ranks, arguments.batches, arguments.modes))
    ):
        row = Row(family, shape, rank, batch, mode)
        try:
            row.layer(device="meta")
        except ValueError as error:  # a keep ratio too small for the format, a rank that a shape has no room for
            print(f"{row}: {error}")
            continue
        rows.append(measure(row, arguments.budget, arguments.compile))
        gc.collect()
        write_csv(arguments.out, rows)


if __name__ == "__main__":
    main()
