"""Compare FLOP counters with the FLOPs that layers have: python benchmarks/measure/counters.py.

A row of the CSV is a counter and a layer: a 3x3 convolution of 64 channels, dense or in a format, in an
`nn.Sequential`, on an input of shape (4, 64, 16, 16). Every count is in FLOPs; counts of multiply-adds are doubled.
`right` is what the layer's plan has in such a forward, with or without gradients, and for the dense layer the formula.
`left` is what the counter leaves behind on the model. Nothing is random or timed, but plans depend on the machine.

Counters that are not installed are skipped, and their rows in the CSV are kept. For all of them:
`pip install calflops fvcore ptflops thop torchinfo transformers` (calflops imports the last one).
"""

import argparse
import contextlib
import importlib
import io
import pickle
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tnlayers
from benchmarks.common.provenance import csv_file, write_csv
from benchmarks.common.rows import RESULTS, read_csv

OUT = RESULTS / "counters.csv"
SHAPE = 4, 64, 16, 16
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: nn.Conv2d(64, 64, 3, padding=1),
    "CP": lambda: tnlayers.CPConv2d(64, 64, 3, padding=1, rank=16),
    "Tucker": lambda: tnlayers.TuckerConv2d(64, 64, 3, padding=1, rank=16),
    "TT": lambda: tnlayers.TTConv2d(64, 64, 3, padding=1, rank=8),
    "TR": lambda: tnlayers.TRConv2d(64, 64, 3, padding=1, rank=8),
    "BTT": lambda: tnlayers.BTTConv2d(64, 64, 3, padding=1, rank=4, blocks=2),
    "BTT factorized": lambda: tnlayers.BTTConv2d(64, 64, 3, padding=1, rank=4, blocks=2, strategy="factorized"),
}


class Count(NamedTuple):
    """FLOPs and parameters, None where a counter has none."""

    flops: int | float
    params: int | float | None


class Counter(NamedTuple):
    """A counter: the package that it is in, and a function of a model and an input."""

    package: str
    count: Callable[[nn.Module, Tensor], Count]


def _summary(training: bool) -> Callable[[nn.Module, Tensor], Count]:
    def count(model: nn.Module, x: Tensor) -> Count:
        totals = tnlayers.summary(model.train(training), x).totals
        return Count(totals.flops or 0, totals.params)

    return count


def _torch(gradients: bool) -> Callable[[nn.Module, Tensor], Count]:
    def count(model: nn.Module, x: Tensor) -> Count:
        with torch.set_grad_enabled(gradients), FlopCounterMode(display=False) as counter:
            model(x)
        return Count(counter.get_total_flops(), None)

    return count


def _fvcore(gradients: bool) -> Callable[[nn.Module, Tensor], Count]:
    def count(model: nn.Module, x: Tensor) -> Count:
        fvcore: Any = importlib.import_module("fvcore.nn")
        with torch.set_grad_enabled(gradients):
            found = fvcore.FlopCountAnalysis(model, x).unsupported_ops_warnings(False)
            return Count(2 * found.total(), fvcore.parameter_count(model)[""])

    return count


def _torchinfo(model: nn.Module, x: Tensor) -> Count:
    found = importlib.import_module("torchinfo").summary(model, input_data=x, verbose=0)
    return Count(2 * found.total_mult_adds, found.total_params)


def _thop(model: nn.Module, x: Tensor) -> Count:
    macs, params = importlib.import_module("thop").profile(model, inputs=(x,), verbose=False)
    return Count(2 * macs, params)


def _ptflops(backend: str) -> Callable[[nn.Module, Tensor], Count]:
    def count(model: nn.Module, x: Tensor) -> Count:
        found = importlib.import_module("ptflops").get_model_complexity_info(
            model, tuple(x.shape[1:]), False, False, lambda _: x, backend=backend
        )
        return Count(2 * found[0], found[1])

    return count


def _calflops(model: nn.Module, x: Tensor) -> Count:
    found = importlib.import_module("calflops").calculate_flops(
        model, args=[x], print_results=False, output_as_string=False
    )
    return Count(found[0], found[2])


COUNTERS = {
    "tnlayers.summary, training": Counter("tnlayers", _summary(True)),
    "tnlayers.summary, eval": Counter("tnlayers", _summary(False)),
    "FlopCounterMode": Counter("torch", _torch(True)),
    "FlopCounterMode, no_grad": Counter("torch", _torch(False)),
    "fvcore": Counter("fvcore", _fvcore(True)),
    "fvcore, no_grad": Counter("fvcore", _fvcore(False)),
    "torchinfo": Counter("torchinfo", _torchinfo),
    "thop": Counter("thop", _thop),
    "ptflops, backend pytorch": Counter("ptflops", _ptflops("pytorch")),
    "ptflops, backend aten": Counter("ptflops", _ptflops("aten")),
    "calflops": Counter("calflops", _calflops),
}


def measure(counter: Counter, make: Callable[[], nn.Module]) -> dict[str, Any]:
    """Return a counter's numbers for a layer, the right ones, and what the counter leaves behind."""
    torch.manual_seed(0)
    model, x, seen = nn.Sequential(make()), torch.randn(SHAPE), []
    keys = {*model.state_dict()}
    handle = model[0].register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        found = counter.count(model, x)
    handle.remove()
    training = model.training
    left = ["eval mode"] if not training and counter.package != "tnlayers" else []
    left += ["buffers"] if {*model.state_dict()} != keys else []
    try:
        pickle.dumps(model)
    except (pickle.PicklingError, AttributeError, TypeError):
        left += ["cannot be pickled"]
    twin: Any = make().train(any(seen))
    if isinstance(twin, tnlayers.TensorLayer):
        right = twin.flops(SHAPE)
    else:
        right = 2 * SHAPE[0] * SHAPE[2] * SHAPE[3] * twin.weight.numel()
    params = sum(parameter.numel() for parameter in twin.parameters())
    return {
        "gradients": "yes" if any(seen) else "no",
        "flops": int(found.flops),
        "right": right,
        "params": "" if found.params is None else int(found.params),
        "right_params": params,
        "left": " + ".join(left),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=csv_file, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    old = read_csv(arguments.out) if arguments.out.exists() else []
    rows: list[dict[str, Any]] = []
    for name, counter in COUNTERS.items():
        try:
            version = metadata.version(counter.package) if counter.package != "tnlayers" else tnlayers.__version__
        except metadata.PackageNotFoundError:
            print(f"{name}: {counter.package} is not installed; its rows are kept")
            rows += [row for row in old if row["counter"] == name]
            continue
        for layer, make in LAYERS.items():
            rows.append({"counter": name, "version": version, "layer": layer} | measure(counter, make))
            print(*rows[-1].values(), sep="  ", flush=True)
    write_csv(arguments.out, rows)


if __name__ == "__main__":
    main()
