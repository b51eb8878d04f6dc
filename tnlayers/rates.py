"""What an operation costs on a kind of device: seconds per call, per FLOP and per byte, measured once.

The table is printed by ``python benchmarks/calibrate.py``. A plan's cost is the sum over its operations; a training
step's rates cover forward and backward. Only ratios between plans matter, so one table serves machines of a kind.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

MODES = ("train", "infer", "cached")
"""Forward and backward; forward alone; forward with the weights' part kept from an earlier call."""


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


# AMD EPYC (AVX-512), 2 threads, torch 2.13, float32; median relative error of the fit: 6 to 31 %.
_CPU = Rates(
    lanes=16,
    train=_table("""
        conv first 95.3 13.9 251
        conv last 129 11.9 81.4
        point first 75.7 18.2 170
        point last 79.2 16.2 40.7
        group first 244 5.45 147
        group last 205 3.2 145
        depth first 261 18.2 228
        depth last 199 30 58.2
        matmul first first 111 20.9 73.8
        matmul first last 130 16.2 175
        matmul last first 131 17.6 136
        matmul last last 86.3 14.2 181
        weights 122 15.8 282
        move 56.3 0 39.4
    """),
    infer=_table("""
        conv first 16.1 4.11 52.9
        conv last 19.8 3.35 29.1
        point first 7.66 5.76 52.6
        point last 10.1 5.05 8.17
        group first 65.9 0.934 47.8
        group last 44.2 0.939 31.1
        depth first 73.5 0 42.3
        depth last 39.8 3.42 15.6
        matmul first first 14.8 6.53 14.3
        matmul first last 24.9 6.01 21.8
        matmul last first 23.7 6.14 18
        matmul last last 12.1 5.04 25.7
        weights 14.3 5.49 57.2
        move 8.07 0 12.5
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
