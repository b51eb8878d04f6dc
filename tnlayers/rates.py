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
            from one layout to another; 'weights', a step in a contraction of cores; 'contract', what each
            contraction takes besides; 'move', a copy into another order.
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
        conv first 366 20.2 280
        conv last 291 19.5 165
        point first 365 17.9 240
        point last 274 19.1 83.3
        group first 364 44.1 197
        group last 324 24.3 246
        depth first 364 16.5 257
        depth last 279 37.9 92.1
        conv single 74.6 21.7 139
        point single 59.3 16.6 164
        matmul first first 95.6 22.1 121
        matmul first last 98.6 18.1 217
        matmul last first 96.4 16.8 228
        matmul last last 71.6 18.5 163
        weights 93.3 18.2 338
        contract 193 0 0
        move 46.4 0 52.5
    """),
    infer=_table("""
        conv first 126 6.9 114
        conv last 101 5.95 47.3
        point first 132 5.91 84.1
        point last 89.9 6.37 19
        group first 131 11.7 54
        group last 105 9.07 98.7
        depth first 137 4.59 77.3
        depth last 93.5 12.3 29.5
        conv single 23.9 6.89 61.8
        point single 17.9 5.23 51.8
        matmul first first 34.5 6.84 40.9
        matmul first last 45 5.98 51.6
        matmul last first 35 6 52.3
        matmul last last 36.4 6.25 45.8
        weights 34.9 5.54 128
        contract 19.7 0 0
        move 31 0 29.2
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
