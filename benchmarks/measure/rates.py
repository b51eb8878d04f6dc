"""Measure the cost of operations on this kind of device: the rates of tnlayers/backend/rates.csv.

    python benchmarks/measure/rates.py --threads 2 --kind "cpu avx512" --update

The rates are printed. With --update, they replace those of the same kind of device and dtype in the file.

Random operations of every kind are timed: forward, and forward with backward. Non-negative seconds per call, per FLOP
and per byte are then fitted to minimise the sum of relative errors.
"""

import argparse
import csv
import io
import itertools
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

import tnlayers
from benchmarks.common.atomic import write
from benchmarks.common.rows import read_csv
from benchmarks.common.timing import keep_freed_memory
from tnlayers.backend.rates import CONTRACT, FILE, MOVE, TABLES, WEIGHTS, Rate, Rates, rates_of
from tnlayers.backend.views import FIRST, LAST
from tnlayers.ops.contraction import Contraction
from tnlayers.ops.input_step import reorder
from tnlayers.planning.choose import plan
from tnlayers.planning.path import Path, PathStep
from tnlayers.planning.plan import build_plan
from tnlayers.planning.search import Search
from tnlayers.planning.search_space import space_of
from tnlayers.planning.setting import Setting

CHANNELS = (1, 3, 5, 8, 16, 27, 36, 64, 68, 100, 128, 256, 512)
SIZES = (7, 14, 16, 32, 56)
BATCHES = (1, 1, 8, 32, 512)  # 512: stands for channels folded into the batch
ENTRIES = 1 << 25  # maximum elements of the larger of input and output
KERNELS = ((3, 3), (3, 3), (3, 1), (1, 3), (1, 1), (1, 1), (1, 1))
GROUPS = (5, 8, 16, 64, 256, 512)
PER = ((1, 1), (1, 1), (4, 4), (8, 8), (7, 12), (16, 16), (9, 1), (1, 9), (2, 2), (16, 2))  # channels of a group
LARGEST = 4e9  # maximum FLOPs of an operation
REPEATS = 7

KINDS = tuple(TABLES["cpu", "float32"].train)


@dataclass(frozen=True)
class Sample:
    """An operation: its kind, the FLOPs and bytes that the planner assigns to it, its forward, and both passes."""

    kind: str
    flops: float
    bytes: float
    forward: Callable[[], Tensor]
    both: Callable[[Tensor], object]


def unit(kind: str, device: str = "cpu", dtype: str = "float32", **rate: float) -> Rates:
    """Return rates that make a plan's seconds equal the FLOPs or bytes of one kind, with a device's lanes."""
    table = {name: Rate(0.0, 0.0, 0.0) for name in KINDS} | {
        kind: Rate(**{"call": 0.0, "flop": 0.0, "byte": 0.0} | rate)
    }
    return Rates.counting(table, rates_of(device, dtype).lanes)


