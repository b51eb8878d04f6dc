"""Axes and cores of a layer as bit masks, and the roles of axes in input steps.

The order of axes that a step creates stays open until a later step requires one: an order is a tuple of sets, each in
any order.
"""

import operator
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from itertools import combinations
from typing import NamedTuple

from tnlayers.ops.contraction import pairs
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.network import TensorNetwork
from tnlayers.spec.notation import Axes, bits

GROUP = "(group)"
"""Axis of the groups. It is no valid name for a user's axis, which has only letters and digits."""

MOST_SETS = 64
"""Maximum number of connected sets of cores that the search examines in full: some 30 ms. Measured."""

UNITS, FEW = 8, 4
"""Numbers of units that cores are merged to, in a network with more connected sets: for ``_some``, for ``_coarse``."""


# Aliases, no NewTypes: `&` and `|` of two masks give an int, which a NewType would wrap again in every inner loop.
AxisMask = int
"""A set of axes: bit k is set if it contains axis k."""
CoreMask = int
"""A set of cores: bit k is set if it contains core k. The set also denotes the tensor that these cores contract to."""


class Roles(NamedTuple):
    """Roles of the axes in one step.

    Attributes:
        folded: axes of the input alone, folded into the batch.
        groups: axes of input, weight and result.
        summed: axes of input and weight, but not of the result.
        new: axes of the weight alone.
        kernel: kernel axes of the weight.
    """

    folded: AxisMask
    groups: AxisMask
    summed: AxisMask
    new: AxisMask
    kernel: AxisMask


class Channels(NamedTuple):
    """Numbers of channels of a step: folded into the batch, groups, summed, and new."""

    folded: int
    groups: int
    summed: int
    new: int


