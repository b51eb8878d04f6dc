"""What an operation costs on a kind of device: seconds per call, per FLOP and per byte, measured once.

``python benchmarks/measure/rates.py --update`` writes the table, rates.csv. A plan's cost is the sum over its
operations; a training step's rates cover forward and backward. Only ratios between plans matter, so one table serves
machines of a kind.
"""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from tnlayers.backend.views import FIRST, LAST

FILE = Path(__file__).with_suffix(".csv")
"""The file that ``benchmarks/measure/rates.py --update`` writes."""

RUN_MODES = ("train", "infer", "cached")
"""Forward and backward; forward alone; forward with the weights' part kept from an earlier call."""

WEIGHTS, CONTRACT, MOVE = "weights", "contract", "move"
"""The kinds of operation in which ``x`` does not meet a weight."""

SINGLE = "single"
"""One small image, for which torch on a CPU has another convolution."""


@dataclass(frozen=True)
class Rate:
    """Seconds of one kind of operation.

    Attributes:
        call: per call.
        flop: per floating-point operation.
        byte: per byte read or written.
    """

    call: float
    flop: float
    byte: float

    def seconds(self, flops: float, size: float) -> float:
        """Seconds of one operation of so many FLOPs and bytes; infinity where these are beyond a float's range."""
        try:
            return self.call + self.flop * flops + self.byte * size
        except OverflowError:
            return math.inf


def floor(table: Mapping[str, Rate]) -> Rate:
    """The least of each number over all kinds in which ``x`` meets a weight."""
    meetings = [rate for kind, rate in table.items() if kind not in (WEIGHTS, CONTRACT, MOVE)]
    return Rate(*(min(getattr(rate, number) for rate in meetings) for number in ("call", "flop", "byte")))


@dataclass(frozen=True, eq=False)
class Rates:
    """What every kind of operation costs on one kind of device, in one dtype.

    Attributes:
        lanes: convolutions pay for channels in multiples of this, 'first' or 'last' by where those lie in memory, or
            'single' of one small image.
        large, fault: a tensor of more bytes than ``large`` is not kept by the allocator for the next call; each of its
            bytes takes ``fault`` seconds to get again.
        doubt: a plan must be faster than the dense kernel's by this share of its own time to be preferred. The least of
            many estimates is more likely too low than that of a single way.
        train, infer: the rate of each kind, forward and backward or forward alone. The kinds are 'conv', 'point' (a
            convolution of one tap), 'group', 'depth' (groups of one channel), each 'first' or 'last' by where the
            channels lie in memory; 'conv single' and 'point single', of one small image; 'matmul' over the channels,
            from one layout to another; 'matmul group', the same in groups, channels last; 'weights', a step in a
            contraction of cores; 'contract', what each contraction takes besides; 'move', a copy into another order.
    """

    lanes: Mapping[str, int]
    large: int
    fault: float
    doubt: float
    train: Mapping[str, Rate]
    infer: Mapping[str, Rate]

    @classmethod
    def counting(cls, table: Mapping[str, Rate], lanes: Mapping[str, int]) -> "Rates":
        """One table forward and backward; tensors of every size are kept, and nothing is in doubt."""
        return cls(lanes, large=1 << 62, fault=0.0, doubt=0.0, train=table, infer=table)

    def of(self, mode: str) -> Mapping[str, Rate]:
        """The table for one of RUN_MODES."""
        return self.train if mode == "train" else self.infer


def _read() -> Mapping[tuple[str, str, str], Mapping[str, Rate]]:
    """Return the rates of every kind by device, dtype and mode, from the file beside this one.

    Its units are microseconds per call, per million FLOPs, and per megabyte.
    """
    found: dict[tuple[str, str, str], dict[str, Rate]] = {}
    with FILE.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            rate = Rate(float(row["call"]) * 1e-6, float(row["flop"]) * 1e-12, float(row["byte"]) * 1e-12)
            found.setdefault((row["device"], row["dtype"], row["mode"]), {})[row["kind"]] = rate
    return {key: MappingProxyType(table) for key, table in found.items()}


def lanes(first: int, last: int, single: int) -> Mapping[str, int]:
    """Of what multiples of channels convolutions pay for, by where those lie in memory, and of one small image."""
    return MappingProxyType({FIRST: first, LAST: last, SINGLE: single})


LARGE, FAULT = 1 << 25, 3.3e-10
"""Of glibc: copies of 34 MiB beside copies of 30 MiB."""


def _rates(device: str, dtype: str, lanes: Mapping[str, int], doubt: float) -> Rates:
    return Rates(
        lanes, LARGE, FAULT, doubt, train=_MEASURED[device, dtype, "train"], infer=_MEASURED[device, dtype, "infer"]
    )


_MEASURED = _read()
TABLES: Mapping[tuple[str, str], Rates] = MappingProxyType(
    {
        # AMD EPYC (AVX2), 2 threads, torch 2.13; 550 samples. The median relative error of the fit is 4 to 39 %. It is
        # added to each rate, so that of two operations as fast, the one with the smaller error wins. 'contract' is a
        # contraction of 2 x 2 matrices through autograd, its one step included.
        ("cpu", "float32"): _rates("cpu", "float32", lanes(8, 8, 8), doubt=0.05),
        # Another AMD EPYC (AVX512), 2 threads, torch 2.13; 1,127 samples, median errors 5 to 39 %. oneDNN blocks 16
        # channels where channels come first: with multiples of 8, the fit expects convolutions of few channels to be 20
        # to 25 % faster than they are. Single images take another path; the fit is nearest without multiples.
        ("cpu avx512", "float32"): _rates("cpu avx512", "float32", lanes(16, 8, 1), doubt=0.05),
        # The latter (AVX512-bf16) with cores in float32; 1,127 samples, median errors 3 to 35 %. In the layers of a
        # ResNet, plans of several steps take up to a third more than expected, and dense kernels a sixth less.
        ("cpu", "bfloat16"): _rates("cpu", "bfloat16", lanes(16, 8, 8), doubt=0.15),
    }
)
"""The rates by device and dtype. A CPU may have its instruction set behind it, as torch names that."""


def rates_of(device: str, dtype: str) -> Rates:
    """The table of a device kind and dtype, or the nearest there is: of the same device, then of any."""
    kinds = [f"cpu {torch.backends.cpu.get_cpu_capability().lower()}", "cpu"] if device == "cpu" else [device]
    keys = [(kind, name) for name in (dtype, "float32") for kind in kinds]
    return next((TABLES[key] for key in keys if key in TABLES), TABLES["cpu", "float32"])
