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


# AMD EPYC (AVX2), 2 threads, torch 2.13, float32; median relative error of the fit: 5 to 27 %, which is added to it:
# of two operations as fast, the one that is easier to foresee is chosen.
_CPU = Rates(
    lanes=8,
    train=_table("""
        conv first 81.9 21.2 425
        conv last 282 18.9 98.8
        point first 77.6 17.6 393
        point last 271 18.4 82.3
        group first 355 40.4 204
        group last 307 23.2 261
        depth first 372 23.2 223
        depth last 282 39.7 88.1
        matmul first first 101 20.9 121
        matmul first last 101 17.4 199
        matmul last first 99.5 17.5 203
        matmul last last 72.1 15.7 213
        weights 93.3 18.2 338
        move 57.2 0 52.3
    """),
    infer=_table("""
        conv first 25.8 7.19 169
        conv last 92.6 5.58 39.4
        point first 22 6.15 124
        point last 83.2 5.43 32.8
        group first 126 10.8 48.9
        group last 104 8.26 96.1
        depth first 131 1.56 73.5
        depth last 91.7 11 26.7
        matmul first first 33 6.46 38.4
        matmul first last 39.7 5.55 55
        matmul last first 35.1 6.12 41
        matmul last last 35.5 5.88 39.2
        weights 34.9 5.54 128
        move 29.3 0 27.2
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
