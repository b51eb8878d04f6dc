"""Contractions of a layer's cores with each other, and their costs."""

from collections.abc import Sequence
from functools import cache, lru_cache

from tnlayers.backend.rates import WEIGHTS, Rates
from tnlayers.planning.path import FREE, Cost
from tnlayers.planning.search_space import CoreMask, SearchSpace

_CACHED = 1e-3
"""Factor for the cost of contractions whose results are cached: enough to prefer the smaller ones."""


class Contractions:
    """Contractions of sets of cores and their costs, the same for inputs of every size.

    Attributes:
        of: returns for a set of cores its two parts contracted last (None for one core), and the total cost.
        between: returns the number of entries of all results in a set's contraction.
    """

    def __init__(self, space: SearchSpace, rates: Rates, mode: str, itemsize: int) -> None:
        self.space, self.table, self.infer, self.itemsize = space, rates.of(mode), rates.infer, itemsize
        self.share = _CACHED if mode == "cached" else 1.0
        self.of, self.between = cache(self._of), cache(self._between)

    def _of(self, tensor: CoreMask) -> tuple[tuple[int, int] | None, Cost]:
        if not tensor & (tensor - 1):
            return None, FREE
        space, volume = self.space, self.space.volume
        axes, rate = space.weight_axes(tensor), self.table[WEIGHTS]
        best: tuple[float, int, int, int] | None = None
        for left in self._lefts(tensor):
            a, b = space.weight_axes(left), space.weight_axes(tensor & ~left)
            flops = 2 * volume(a | b) if (a | b) != axes else 0
            entries = volume(a) + volume(b) + volume(axes)
            seconds = self.share * rate.seconds(flops, entries * self.itemsize)
            seconds += self.of(left)[1].seconds + self.of(tensor & ~left)[1].seconds
            if best is None or seconds < best[0]:
                best = seconds, left, flops, entries
        assert best is not None
        seconds, left, flops, entries = best
        halves = left, tensor & ~left
        size = entries * self.itemsize
        forward = self.infer[WEIGHTS].seconds(flops, size)
        step = Cost(seconds, forward, flops, size)
        total = added(step, added(*(self.of(half)[1] for half in halves)))
        return halves, total._replace(seconds=seconds)

    def _lefts(self, tensor: CoreMask) -> list[int]:
        """Return one part of each split of a set: into two sets of ``space.tensors``, or else as the cores merge."""
        lowest, others, known = tensor & -tensor, ~tensor, self.space.known()
        sets = self.space.tensors()
        found = [part for part in sets if not part & others and part & lowest and tensor & ~part in known]
        return found or [self.space.halve(tensor)]

    def pairs(self, tensor: CoreMask, cores: Sequence[int]) -> list[tuple[int, int]]:
        """Return the steps of a set's contraction in the form for ``tnlayers.ops.contraction.Contraction.of``."""
        found: list[tuple[int, int]] = []

        def visit(part: int) -> int:
            halves, _ = self.of(part)
            if halves is None:
                return cores.index(part.bit_length() - 1)
            found.append((visit(halves[0]), visit(halves[1])))
            return len(cores) + len(found) - 1

        visit(tensor)
        return found

    def _between(self, tensor: CoreMask) -> int:
        """Count the entries of all results in a set's contraction, the last included."""
        halves, _ = self.of(tensor)
        made = self.space.volume(self.space.weight_axes(tensor)) if halves else 0
        return made + sum(map(self.between, halves or ()))


@lru_cache(maxsize=512)
def contractions(space: SearchSpace, rates: Rates, mode: str, itemsize: int) -> Contractions:
    """Return the contractions of a layer's cores under a table of rates."""
    return Contractions(space, rates, mode, itemsize)


def added(a: Cost, b: Cost) -> Cost:
    """Return the sum of two costs."""
    return Cost(a.seconds + b.seconds, a.forward + b.forward, a.flops + b.flops, a.bytes + b.bytes)
