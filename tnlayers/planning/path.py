"""What the search for a plan is about: the setting, the steps to choose from with their costs, and what it finds."""

from typing import NamedTuple

from tnlayers.planning.search_space import Channels, CoreMask


class Cost(NamedTuple):
    """Estimated seconds in the setting's mode and of the forward alone; the forward's FLOPs, and bytes moved."""

    seconds: float
    forward: float
    flops: int
    bytes: int


FREE = Cost(0.0, 0.0, 0, 0)


class PathStep(NamedTuple):
    """One way for ``x`` to meet a tensor.

    The operation and its row in the table of rates, layouts, whether ``x`` is copied before and ``y`` after. ``part``
    is what one more part of the batch costs in training: a call, and the weight read and its gradient added to the sum.
    """

    cores: CoreMask
    op: str
    kind: str
    source: str
    target: str
    moved: bool
    tail: bool
    before: tuple[int, ...]
    after: tuple[int, ...]
    cost: Cost
    part: float


class StepSizes(NamedTuple):
    """How large a step is.

    Attributes:
        channels: of the input, the weight and the result.
        x, y, weight: entries of the input, the result and the weight.
        flops: floating-point operations of the step.
    """

    channels: Channels
    x: int
    y: int
    weight: int
    flops: int


PathSteps = tuple[PathStep, ...]
"""A complete way without its costs: one for inputs of many sizes."""


class Path(NamedTuple):
    """A complete way: its options in order, and its cost with all contractions of weights."""

    options: tuple[PathStep, ...]
    seconds: float

    @property
    def path(self) -> PathSteps:
        """It without its costs."""
        return tuple(option._replace(cost=FREE, part=0.0) for option in self.options)
