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


# AMD EPYC (AVX2), 2 threads, torch 2.13, float32; median relative error of the fit: 5 to 34 %, which is added to it:
# of two operations as fast, the one that is easier to foresee is chosen.
_CPU = Rates(
    lanes=8,
    train=_table("""
        conv first 73.5 22.1 370
        conv last 248 18.7 87.3
        point first 46.4 19 311
        point last 238 17.8 50.8
        group first 296 44 173
        group last 270 22.3 190
        depth first 306 16.5 215
        depth last 215 29.8 71.2
        matmul first first 69 21.9 98.7
        matmul first last 73 17.3 179
        matmul last first 72.4 16.6 188
        matmul last last 46 14.5 238
        weights 51.6 17.1 386
        move 28.4 0 47.2
    """),
    infer=_table("""
        conv first 18.2 7.1 157
        conv last 77.7 5.46 31.8
        point first 9.71 6.21 100
        point last 69 5.37 14.2
        group first 97.2 11.4 48.4
        group last 84.1 8.11 57.4
        depth first 105 3.08 68.9
        depth last 65.6 10.9 20.3
        matmul first first 18.9 6.96 30.2
        matmul first last 29.6 6.29 29.2
        matmul last first 23.2 6.45 28.2
        matmul last last 20.7 5.35 43.8
        weights 16.9 5.43 133
        move 14.4 0 24.6
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
