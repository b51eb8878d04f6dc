"""The choice of a plan: the fastest one by estimate, under a limit on memory."""

import heapq
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from tnlayers import errors
from tnlayers.assemble import Plan, assemble, peak
from tnlayers.geometry import Geometry
from tnlayers.network import TensorNetwork
from tnlayers.rates import rates
from tnlayers.search import Search, Setting, Trail
from tnlayers.space import space

STRATEGIES = ("auto", "reconstruct", "factorized")
MEMORY = ("auto", "low")

LIMIT = 1.2
"""With memory='auto', what a training step may take at its peak, over what it would take with a dense kernel."""

CHUNKS = 16
"""The largest number of parts into which a batch is cut where the forward is run again in the backward."""

TWICE = 1.4
"""Time of such a run over the sum of its estimates: many small operations, and sums of gradients. Measured."""


@lru_cache(maxsize=4096)
def plan(
    network: TensorNetwork,
    geometry: Geometry,
    setting: Setting,
    strategy: str = "auto",
    memory: str = "auto",
) -> Plan:
    """The plan of least estimated time; see ``candidates`` for the arguments.

    Example:
        >>> cp = TensorNetwork.parse("i:64 r:16, o:64 r, h:3 r, w:3 r")
        >>> found = plan(cp, Geometry(64, 64, (3, 3), padding=1), Setting(32, (32, 32)))
        >>> found.order, [meeting.op for meeting in found.meetings]
        ('0 > 2*3 > 1', ['matmul', 'conv', 'matmul'])
    """
    return next(candidates(network, geometry, setting, strategy, memory))


def candidates(
    network: TensorNetwork,
    geometry: Geometry,
    setting: Setting,
    strategy: str = "auto",
    memory: str = "auto",
) -> Iterator[Plan]:
    """Plans by estimated time, the fastest first.

    Args:
        network: the kernel's network.
        geometry: the convolution.
        setting: sizes, layout, mode, device and dtype.
        strategy: 'reconstruct' builds the dense kernel; 'factorized' lets ``x`` meet the cores one by one; 'auto' takes
            every way into account; '0 > 1*2' lets ``x`` meet core 0, then what cores 1 and 2 contract to.
        memory: 'auto' keeps the peak of a training step within LIMIT times the dense layer's; 'low' keeps nothing
            between forward and backward but the input.

    Yields:
        Plan: in the order of ``seconds``.

    Raises:
        TypeError, ValueError: the strategy is refused, see ``parse``; or the kernel is larger than the padded input.
    """
    where = space(network, geometry)
    named = parse(strategy, network, geometry)
    search = Search(where, setting, rates(setting.device, str(setting.dtype).removeprefix("torch.")), named)
    held = _passed(geometry, setting)
    dense = setting.dtype.itemsize * 2 * network.dense_params + held
    limit = LIMIT * dense if memory == "auto" else 0.0
    later: list[tuple[float, int, Trail]] = []  # trails beyond the limit, to run the forward again in so many parts
    for trail in search:
        size = peak(search, trail) if setting.mode == "train" else 0
        fits = setting.mode != "train" or size <= limit
        parts = 0 if fits else _parts(size, limit, setting.batch, held)
        while later and later[0][0] <= trail.seconds:
            yield _twice(search, heapq.heappop(later), held)
        if parts:
            again = TWICE * (trail.seconds + sum(option.cost.forward for option in trail.options))
            heapq.heappush(later, (again, parts, trail))
        # There is nothing smaller than the dense kernel; and what is asked for by name is done, whatever it takes.
        elif fits or (memory == "auto" and (len(trail.options) == 1 or strategy not in ("auto", "reconstruct"))):
            yield assemble(search, trail)
    while later:
        yield _twice(search, heapq.heappop(later), held)


def _twice(search: Search, pending: tuple[float, int, Trail], held: int) -> Plan:
    seconds, parts, trail = pending
    plan = assemble(search, trail)
    return replace(plan, seconds=seconds, chunks=parts, peak=_chunked(plan.peak, held, parts))


def _passed(geometry: Geometry, setting: Setting) -> int:
    """Bytes of the input, the output and their gradients."""
    x = geometry.in_channels * setting.batch * math.prod(setting.size)
    y = geometry.out_channels * setting.batch * math.prod(geometry.output_size(setting.size))
    return setting.dtype.itemsize * 2 * (x + y)


def _chunked(peak: int, held: int, parts: int) -> int:
    """The peak where all but what is held anyway comes in parts."""
    return held + peak // parts


def _parts(peak: int, limit: float, batch: int, held: int) -> int:
    """The fewest parts of the batch that fit; 0 if none do. Without a limit, as many as there may be."""
    most = min(CHUNKS, batch)
    if not limit:
        return most
    return next((parts for parts in range(2, most + 1) if _chunked(peak, held, parts) <= limit), 0)


def parse(strategy: str, network: TensorNetwork, geometry: Geometry) -> str | tuple[int, ...]:
    """One of STRATEGIES as it is; of an order such as '0 > 1*2', the sets of cores as bit masks.

    Raises:
        TypeError, ValueError: it is neither, does not name every core of the network once, or lets ``x`` meet less than
            the dense kernel where the groups do not divide the most significant output factor.
    """
    count, order = len(network.cores), None
    if strategy not in STRATEGIES:
        if not isinstance(strategy, str) or not strategy[:1].isdigit():
            errors.choice("strategy", strategy, STRATEGIES)
        try:
            sets = [[int(core) for core in part.split("*")] for part in strategy.split(">")]
        except ValueError:
            sets = []
        if sorted(core for part in sets for core in part) != list(range(count)):
            accepted = "', '".join(STRATEGIES)
            raise ValueError(
                f"strategy is {strategy!r}; accepted: '{accepted}', or an order such as '0 > 1*2' that names each of "
                f"the network's cores, 0 to {count - 1}, once"
            )
        order = tuple(sum(1 << core for core in part) for part in sets)
    split = geometry.groups == 1 or space(network, geometry).split
    if not split and (strategy == "factorized" or (order is not None and len(order) > 1)):
        raise ValueError(
            f"strategy is {strategy!r}, but groups ({geometry.groups}) does not divide the first factor of out_shape "
            f"{network.shape(network.outputs)}; choose another out_shape, or strategy='reconstruct'"
        )
    return strategy if order is None else order
