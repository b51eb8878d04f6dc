"""Rates of operations on a kind of device: seconds per call, per FLOP and per byte, measured once.

``python benchmarks/measure/rates.py --update`` writes the table, rates.csv. A plan's cost is the sum over its
operations. Rates for training cover forward and backward. Only ratios between plans matter, so one table serves all
machines of a kind.
"""

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
"""Forward and backward; forward alone; forward with weights cached by an earlier call."""

WEIGHTS, CONTRACT, MOVE = "weights", "contract", "move"
"""The kinds of operation that are not input steps."""

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
        """Return the seconds of one operation of ``flops`` and ``size`` bytes; infinity beyond a float's range."""
        try:
            return self.call + self.flop * flops + self.byte * size
        except OverflowError:
            return math.inf


def floor(table: Mapping[str, Rate]) -> Rate:
    """Return the minimum of each number over all kinds of input step."""
    meetings = [rate for kind, rate in table.items() if kind not in (WEIGHTS, CONTRACT, MOVE)]
    return Rate(*(min(getattr(rate, number) for rate in meetings) for number in ("call", "flop", "byte")))


@dataclass(frozen=True, eq=False)
class Rates:
    """Costs of every kind of operation on one kind of device, in one dtype.

    Attributes:
        lanes: multiple to which convolutions round up channels: 'first' or 'last' by the channels' memory layout, or
            'single' for one small image.
        large, fault: the allocator keeps no tensor of more than ``large`` bytes for the next call. To get it again
            takes ``fault`` seconds per byte.
        doubt: safety margin. A factorised plan wins only if ``seconds * (1 + doubt)`` is below the dense plan's time:
            the minimum of many noisy estimates is biased low.
        train, infer: rate of each kind, for forward and backward or forward alone. The kinds are 'conv', 'point' (a
            convolution of one tap), 'group', 'depth' (groups of one channel), each 'first' or 'last' by the channels'
            memory layout; 'conv single' and 'point single', of one small image; 'matmul' over the channels, from one
            layout to another; 'matmul group', the same in groups, channels last; 'weights', a step in a contraction of
            cores; 'contract', the rest of each contraction; 'move', a copy into another order.
    """

    lanes: Mapping[str, int]
    large: int
    fault: float
    doubt: float
    train: Mapping[str, Rate]
    infer: Mapping[str, Rate]

    @classmethod
    def counting(cls, table: Mapping[str, Rate], lanes: Mapping[str, int]) -> "Rates":
        """Return rates with one table for all modes, without costs of allocation or doubt."""
        return cls(lanes, large=1 << 62, fault=0.0, doubt=0.0, train=table, infer=table)

    def of(self, mode: str) -> Mapping[str, Rate]:
        """Return the table for one of RUN_MODES."""
        return self.train if mode == "train" else self.infer


def _read() -> Mapping[tuple[str, str, str], Mapping[str, Rate]]:
    """Return the rates of every kind by device, dtype and mode, from the file beside this one.

    The file's units are microseconds per call, per million FLOPs, and per megabyte.
    """
    found: dict[tuple[str, str, str], dict[str, Rate]] = {}
    for line in FILE.read_text(encoding="utf-8").splitlines()[1:]:
        device, dtype, mode, kind, call, flop, byte = line.split(",")
        rate = Rate(float(call) * 1e-6, float(flop) * 1e-12, float(byte) * 1e-12)
        found.setdefault((device, dtype, mode), {})[kind] = rate
    return {key: MappingProxyType(table) for key, table in found.items()}


def lanes(first: int, last: int, single: int) -> Mapping[str, int]:
    """Return the multiples of channels in convolutions, by memory layout and for one small image."""
    return MappingProxyType({FIRST: first, LAST: last, SINGLE: single})


LARGE, FAULT = 1 << 25, 3.3e-10
"""Values for glibc, from copies of 34 MiB and of 30 MiB."""


def _rates(device: str, dtype: str, lanes: Mapping[str, int], doubt: float) -> Rates:
    return Rates(
        lanes, LARGE, FAULT, doubt, train=_MEASURED[device, dtype, "train"], infer=_MEASURED[device, dtype, "infer"]
    )


_MEASURED = _read()
TABLES: Mapping[tuple[str, str], Rates] = MappingProxyType(
    {
        # AMD EPYC (AVX2), 2 threads, torch 2.13; 550 samples. The fit's median relative error is 4 to 39 %. It is added
        # to each rate, so that the smaller error decides between equally fast operations. 'contract' is a contraction
        # of 2 x 2 matrices through autograd, with its single step.
        ("cpu", "float32"): _rates("cpu", "float32", lanes(8, 8, 8), doubt=0.05),
        # Another AMD EPYC (AVX512), 2 threads, torch 2.13; 1,127 samples, median errors 5 to 39 %. For channels first,
        # oneDNN uses blocks of 16 channels: with multiples of 8, the fit predicts convolutions of few channels 20 to
        # 25 % too fast. Single images use another algorithm; the fit is best without multiples.
        ("cpu avx512", "float32"): _rates("cpu avx512", "float32", lanes(16, 8, 1), doubt=0.05),
        # The latter (AVX512-bf16) with cores in float32; 1,127 samples, median errors 3 to 35 %. In a ResNet's layers,
        # plans of several steps take up to a third more than estimated, dense kernels a sixth less.
        ("cpu", "bfloat16"): _rates("cpu", "bfloat16", lanes(16, 8, 8), doubt=0.15),
    }
)
"""Rates by device and dtype. A CPU's key may end with its instruction set, as torch names it."""


def rates_of(device: str, dtype: str) -> Rates:
    """Return the table of a device type and dtype, or the nearest: of the same device, then any."""
    kinds = [f"cpu {torch.backends.cpu.get_cpu_capability().lower()}", "cpu"] if device == "cpu" else [device]
    keys = [(kind, name) for name in (dtype, "float32") for kind in kinds]
    return next((TABLES[key] for key in keys if key in TABLES), TABLES["cpu", "float32"])
