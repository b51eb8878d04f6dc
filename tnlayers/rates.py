"""What an operation costs on a kind of device: seconds per call, per FLOP and per byte, measured once.

The table is printed by ``python benchmarks/calibrate.py``. A plan's cost is the sum over its operations; a training
step's rates cover forward and backward. Only ratios between plans matter, so one table serves machines of a kind.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

MODES = ("train", "infer", "cached")
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
        """Seconds of one operation of so many FLOPs and bytes."""
        return self.call + self.flop * flops + self.byte * size


def floor(table: Mapping[str, Rate]) -> Rate:
    """The least of each number over all kinds in which ``x`` meets a weight."""
    meetings = [rate for kind, rate in table.items() if kind not in (WEIGHTS, CONTRACT, MOVE)]
    return Rate(*(min(getattr(rate, number) for rate in meetings) for number in ("call", "flop", "byte")))


@dataclass(frozen=True)
class Rates:
    """What every kind of operation costs on one kind of device, in one dtype.

    Attributes:
        lanes: convolutions pay for channels in multiples of this.
        large, fault: a tensor of more bytes than ``large`` is not kept by the allocator for the next call; each of its
            bytes takes ``fault`` seconds to get again.
        train, infer: the rate of each kind, forward and backward or forward alone. The kinds are 'conv', 'point' (a
            convolution of one tap), 'group', 'depth' (groups of one channel), each 'first' or 'last' by where the
            channels lie in memory; 'conv single' and 'point single', of one small image; 'matmul' over the channels,
            from one layout to another; 'matmul group', the same in groups, channels last; 'weights', a step in a
            contraction of cores; 'contract', what each contraction takes besides; 'move', a copy into another order.
    """

    lanes: int
    large: int
    fault: float
    train: Mapping[str, Rate]
    infer: Mapping[str, Rate]

    def of(self, mode: str) -> Mapping[str, Rate]:
        """The table for one of MODES."""
        return self.train if mode == "train" else self.infer


def _table(text: str) -> Mapping[str, Rate]:
    """Lines of a kind and three numbers: microseconds per call, per million FLOPs, per megabyte."""
    rows = (line.rsplit(maxsplit=3) for line in text.strip().splitlines())
    return MappingProxyType(
        {
            kind.strip(): Rate(float(call) * 1e-6, float(flop) * 1e-12, float(byte) * 1e-12)
            for kind, call, flop, byte in rows
        }
    )


# AMD EPYC (AVX2), 2 threads, torch 2.13, float32; median relative error of the fit: 5 to 27 %, which is added to it:
# of two operations as fast, the one that is easier to foresee is chosen. 'weights' is from an earlier run than the
# rest, 'single' from one of single images alone; 'contract' is the median time of a contraction of 2 x 2 matrices
# through autograd, its one step included. `fault` is from copies of 34 MiB beside copies of 30 MiB (glibc).
_CPU = Rates(
    lanes=8,
    large=1 << 25,
    fault=3.3e-10,
    train=_table("""
        conv first 364 21.9 247
        conv last 293 20.6 90.9
        point first 357 18.9 224
        point last 275 19.4 69.3
        group first 345 42.8 265
        group last 291 22.9 284
        depth first 356 4.79 275
        depth last 270 52.7 74.8
        conv single 93.4 25.7 0
        point single 68.7 19 155
        matmul first first 91.2 21.4 129
        matmul first last 97.2 16.6 252
        matmul last first 98.4 17.8 206
        matmul last last 67.6 17.6 211
        matmul group 90 25 400
        weights 76.7 17.8 351
        contract 216 0 0
        move 46.2 0 66.1
    """),
    infer=_table("""
        conv first 149 7.23 66.7
        conv last 95 5.65 39.9
        point first 131 5.61 75.6
        point last 87.8 5.93 20.7
        group first 129 10.5 70.2
        group last 96.8 7.75 111
        depth first 134 4.05 71.1
        depth last 91 8.67 26.4
        conv single 30.9 6.92 45.6
        point single 21.3 8.22 49.8
        matmul first first 33.3 6.58 42
        matmul first last 46.4 6.8 41.7
        matmul last first 36.3 6.1 56.4
        matmul last last 35 6.37 43.2
        matmul group 45 8 100
        weights 36.3 5.39 130
        contract 21.2 0 0
        move 30.4 0 32.8
    """),
)

TABLES: Mapping[tuple[str, str], Rates] = MappingProxyType({("cpu", "float32"): _CPU})
"""By kind of device and dtype."""


def rates(device: str, dtype: str) -> Rates:
    """The table of a device kind and dtype, or the nearest there is: of the same device, then of any."""
    for key in ((device, dtype), (device, "float32")):
        if key in TABLES:
            return TABLES[key]
    return TABLES["cpu", "float32"]