class SearchSpace:
    """Axes and cores of a layer as bit masks, computed once per network and geometry.

    Attributes:
        cores: axes of each core. If the groups divide the first output factor, that is split into GROUP and the rest.
        names, sizes: of every axis, in the order of bits.
        inputs, outputs, kernel: bits of the channel axes of x and y, in order, and of the kernel axes.
        split: whether the groups are an axis of the network; true without groups.
        singles: every core as a set.
        params: number of entries of all cores.
        exact: whether steps may absorb every connected set of cores, since there are at most MOST_SETS.
    """

    def __init__(self, network: TensorNetwork, geometry: Geometry) -> None:
        self.network, self.geometry = network, geometry
        groups, top = geometry.groups, network.outputs[0]
        self.split = network.sizes[top] % groups == 0
        sizes = dict(network.sizes)
        group: tuple[str, ...] = ()
        if groups > 1 and self.split:
            sizes |= {GROUP: groups, top: sizes[top] // groups}
            group = (GROUP,)
        self.cores: tuple[Axes, ...] = tuple(
            tuple(a for axis in core for a in ((*group, top) if axis == top else (axis,))) for core in network.cores
        )
        self.names = tuple(sizes)
        self.sizes = tuple(sizes.values())
        bit = {name: 1 << k for k, name in enumerate(self.names)}
        self.inputs = tuple(bit[axis] for axis in (*group, *network.inputs))
        self.outputs = tuple(bit[axis] for axis in (*group, *network.outputs))
        self.kernel = tuple(bit[axis] for axis in network.kernel)
        self.unions = _tables([sum(bit[axis] for axis in core) for core in self.cores], operator.or_, 0)
        self.volumes = _tables(self.sizes, operator.mul, 1)
        self.all = (1 << len(self.cores)) - 1
        self.params = network.num_params
        self.ends = sum(self.inputs), sum(self.outputs), sum(self.kernel)
        self.dense = self.ends[0] | self.ends[1] | self.ends[2]
        self.volume = cache(self._volume)
        self.weight_axes = cache(self._weight_axes)
        self.x_axes = cache(self._x_axes)
        self.roles, self.channels = cache(self._roles), cache(self._channels)
        self.singles = [1 << k for k in range(len(self.cores))]
        self.tensors, self.coarse, self.merges = cache(self._tensors), cache(self._coarse), cache(self._merges)
        self.known = cache(lambda: frozenset(self.tensors()))
        self._every = self._connected()
        self.exact = self._every is not None

    def _tensors(self) -> list[int]:
        """Return the sets that a step may absorb: every connected set if these are few, else ``_some``."""
        return self._some() if self._every is None else self._every

    def _connected(self) -> list[int] | None:
        """Return every connected set of cores; None if there are more than MOST_SETS."""
        found, fresh = set(self.singles), self.singles
        while fresh:
            grown = set()
            for tensor in fresh:
                axes = self.weight_axes(tensor)
                grown |= {tensor | core for core in self.singles if not tensor & core and axes & self._union(core)}
                if len(found) + len(grown) > MOST_SETS:
                    return None
            fresh = sorted(grown - found)
            found.update(fresh)
        return sorted(found)

    def _some(self) -> list[int]:
        """Return connected sets: units, runs, pairs, results of a greedy contraction, and the complements of all."""
        units = sorted(self.units(UNITS), key=lambda unit: unit & -unit)
        count = len(units)
        runs = (units[start:stop] for start in range(count) for stop in range(start + 1, count + 1))
        made = (left | right for left, right in self.merges()[len(self.cores) - count :])
        found = {*map(sum, runs), *map(sum, combinations(units, 2)), *made}
        found |= {self.all & ~part for part in found}
        return sorted(part for part in found if part and self._joined([unit for unit in units if unit & part]))

    def _coarse(self) -> frozenset[int]:
        """Return the unions of FEW units, the empty one included; a search examines them in any case."""
        units = self.units(FEW)
        return frozenset(sum(chunks) for size in range(len(units) + 1) for chunks in combinations(units, size))

    def _joined(self, chunks: Sequence[int]) -> bool:
        """Return whether sets of cores are connected with each other."""
        first, *rest = chunks
        while rest:
            near = [part for part in rest if self.weight_axes(part) & self.weight_axes(first)]
            if not near:
                return False
            first |= sum(near)
            rest = [part for part in rest if part not in near]
        return True

    def _merges(self) -> list[tuple[int, int]]:
        """Return the pairs of sets by which the cores contract greedily.

        Pairs that join axes of the fewest of input, output and kernel go first, then those that add the least memory.
        """
        made, sizes = list(self.singles), dict(zip(self.names, self.sizes, strict=True))
        found = []
        for a, b in pairs(self.cores, self.axes(self.dense), sizes, [self.axes(end) for end in self.ends]):
            found.append((made[a], made[b]))
            made.append(made[a] | made[b])
        return found

    def units(self, most: int) -> list[int]:
        """Return at most ``most`` sets of cores, after the first of ``_merges``."""
        units = list(self.singles)
        for left, right in self.merges()[: max(0, len(units) - most)]:
            units = [*(unit for unit in units if unit not in (left, right)), left | right]
        return units

    def halve(self, cores: CoreMask) -> int:
        """Return one of the two parts of a set of cores that are merged last."""
        for left, right in reversed(self.merges()):
            if cores & left and cores & right:
                return cores & left
        raise ValueError("a single core has no parts")

    def _union(self, cores: CoreMask) -> int:
        union = 0
        for table in self.unions:
            union |= table[cores & _LOW]
            cores >>= _CHUNK
        return union

    def _volume(self, axes: AxisMask) -> int:
        total = 1
        for table in self.volumes:
            total *= table[axes & _LOW]
            axes >>= _CHUNK
        return total

    def _weight_axes(self, cores: CoreMask) -> int:
        """Return the axes of some cores' contraction: dense axes, and those that other cores have too."""
        return self._union(cores) & (self._union(self.all & ~cores) | self.dense)

    def _x_axes(self, absorbed: CoreMask) -> int:
        """Return the channel axes of ``x`` after it absorbed some cores."""
        have = self.ends[0] | self._union(absorbed)
        return have & (self._union(self.all & ~absorbed) | self.ends[1]) & ~self.ends[2]

    def _roles(self, absorbed: CoreMask, tensor: CoreMask) -> Roles:
        x, w, y = self.x_axes(absorbed), self.weight_axes(tensor), self.x_axes(absorbed | tensor)
        kernel = w & self.ends[2]
        w &= ~kernel
        return Roles(x & ~w, x & w & y, x & w & ~y, w & ~x, kernel)

    def taps(self, tensor: CoreMask) -> int:
        """Count the taps of a step's kernel axes."""
        return self.volume(self.weight_axes(tensor) & self.ends[2])

    def _channels(self, absorbed: CoreMask, tensor: CoreMask) -> Channels:
        """Count the channels of a step by role. Groups of the dense kernel need not be an axis."""
        if tensor == self.all:
            groups = self.geometry.groups
            return Channels(1, groups, self.geometry.in_channels // groups, self.geometry.out_channels // groups)
        folded, groups, summed, new, _ = self.roles(absorbed, tensor)
        volume = self.volume
        return Channels(volume(folded), volume(groups), volume(summed), volume(new))

    def axes(self, mask: AxisMask) -> Axes:
        """Return the names of a set of axes."""
        return tuple(self.names[k] for k in bits(mask))


_CHUNK = 8
_LOW = (1 << _CHUNK) - 1


def _tables(values: Sequence[int], join: Callable[[int, int], int], start: int) -> list[list[int]]:
    """Tabulate the join of every subset of each eight values. Planning spends its time in these look-ups."""
    tables = []
    for first in range(0, len(values), _CHUNK):
        table = [start]
        for value in values[first : first + _CHUNK]:
            table += [join(entry, value) for entry in table]
        tables.append(table)
    return tables


@lru_cache(maxsize=256)
def space_of(network: TensorNetwork, geometry: Geometry) -> SearchSpace:
    """Return the search space of a layer."""
    return SearchSpace(network, geometry)


def refine(order: Sequence[int], classes: Sequence[int]) -> tuple[int, ...] | None:
    """Split the sets of an order so that each class of axes precedes the next; return None if that is impossible.

    Example:
        >>> refine((0b001, 0b110), (0b011, 0b100)), refine((0b100, 0b011), (0b011, 0b100))
        ((1, 2, 4), None)
    """
    refined, last = [], 0
    for axes in order:
        for number, members in enumerate(classes):
            if part := axes & members:
                if number < last:
                    return None
                last = number
                refined.append(part)
    return tuple(refined)
