"""Rates of operations: seconds per call, per FLOP and per byte of each kind, from which the planner estimates times.

A plan's cost is the sum over its operations. Rates for training cover forward and backward. Only ratios between plans
matter, so one table serves all machines of a kind. ``rate_tables`` picks the table of a device.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tnlayers.backend.views import FIRST, LAST

RUN_MODES = ("train", "infer", "cached")
"""Forward and backward; forward alone; forward with weights cached by an earlier call."""

WEIGHTS, CONTRACT, MOVE = "weights", "contract", "move"
"""The kinds of operation that are not input steps."""

SINGLE = "single"
"""One small image, for which torch on a CPU has another convolution."""


KEPT = 1 << 62
"""Value of ``large`` where the allocator keeps tensors of every size."""

KINDS = (
    "conv first", "conv last", "point first", "point last", "group first", "group last", "depth first", "depth last",
    "conv single", "point single", "matmul first first", "matmul first last", "matmul last first", "matmul last last",
    "matmul group", WEIGHTS, CONTRACT, MOVE,
)  # fmt: skip
"""Every kind of operation, as ``Rates`` describes them."""


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
        return cls(lanes, large=KEPT, fault=0.0, doubt=0.0, train=table, infer=table)

    def of(self, mode: str) -> Mapping[str, Rate]:
        """Return the table for one of RUN_MODES."""
        return self.train if mode == "train" else self.infer


def lanes(first: int, last: int, single: int) -> Mapping[str, int]:
    """Return the multiples of channels in convolutions, by memory layout and for one small image."""
    return MappingProxyType({FIRST: first, LAST: last, SINGLE: single})
