"""The choice of a plan: the fastest one by estimate, under a limit on memory."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from tnlayers import errors
from tnlayers.assemble import Plan, assemble
from tnlayers.geometry import Geometry
from tnlayers.network import TensorNetwork
from tnlayers.rates import rates
from tnlayers.search import Search, Setting
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
    device: str = "cpu",
    dtype: str = "float32",
) -> Plan:
    """The plan of least estimated time; see ``candidates`` for the arguments.

    Example:
        >>> cp = TensorNetwork.parse("i:64 r:16, o:64 r, h:3 r, w:3 r")
        >>> found = plan(cp, Geometry(64, 64, (3, 3), padding=1), Setting(32, (32, 32)))
        >>> found.order, [meeting.op for meeting in found.meetings]
        ('0 > 2*3 > 1', ['matmul', 'conv', 'matmul'])
    """
    return next(candidates(network, geometry, setting, strategy, memory, device, dtype))


def candidates(
    network: TensorNetwork,
    geometry: Geometry,
    setting: Setting,
    strategy: str = "auto",
    memory: str = "auto",
    device: str = "cpu",
    dtype: str = "float32",
) -> Iterator[Plan]:
    """Plans by estimated time, the fastest first.

    Args:
        network: the kernel's network.
        geometry: the convolution.
        setting: sizes, layout and mode.
        strategy: 'reconstruct' builds the dense kernel; 'factorized' lets ``x`` meet the cores one by one; 'auto' takes
            every way into account; '0 > 1*2' lets ``x`` meet core 0, then what cores 1 and 2 contract to.
        memory: 'auto' keeps the peak of a training step within LIMIT times the dense layer's; 'low' keeps nothing
            between forward and backward but the input.
        device: kind of device, as ``torch.device.type``.
        dtype: 'float32', 'bfloat16'...

    Yields:
        Plan: in the order of ``seconds``.

    Raises:
        TypeError, ValueError: the strategy is refused, see ``parse``; or the kernel is larger than the padded input.
    """
    where = space(network, geometry)
    named = parse(strategy, network, geometry)
    search = Search(where, setting, rates(device, dtype), named)
    limit = LIMIT * _dense_peak(network, geometry, setting) if memory == "auto" else 0.0
    later: list[Plan] = []  # trails that exceed the limit, made to run the forward twice
    for trail in search:
        found = assemble(search, trail)
        fits = setting.mode != "train" or found.peak <= limit
        if not fits and memory == "auto" and found.strategy == "reconstruct":
            fits = True  # there is nothing smaller than the dense kernel
        for pending in [p for p in later if p.seconds <= found.seconds]:
            later.remove(pending)
            yield pending
        again = None if fits else _again(found, limit)
        if again is not None:
            later.append(again)
        elif fits or strategy not in ("auto", "reconstruct"):  # what is asked for by name is done, whatever it takes
            yield found
    yield from sorted(later, key=lambda p: p.seconds)


def _dense_peak(network: TensorNetwork, geometry: Geometry, setting: Setting) -> int:
    """Bytes that a training step of the dense layer takes at its peak."""
    x = geometry.in_channels * setting.batch * math.prod(setting.size)
    y = geometry.out_channels * setting.batch * math.prod(geometry.output_size(setting.size))
    return setting.itemsize * (2 * network.dense_params + 2 * x + 2 * y)


def _again(plan: Plan, limit: float) -> Plan | None:
    """The plan with its forward run again in the backward, in the fewest parts that fit; None if none do."""
    batch = plan.setting.batch
    x = plan.geometry.in_channels * batch * math.prod(plan.setting.size)
    y = plan.geometry.out_channels * batch * math.prod(plan.geometry.output_size(plan.setting.size))
    always = plan.setting.itemsize * (2 * x + 2 * y)
    passing = plan.peak + plan.setting.itemsize * y - always // 2
    seconds = TWICE * (plan.seconds + sum(cost.forward for cost in plan.costs))
    for chunks in range(2, min(CHUNKS, batch) + 1):
        peak = always + passing // chunks
        if peak <= limit or (chunks == min(CHUNKS, batch) and not limit):
            return replace(plan, chunks=chunks, peak=peak, seconds=seconds)
    return replace(plan, chunks=1, seconds=seconds) if not limit else None


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
