"""What an operation costs on a kind of device: seconds per call, per FLOP and per byte, measured once.

The table is printed by ``python benchmarks/measure/rates.py``. A plan's cost is the sum over its operations; a training
step's rates cover forward and backward. Only ratios between plans matter, so one table serves machines of a kind.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from tnlayers.backend.views import FIRST, LAST

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


def _table(text: str) -> Mapping[str, Rate]:
    """Lines of a kind and three numbers: microseconds per call, per million FLOPs, per megabyte."""
    rows = (line.rsplit(maxsplit=3) for line in text.strip().splitlines())
    return MappingProxyType(
        {
            kind.strip(): Rate(float(call) * 1e-6, float(flop) * 1e-12, float(byte) * 1e-12)
            for kind, call, flop, byte in rows
        }
    )


def lanes(first: int, last: int, single: int) -> Mapping[str, int]:
    """Of what multiples of channels convolutions pay for, by where those lie in memory, and of one small image."""
    return MappingProxyType({FIRST: first, LAST: last, SINGLE: single})


LARGE, FAULT = 1 << 25, 3.3e-10
"""Of glibc: copies of 34 MiB beside copies of 30 MiB."""


# AMD EPYC (AVX2), 2 threads, torch 2.13, float32; a run of measure/rates.py, 550 samples. The median relative error of
# the fit, 4 to 39 %, is added to it: of two operations as fast, the one that is easier to foresee is chosen. 'contract'
# is a contraction of 2 x 2 matrices through autograd, its one step included.
_CPU = Rates(
    lanes=lanes(8, 8, 8),
    large=LARGE,
    fault=FAULT,
    doubt=0.05,
    train=_table("""
        conv first 351 23 234
        conv last 270 21.4 96.8
        point first 370 20 220
        point last 270 19.1 101
        group first 362 43.9 245
        group last 296 20.1 334
        depth first 356 28.4 262
        depth last 271 51.7 86.3
        conv single 86 26.7 67.1
        point single 66.5 21.1 180
        matmul first first 90.7 21.3 130
        matmul first last 87.1 16.2 258
        matmul last first 97.3 17.7 197
        matmul last last 69.9 18.6 184
        matmul group 87.2 18.6 854
        weights 96.2 19.8 323
        contract 221 0 0
        move 46.2 0 61.3
    """),
    infer=_table("""
        conv first 143 7.86 91.3
        conv last 99.8 6.18 39
        point first 130 6 80.4
        point last 89.7 6.27 25.7
        group first 134 10.4 72.7
        group last 101 7.92 101
        depth first 138 1.51 75.9
        depth last 92.2 10.1 29
        conv single 27.2 6.67 140
        point single 19.5 5.53 93.4
        matmul first first 34 6.52 43.8
        matmul first last 42.8 6.62 41.6
        matmul last first 36.9 6.06 59.7
        matmul last last 34.7 5.95 45
        matmul group 54.8 5.95 305
        weights 47.2 5.62 120
        contract 21.9 0 0
        move 30.7 0 27.5
    """),
)

# Another AMD EPYC (AVX512), 2 threads, torch 2.13, float32; one run, 1,127 samples, median errors 5 to 39 %. oneDNN
# lays channels out in blocks of 16 where they come first: with multiples of 8, the fit foresees convolutions of few
# channels as 20 to 25 % faster than they are. Single images go another way, and the fit is nearest without multiples.
_CPU_AVX512 = Rates(
    lanes=lanes(16, 8, 1),
    large=LARGE,
    fault=FAULT,
    doubt=0.05,
    train=_table("""
        conv first 253 15.8 196
        conv last 199 16.4 189
        point first 278 14.6 364
        point last 197 16.3 119
        group first 284 7.92 321
        group last 218 15.3 321
        depth first 263 47.8 257
        depth last 211 9.52 145
        conv single 55 19.8 277
        point single 56.7 29.5 116
        matmul first first 57.5 24.4 117
        matmul first last 53.7 14 274
        matmul last first 57.6 16.5 224
        matmul last last 48 18.8 229
        matmul group 57.1 18.8 829
        weights 57.8 18.6 352
        contract 156 0 0
        move 23.8 0 79.1
    """),
    infer=_table("""
        conv first 107 5.79 28.2
        conv last 69.4 5.65 45.6
        point first 115 5.73 94.8
        point last 68 5.07 42
        group first 108 2.26 90.6
        group last 75.5 6.14 88.4
        depth first 109 2.94 91.9
        depth last 64.8 8.15 42.7
        conv single 21.5 4.88 181
        point single 14.2 17.1 46
        matmul first first 21.6 6.55 39.2
        matmul first last 25.9 5.76 41.1
        matmul last first 22.4 5.35 56.5
        matmul last last 21.8 6 38.5
        matmul group 36.2 6 314
        weights 30.3 5.83 116
        contract 14.6 0 0
        move 18.6 0 37.5
    """),
)

# The latter, bfloat16 (AVX512-bf16) with cores in float32; another run, 1,127 samples, median errors 3 to 35 %. In the
# layers of a ResNet, plans of several steps take up to a third more than foreseen, and dense kernels a sixth less.
_CPU_BF16 = Rates(
    lanes=lanes(16, 8, 8),
    large=LARGE,
    fault=FAULT,
    doubt=0.15,
    train=_table("""
        conv first 317 8.59 268
        conv last 247 9.1 209
        point first 327 7.18 333
        point last 233 7.2 115
        group first 279 6.22 422
        group last 264 14.2 346
        depth first 281 10.1 356
        depth last 210 19.7 93.2
        conv single 289 11.3 240
        point single 281 0 521
        matmul first first 159 6.12 286
        matmul first last 157 9.45 183
        matmul last first 147 7.34 186
        matmul last last 122 6.36 186
        matmul group 94 6.36 1.45e+03
        weights 65.3 19.1 562
        contract 148 0 0
        move 31 0 58.8
    """),
    infer=_table("""
        conv first 106 2.6 56
        conv last 76.1 2.66 51.2
        point first 121 2.62 78.3
        point last 74.6 2.37 32.7
        group first 106 1.18 129
        group last 84.4 4.65 58.9
        depth first 106 2.77 100
        depth last 69.6 5.07 29.9
        conv single 95.5 2.5 87.1
        point single 95.8 0 151
        matmul first first 53.6 2.07 94.4
        matmul first last 62.8 3.52 54.2
        matmul last first 56.1 2.22 76
        matmul last last 55.1 2.35 32.3
        matmul group 55.8 2.35 382
        weights 28.8 5.5 223
        contract 14.5 0 0
        move 19.4 0 28.8
    """),
)

TABLES: Mapping[tuple[str, str], Rates] = MappingProxyType(
    {("cpu", "float32"): _CPU, ("cpu avx512", "float32"): _CPU_AVX512, ("cpu", "bfloat16"): _CPU_BF16}
)
"""By kind of device and dtype; a CPU's kind may have its instructions behind it, as torch names them."""


def rates(device: str, dtype: str) -> Rates:
    """The table of a device kind and dtype, or the nearest there is: of the same device, then of any."""
    kinds = [f"cpu {torch.backends.cpu.get_cpu_capability().lower()}", "cpu"] if device == "cpu" else [device]
    keys = [(kind, name) for name in (dtype, "float32") for kind in kinds]
    return next((TABLES[key] for key in keys if key in TABLES), _CPU)
