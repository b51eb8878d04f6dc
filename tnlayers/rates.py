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


# AMD EPYC (AVX-512), 2 threads, torch 2.13, float32; median relative error of the fit: 9 to 33 %.
_CPU = Rates(
    lanes=16,
    train=_table("""
        conv first 93.8 14.5 284
        conv last 128 12.7 78.8
        point first 72.2 18.6 222
        point last 75 15.7 65.5
        group first 250 5.03 182
        group last 209 2.97 162
        depth first 254 42.7 254
        depth last 195 59.8 64.4
        matmul first first 89.9 18.1 85.9
        matmul first last 94.4 12.9 190
        matmul last first 95.1 15.3 129
        matmul last last 89 13 214
        weights 117 16.4 274
        move 50 0 43.4
    """),
    infer=_table("""
        conv first 14.4 4.16 66.8
        conv last 18.9 3.43 31.9
        point first 7 5.61 65.4
        point last 9.79 4.47 22
        group first 67.8 0.954 51.2
        group last 45.9 0.924 32.9
        depth first 71.5 20 40.4
        depth last 39.7 9.11 14
        matmul first first 10.8 6.03 17
        matmul first last 13.7 5.67 20
        matmul last first 12.8 5.58 21.3
        matmul last last 12.9 5.21 27.3
        weights 13.2 6.17 61.7
        move 7.84 0 12.8
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
