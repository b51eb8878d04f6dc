"""What an operation costs on a kind of device: seconds per call, per FLOP and per byte, measured once.

The table is printed by ``python benchmarks/calibrate.py``. A plan's cost is the sum over its operations; a training
step's rates cover forward and backward. Only ratios between plans matter, so one table serves machines of a kind.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

MODES = ("train", "infer", "cached")
"""Forward and backward; forward alone; forward with the weights' part kept from an earlier call."""

WEIGHTS, MOVE = "weights", "move"
"""The kinds of operation in which ``x`` does not meet a weight."""


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


@dataclass(frozen=True)
class Rates:
    """What every kind of operation costs on one kind of device, in one dtype.

    Attributes:
        lanes: convolutions pay for channels in multiples of this.
        train, infer: the rate of each kind, forward and backward or forward alone. The kinds are 'conv', 'point' (a
            convolution of one tap), 'group', 'depth' (groups of one channel), each 'first' or 'last' by where the
            channels lie in memory; 'matmul' over the channels, from one layout to another; 'weights', a contraction
            of two cores; 'move', a copy into another order.
    """

    lanes: int
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


# AMD EPYC (AVX2), 2 threads, torch 2.13, float32; median relative error of the fit: 6 to 27 %.
_CPU = Rates(
    lanes=8,
    train=_table("""
        conv first 62.3 19.1 382
        conv last 74.4 18.1 263
        point first 36.9 19.2 232
        point last 44.8 17.8 109
        group first 261 27.1 169
        group last 228 25.7 90.3
        depth first 279 15.9 222
        depth last 201 38.7 68.8
        matmul first first 59.5 19.4 88.4
        matmul first last 68.8 17.7 140
        matmul last first 67.3 18.4 108
        matmul last last 44.1 16.6 142
        weights 78.1 16.4 236
        move 25.8 0 38.1
    """),
    infer=_table("""
        conv first 17.4 6.2 117
        conv last 23.4 4.99 81.6
        point first 7.33 6.07 78.8
        point last 10.7 5.75 28.9
        group first 88.6 12.7 35.9
        group last 73.2 8.96 26.3
        depth first 96 3.88 71.8
        depth last 60.5 12.1 16.9
        matmul first first 15.6 6.25 24.6
        matmul first last 24.6 5.8 33.1
        matmul last first 19.4 6.02 26.2
        matmul last last 18.3 5.43 39.3
        weights 24.9 5.12 76.4
        move 13.2 0 19.8
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
