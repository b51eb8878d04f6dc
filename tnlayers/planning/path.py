"""Types of the search for a plan: the options for a step with their costs, and the paths it finds."""

from typing import NamedTuple

from tnlayers.planning.search_space import Channels, CoreMask


class Cost(NamedTuple):
    """Estimated seconds in the setting's mode, seconds of the forward alone, FLOPs of the forward, and bytes moved."""

    seconds: float
    forward: float
    flops: int
    bytes: int


FREE = Cost(0.0, 0.0, 0, 0)


class PathStep(NamedTuple):
    """One option for an input step.

    It has the operation, its row of the rate table, the layouts, and whether ``x`` is copied before and ``y`` after.
    ``part`` is the cost of one more chunk of the batch in training: a call, a weight read, its gradient added up.
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
    """Sizes of a step.

    Attributes:
        channels: of input, weight and result, by role.
        x, y, weight: entries of the input, the result and the weight.
        flops: floating-point operations of the step.
    """

    channels: Channels
    x: int
    y: int
    weight: int
    flops: int


PathSteps = tuple[PathStep, ...]
"""A complete path without its costs, for inputs of many sizes."""


class Path(NamedTuple):
    """A complete path: its options in order, and its seconds with all contractions of weights."""

    options: tuple[PathStep, ...]
    seconds: float

    @property
    def path(self) -> PathSteps:
        """The options without their costs."""
        return tuple(option._replace(cost=FREE, part=0.0) for option in self.options)