def input_steps(draw: random.Random, dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """Yield a convolution or matrix product of random sizes in all the planner's implementations."""
    kernel, size = draw.choice(KERNELS), draw.choice(SIZES)
    groups = draw.choice((1, 1, 1, *GROUPS))
    per = (
        draw.choice([pair for pair in PER if max(pair) * groups <= 1024]) if groups > 1 else draw.choices(CHANNELS, k=2)
    )
    batch = draw.choice([batch for batch in BATCHES if batch * groups * max(per) * size**2 <= ENTRIES])
    layer = tnlayers.EinsumConv2d(
        groups * per[0], groups * per[1], kernel, padding=(kernel[0] // 2, kernel[1] // 2), groups=groups, bias=False,
        network="i o h w", device=device, dtype=dtype,
    )  # fmt: skip
    space = space_of(layer.network, layer.geometry)

    name = str(dtype).removeprefix("torch.")

    def feature(option: PathStep, **rate: float) -> float:
        setting = Setting(batch, (size, size), option.target, "infer", device, dtype)
        options = Search(space, setting, unit(option.kind, device, name, **rate)).pricing.options(
            0, space.all, option.source, space.inputs
        )
        return next(o.cost.seconds for o in options if o[1:6] == option[1:6])

    for source, target in itertools.product((FIRST, LAST), repeat=2):
        search = Search(space, Setting(batch, (size, size), target, "train", device, dtype), unit(MOVE))
        x = torch.randn(batch, groups * per[0], size, size, dtype=dtype, device=device)
        if source == LAST:
            x = x.to(memory_format=torch.channels_last)
        for option in search.pricing.options(0, space.all, source, space.inputs):
            if option.moved or option.tail or option.cost.flops > LARGEST:
                continue
            step = build_plan(search.pricing, Path((option,), 0.0)).steps[0]
            weight = step.prepare_weight(torch.randn(step.weight_shape, dtype=dtype, device=device))
            flops, read = feature(option, flop=1.0), feature(option, byte=1.0)
            forward, backward = partial(step.apply, x, weight, None), partial(step.gradients, x, weight)

            def both(gradient: Tensor, forward: Any = forward, backward: Any = backward) -> object:
                return forward(), backward(gradient, (True, True))

            yield Sample(option.kind, flops, read, forward, both)


def contractions(draw: random.Random, dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """Yield the contractions of a random layer's cores. In half precision, cores are float32, as under autocast."""
    held = dtype if dtype.itemsize >= torch.float32.itemsize else torch.float32
    kind = draw.choice(
        (tnlayers.CPConv2d, tnlayers.TTConv2d, tnlayers.TRConv2d, tnlayers.BTTConv2d, tnlayers.TuckerConv2d)
    )
    channels, rank = draw.choice((64, 128, 256, 512)), draw.choice((0.05, 0.1, 0.25))
    layer = kind(channels, channels, 3, rank=rank, bias=False, device="meta", dtype=held)
    contraction = plan(layer.network, layer.geometry, Setting(1, (8, 8)), "reconstruct").weights[0].contraction
    tensors = contraction.run([torch.randn(shape, dtype=held, device=device) for shape in layer.network.core_shapes])
    for step in contraction.steps:
        left, right, out = step.axes
        sizes = dict(zip(left, step.left.source, strict=True)) | dict(zip(right, step.right.source, strict=True))
        alone = Contraction.of((left, right), ((0, 1),), out, sizes)
        operands = [tensors[side.operand].reshape(side.source).clone() for side in (step.left, step.right)]

        def both(gradient: Tensor, alone: Contraction = alone, operands: Sequence[Tensor] = operands) -> object:
            return alone.run(operands), alone.gradients(operands, gradient, (True, True))

        forward = partial(last_of, alone, operands)
        yield Sample(WEIGHTS, step.flops, step.entries * dtype.itemsize, forward, both)
    tiny = Contraction.of((("a", "b"), ("b", "c")), ((0, 1),), ("a", "c"), {"a": 2, "b": 2, "c": 2})
    leaves = [torch.randn(2, 2, dtype=held, device=device, requires_grad=True) for _ in range(2)]
    yield Sample(CONTRACT, 0.0, 0.0, partial(last_of, tiny, leaves), partial(through_autograd, tiny, leaves))


def last_of(contraction: Contraction, operands: Sequence[Tensor]) -> Tensor:
    return contraction.run(operands)[-1]


def through_autograd(contraction: Contraction, leaves: Sequence[Tensor], gradient: Tensor) -> object:
    """Run both passes of a contraction through autograd."""
    with torch.enable_grad():
        return torch.autograd.grad(contraction(leaves), leaves, gradient)


def moves(draw: random.Random, dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """Yield a reordering of channels."""
    sizes = tuple(draw.choices((2, 4, 8, 16), k=3))
    order = tuple(draw.sample(range(3), 3))
    size = draw.choice(SIZES)
    x = torch.randn(draw.choice(BATCHES), int(np.prod(sizes)), size, size, dtype=dtype, device=device)
    if order != (0, 1, 2):
        volume = 2.0 * x.numel() * dtype.itemsize
        forth = partial(reorder, x, sizes, order)
        yield Sample(MOVE, 0.0, volume, forth, lambda gradient, forth=forth: (forth(), reorder(gradient, sizes, order)))


_OTHER = torch.zeros(1 << 22)


def timed(function: Callable[[], object], device: str) -> float:
    """Return the median time in seconds."""
    times = []
    for _ in range(REPEATS + 1):
        _OTHER.add_(1)  # overwrites the caches, as other layers of a network do
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def measure(sample: Sample, device: str) -> tuple[float, float]:
    """Return the seconds of forward, and of forward and backward."""
    with torch.no_grad():
        forward = timed(sample.forward, device)
        gradient = torch.randn_like(sample.forward())
        return forward, timed(lambda: sample.both(gradient), device)


def fit(rows: Sequence[tuple[float, float, float]]) -> tuple[np.ndarray, float]:
    """Fit rates per call, FLOP and byte to rows of FLOPs, bytes and seconds. Also return the median relative error."""
    flops, size, seconds = np.array(rows).T
    scale = np.array([1e-6, 1e-12, 1e-12])
    features = np.stack([np.ones_like(flops), flops, size], axis=1) * scale / seconds[:, None]
    weight = np.ones_like(seconds)
    for _ in range(30):  # least absolute errors: other load on the machine makes outliers
        rates, _ = nnls(features * weight[:, None], weight)
        error = np.abs(features @ rates - 1)
        weight = 1 / np.sqrt(np.maximum(error, 0.05))
    # Raise the rates by the median error of the fit: kinds that are hard to predict count as slower.
    return rates * (1 + np.median(error)), float(np.median(error))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--kind", help="name of the device in the file, such as 'cpu avx512'; default: --device")
    parser.add_argument("--update", action="store_true", help="write the rates to tnlayers/backend/rates.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    dtype, draw = getattr(torch, arguments.dtype), random.Random(0)
    infer, train = defaultdict(list), defaultdict(list)
    for number in range(arguments.samples):
        source = (contractions, moves)[number % 2] if number % 8 < 2 else input_steps
        for sample in source(draw, dtype, arguments.device):
            forward, both = measure(sample, arguments.device)
            infer[sample.kind].append((sample.flops, sample.bytes, forward))
            train[sample.kind].append((sample.flops, sample.bytes, both))
    kind = arguments.kind or arguments.device
    rows = []
    for mode, found in (("train", train), ("infer", infer)):
        plain = fit(found["matmul last last"])[0][1]
        for name in KINDS:
            numbers, error = fit(found[name])
            if name == "matmul group":  # few channels per group: memory traffic hides the cost of a FLOP
                numbers[1] = max(numbers[1], plain)
            call, flop, byte = (f"{number:.3g}" for number in numbers)
            rows.append({"device": kind, "dtype": arguments.dtype, "mode": mode, "kind": name})
            rows[-1] |= {"call": call, "flop": flop, "byte": byte}
            text = f"{mode} {name} {call} {flop} {byte}"
            print(f"{text.ljust(48)} # {len(found[name])} samples, median error {error:.0%}")
    if arguments.update:
        others = [row for row in read_csv(FILE) if (row["device"], row["dtype"]) != (kind, arguments.dtype)]
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*others, *rows])
        write(FILE, text.getvalue().encode())


if __name__ == "__main__":
    main()
