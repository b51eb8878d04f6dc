"""Choice of a lookup's plan: which cores are contracted before rows are gathered from them, and in which order."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from tnlayers.backend.rate_tables import rates_of
from tnlayers.backend.rates import CONTRACT, MOVE, WEIGHTS
from tnlayers.ops.contraction import Contraction
from tnlayers.ops.gather import Gather
from tnlayers.planning.choose import LIMIT, parse, tuned_choice
from tnlayers.planning.core_contractions import contractions
from tnlayers.planning.lookup_plan import LookupPlan, Part
from tnlayers.planning.search_space import CoreMask, SearchSpace, space_of
from tnlayers.planning.setting import INDEX, STRATEGIES, Setting
from tnlayers.planning.tuned import Choice
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.network import TensorNetwork
from tnlayers.spec.notation import bits

BEAM = 64
"""Maximum number of sets of cores of one size that the search goes on from."""

_DIGITS = 32
"""Bytes that are moved per index to compute its digits."""


class _Route(NamedTuple):
    """Sets of cores in order, with the estimated seconds, the entries that training holds, and the largest tensor."""

    seconds: float
    sets: tuple[CoreMask, ...]
    held: int
    largest: int


def candidates(
    network: TensorNetwork, geometry: Geometry, setting: Setting, strategy: str = "auto", memory: str = "auto"
) -> Iterator[LookupPlan]:
    """Yield plans of a lookup, the fastest by estimate first, with the safety margin ``doubt`` of the rate table.

    The number of tokens is rounded up to a power of two for the search.

    Args:
        network: network of the table; its input axes are the factors of the vocabulary.
        geometry: the linear map of one-hot rows.
        setting: number of tokens, mode, device and dtype.
        strategy: 'reconstruct' builds the table; 'factorized' gathers from each core; 'auto' searches; '0 > 1*2'
            gathers from core 0 and from the contraction of cores 1 and 2, and joins the slices in this order.
        memory: 'auto' keeps the peak of a training step within LIMIT times that of the table with its gradient.

    Raises:
        TypeError, ValueError: the strategy is invalid.

    Example:
        >>> cp = TensorNetwork.parse("i1:64 r:8, i2:64 r, o:64 r")
        >>> [next(candidates(cp, Geometry(4096, 64, ()), Setting(batch, ()))).strategy for batch in (16, 1 << 20)]
        ['factorized', 'reconstruct']
    """
    setting = replace(setting, layout=INDEX)
    near = replace(setting, batch=1 << (setting.batch - 1).bit_length())
    for route in _routes(network, geometry, near, strategy, memory):
        parts = tuple(_part(network, geometry, near, cores) for cores in route.sets)
        yield LookupPlan(network, geometry, setting, parts, route.seconds, _peak(network, near, route))


def plan(
    network: TensorNetwork, geometry: Geometry, setting: Setting, strategy: str = "auto", memory: str = "auto"
) -> LookupPlan:
    """Return the plan of least estimated time, in doubt the table's; ``candidates`` describes the arguments.

    For 'auto', an order that ``tnlayers.autotune`` kept for exactly this setting comes first.
    """
    choice = tuned(network, geometry, setting, memory) if strategy == STRATEGIES[0] else None
    return next(candidates(network, geometry, setting, choice.order if choice else strategy, memory))


def tuned(network: TensorNetwork, geometry: Geometry, setting: Setting, memory: str) -> Choice | None:
    """Return what ``tnlayers.autotune`` kept for lookups in a setting, or None."""
    return tuned_choice(network, geometry, replace(setting, layout=INDEX), memory)


@lru_cache(maxsize=1024)
def _routes(
    network: TensorNetwork, geometry: Geometry, setting: Setting, strategy: str, memory: str
) -> tuple[_Route, ...]:
    """Return routes in the order of ``candidates``."""
    named, space = parse(strategy, network, geometry), space_of(network, geometry)
    price = _Pricing(space, setting)
    if named == "reconstruct":
        named = (space.all,)
    if not isinstance(named, str):
        return (price.route(named),)
    found = _search(space, price, space.singles if named == "factorized" else space.tensors())
    if named == "factorized":
        return tuple(sorted(found))
    limit = LIMIT * 2 * setting.dtype.itemsize * (network.dense_params + setting.batch * geometry.out_channels)
    fits = [r for r in found if setting.mode != "train" or memory == "low" or _peak(network, setting, r) <= limit]
    doubt, dense = price.rates.doubt, price.route((space.all,))
    others = [route for route in fits if len(route.sets) > 1]
    return tuple(sorted([dense, *others], key=lambda r: r.seconds * (1 if r.sets == dense.sets else 1 + doubt)))


def _search(space: SearchSpace, price: "_Pricing", sets: Sequence[CoreMask]) -> list[_Route]:
    """Return the best complete route for each last set of cores, by a beam search over the sets of absorbed cores."""
    levels: list[dict[CoreMask, _Route]] = [{} for _ in range(len(space.cores) + 1)]
    levels[0][0] = price.start
    complete = []
    for level in levels[:-1]:
        for absorbed, route in sorted(level.items(), key=lambda item: item[1])[:BEAM]:
            free = [cores for cores in sets if not cores & absorbed]
            near = [cores for cores in free if space.weight_axes(cores) & space.weight_axes(absorbed)]
            for cores in near or free:
                if len(route.sets) == 1 and cores < absorbed:
                    continue  # the first two are joined in either order
                new, longer = absorbed | cores, price.extend(route, absorbed, cores)
                if new == space.all:
                    complete.append(longer)
                elif (known := levels[new.bit_count()].get(new)) is None or longer < known:
                    levels[new.bit_count()][new] = longer
    return complete


class _Pricing:
    """Costs of a lookup's operations in one setting."""

    def __init__(self, space: SearchSpace, setting: Setting) -> None:
        self.space, self.setting = space, setting
        self.rates = rates_of(setting.device, str(setting.dtype).removeprefix("torch."))
        self.table, self.item = self.rates.of(setting.mode), setting.dtype.itemsize
        self.contractions = contractions(space, self.rates, setting.mode, self.item)
        self.start = _Route(0.0, (), 0, 0)
        self.training, self.cached = setting.mode == "train", setting.mode == "cached"

    def route(self, sets: Sequence[CoreMask]) -> _Route:
        """Return the route through given sets of cores."""
        route, absorbed = self.start, 0
        for cores in sets:
            route = self.extend(route, absorbed, cores)
            absorbed |= cores
        return route

    def extend(self, route: _Route, absorbed: CoreMask, cores: CoreMask) -> _Route:
        """Return a route with one more set of cores: contracted, gathered from, and joined."""
        space, tokens = self.space, self.setting.batch
        axes, inputs = space.weight_axes(cores), space.ends[0]
        seconds, held, made = route.seconds + self.contractions.of(cores)[1].seconds, route.held, []
        whole = space.volume(axes)
        if cores & (cores - 1):
            held += 2 * self.contractions.between(cores)
            if not self.cached:
                seconds += self.table[CONTRACT].call
                made.append(whole)
        operand = space.volume(axes & ~inputs)
        if axes & inputs:
            operand *= tokens
            moved = 2 * operand + (whole if self.training else 0)  # the gradient is scattered into zeros
            seconds += self.table[MOVE].seconds(0, moved * self.item + _DIGITS * tokens)
            made.append(operand)
        if absorbed:
            state, result = self._state(absorbed), self._state(absorbed | cores)
            union = (space.x_axes(absorbed) | axes) & ~inputs
            many = tokens if (self._has_tokens(absorbed) or axes & inputs) else 1
            flops = 2 * many * space.volume(union) if union != space.x_axes(absorbed | cores) & ~inputs else 0
            seconds += self.table[WEIGHTS].seconds(flops, (state + operand + result) * self.item)
            seconds += self.table[CONTRACT].call if absorbed == route.sets[0] else 0.0
            made.append(result)
        for entries in made:
            size = entries * self.item
            seconds += self.rates.fault * size * (2 if self.training else 1) if size > self.rates.large else 0.0
        held += sum(made[-2:] if axes & inputs else made[-1:])
        return _Route(seconds, (*route.sets, cores), held, max(route.largest, *made, 0))

    def _has_tokens(self, absorbed: CoreMask) -> bool:
        return bool(self.space.weight_axes(absorbed) & self.space.ends[0])

    def _state(self, absorbed: CoreMask) -> int:
        """Return the number of entries of the slices joined so far."""
        axes = self.space.x_axes(absorbed) & ~self.space.ends[0]
        return self.space.volume(axes) * (self.setting.batch if self._has_tokens(absorbed) else 1)


