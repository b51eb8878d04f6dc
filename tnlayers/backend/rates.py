"""Rates of operations: seconds per call, per FLOP and per byte of each kind, from which the planner estimates times.

A plan's cost is the sum over its operations. Rates for training cover forward and backward. Only ratios between plans
matter, so one table serves all machines of a kind. ``rate_tables`` picks the table of a device.
"""

import math
from collections.abc import Mapping, Sequence
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
"""Every kind of operation that a table must have, as ``Rates`` describes them."""

FORMS = ROWS, ONE, THREE, TRANSPOSED = "rows", "1d", "3d", "transposed"
"""Forms of operations that differ from those on images: without positions, with 1 or 3 spatial axes, transposed."""

FORM_OF = MappingProxyType({0: ROWS, 1: ONE, 2: "", 3: THREE})
"""Form of what is not transposed, by the number of spatial axes."""


def in_form(kind: str, form: str) -> str:
    """Return the name of a kind in a form, which ``BASES`` need not have.

    Example:
        >>> in_form("conv last", THREE), in_form("matmul group", ROWS), in_form("move", "")
        ('conv 3d last', 'matmul rows group', 'move')
    """
    return kind.replace(" ", f" {form} ", 1) if form else kind


BASES = MappingProxyType({
    in_form(base, form): base
    for form, bases in (
        (ROWS, ("matmul last last", "matmul group")),
        (ONE, ("conv first", "group first", "depth first", "conv single")),
        (THREE, KINDS[:10]),
        (TRANSPOSED, (*KINDS[:2], *KINDS[4:9])),
    )
    for base in bases
})  # fmt: skip
"""The kinds that a table may have besides, such as 'conv 3d last', and the kind whose rates hold where it has not."""


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


def floor(table: Mapping[str, Rate], forms: Sequence[str] = ()) -> Rate:
    """Return the minimum of each number over the kinds of input step: of images, and of some forms."""
    others = (
        WEIGHTS,
        CONTRACT,
        MOVE,
        *(kind for kind, base in BASES.items() if kind not in [in_form(base, form) for form in forms]),
    )
    meetings = [rate for kind, rate in table.items() if kind not in others]
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
            cores; 'contract', the rest of each contraction; 'move', a copy into another order. A table may also have
            kinds of ``BASES``: 'rows', the matrix products of linear layers; '1d' and '3d' convolutions; 'transposed'
            ones, of any number of axes. Where it has none, the kind of images stands for it.
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
