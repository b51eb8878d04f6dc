"""The axes and cores of a layer as bit masks, and what becomes of them where ``x`` meets some cores.

The order of axes that a step creates is left open until a later step asks for one: an order is a tuple of sets, each in
any order.
"""

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

from tnlayers.geometry import Geometry
from tnlayers.network import TensorNetwork
from tnlayers.notation import Axes

GROUP = "(group)"
"""The axis of the groups, which no user can name, since a name is letters and digits."""

EXACT = 10
"""Up to this many cores, every order is searched; with more, x meets the cores one by one, or all at once."""


class Roles(NamedTuple):
    """What the axes of ``x`` and of a tensor become where they meet, as sets."""

    folded: int
    groups: int
    summed: int
    new: int
    kernel: int


class Space:
    """The axes and cores of a layer as bit masks; made once for a network and a geometry.

    Attributes:
        cores: the axes of each core; where the groups divide the first output factor, that is split into GROUP and
            the rest.
        names, sizes: of every axis, by its bit.
        inputs, outputs, kernel: the bits of the channel axes of x and y, in order, and of the kernel axes.
        split: whether the groups are an axis of the network; without groups they are.
        tensors: every connected set of cores.
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
        self.masks = tuple(sum(bit[axis] for axis in core) for core in self.cores)
        self.all = (1 << len(self.cores)) - 1
        self.volume = cache(self._volume)
        self.weight_axes = cache(self._weight_axes)
        self.x_axes = cache(self._x_axes)
        self.roles = cache(self._roles)
        singles = [1 << k for k in range(len(self.cores))]
        self.tensors = singles if len(singles) > EXACT else self._connected(singles)

    def _connected(self, singles: list[int]) -> list[int]:
        found, fresh = set(singles), singles
        while fresh:
            fresh = [
                tensor | core
                for tensor in fresh
                for core in singles
                if not tensor & core and self.weight_axes(tensor) & self.masks[core.bit_length() - 1]
            ]
            fresh = sorted(set(fresh) - found)
            found.update(fresh)
        return sorted(found)

    def _volume(self, axes: int) -> int:
        return math.prod(size for k, size in enumerate(self.sizes) if axes >> k & 1)

    def _union(self, cores: int) -> int:
        union = 0
        for k, mask in enumerate(self.masks):
            if cores >> k & 1:
                union |= mask
        return union

    def _weight_axes(self, cores: int) -> int:
        """The axes of what some cores contract to: dense ones, and those that other cores have too."""
        return self._union(cores) & (self._union(self.all & ~cores) | sum({*self.inputs, *self.outputs, *self.kernel}))

    def _x_axes(self, absorbed: int) -> int:
        """The channel axes of what ``x`` has become."""
        rest = self._union(self.all & ~absorbed)
        have = sum(self.inputs) | self._union(absorbed)
        return have & (rest | sum(self.outputs)) & ~sum(self.kernel)

    def _roles(self, absorbed: int, tensor: int) -> Roles:
        x, w, y = self.x_axes(absorbed), self.weight_axes(tensor), self.x_axes(absorbed | tensor)
        kernel = w & sum(self.kernel)
        w &= ~kernel
        return Roles(x & ~w, x & w & y, x & w & ~y, w & ~x, kernel)

    def channels(self, absorbed: int, tensor: int) -> tuple[int, int, int, int]:
        """How many channels are folded, groups, summed and new; groups of the dense kernel need not be an axis."""
        if tensor == self.all:
            groups = self.geometry.groups
            return 1, groups, self.geometry.in_channels // groups, self.geometry.out_channels // groups
        folded, groups, summed, new = (self.volume(role) for role in self.roles(absorbed, tensor)[:4])
        return folded, groups, summed, new

    def axes(self, mask: int) -> Axes:
        """The names of a set of axes."""
        return tuple(name for k, name in enumerate(self.names) if mask >> k & 1)


@lru_cache(maxsize=1024)
def space(network: TensorNetwork, geometry: Geometry) -> Space:
    """The search space of a layer."""
    return Space(network, geometry)


def refine(order: Sequence[int], classes: Sequence[int]) -> tuple[int, ...] | None:
    """Split the sets of an order such that all axes of a class come before those of the next; None if none can.

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