def _peak(network: TensorNetwork, setting: Setting, route: _Route) -> int:
    """Return the estimated peak bytes of a training step: the cores, what is held, and two gradients."""
    return setting.dtype.itemsize * (2 * network.num_params + route.held + 2 * route.largest)


@lru_cache(maxsize=4096)
def _part(network: TensorNetwork, geometry: Geometry, setting: Setting, mask: CoreMask) -> Part:
    """Return the part of a set of cores."""
    space = space_of(network, geometry)
    rates = rates_of(setting.device, str(setting.dtype).removeprefix("torch."))
    priced = contractions(space, rates, setting.mode, setting.dtype.itemsize)
    cores, axes = tuple(bits(mask)), space.axes(space.weight_axes(mask))
    inputs = tuple(axis for axis in network.inputs if axis in axes)
    outputs = tuple(axis for axis in network.outputs if axis in axes)
    rest = (*(axis for axis in axes if axis not in (*inputs, *outputs)), *outputs)
    if len(cores) == 1:
        rest = tuple(axis for axis in network.cores[cores[0]] if axis not in inputs)
    operands = [network.cores[k] for k in cores]
    contraction = Contraction.of(operands, priced.pairs(mask, cores), (*inputs, *rest), network.sizes)
    gather = Gather.of(network.shape(network.inputs), [network.inputs.index(axis) for axis in inputs])
    rows = math.prod(network.shape(inputs))
    return Part(cores, contraction, inputs, rest, rows, gather, network.shape(rest))
