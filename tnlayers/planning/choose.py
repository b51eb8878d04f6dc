"""Choice of a plan under a memory limit: the fastest by estimate, or in doubt the dense kernel's."""

import heapq
import itertools
import math
import operator
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache

from tnlayers import validate
from tnlayers.backend.rate_tables import rates_of
from tnlayers.backend.rates import MOVE
from tnlayers.planning.memory import MemoryEstimate
from tnlayers.planning.options import Pricing
from tnlayers.planning.path import Path, PathSteps
from tnlayers.planning.plan import Plan, Recompute, build_plan
from tnlayers.planning.search import Search
from tnlayers.planning.search_space import space_of
from tnlayers.planning.setting import STRATEGIES, Setting
from tnlayers.planning.tuned import Choice, kept, refuse
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.network import TensorNetwork

LIMIT = 1.5
"""Maximum estimated peak of a training step over a dense one, for memory='auto'. Measured, it is mostly 1.25."""

PATHS = 256
"""Maximum number of paths examined, once one of them gives a plan."""

_HUGE = 1 << 1000  # close to the largest float

KNOWN, NEAR = 24, 1.25
"""Per corner (see ``plan``): maximum number of steps in all paths kept, maximum time of one relative to the best."""


def plan(
    network: TensorNetwork,
    geometry: Geometry,
    setting: Setting,
    strategy: str = "auto",
    memory: str = "auto",
) -> Plan:
    """Return the plan of least estimated time, in doubt the dense kernel; ``candidates`` describes the arguments.

    For 'auto', an order that ``tnlayers.autotune`` kept for exactly this setting comes first, see ``tuned_choice``.
    The search runs only for batch and sizes that are powers of two. For other settings, it runs for the two corners
    around them. Their best paths are then priced again in the setting itself, which takes less than a millisecond.

    Example:
        >>> cp = TensorNetwork.parse("i:64 r:16, o:64 r, h:3 r, w:3 r")
        >>> found = plan(cp, Geometry(64, 64, (3, 3), padding=1), Setting(32, (32, 32)))
        >>> found.order, len(found.steps)
        ('0 > 2*3 > 1', 3)
    """
    choice = tuned_choice(network, geometry, setting, memory) if strategy == "auto" else None
    tuned = _plan(network, geometry, setting, strategy, memory, choice.order) if choice else None
    return tuned or _estimated(network, geometry, setting, strategy, memory)


def tuned_choice(network: TensorNetwork, geometry: Geometry, setting: Setting, memory: str) -> Choice | None:
    """Return what ``tnlayers.autotune`` kept for a setting, or None. An order of other cores gives a warning."""
    choice = kept(network, geometry, setting, memory)
    if choice is not None:
        try:
            parse(choice.order, network, geometry)
        except ValueError as error:
            refuse(network, geometry, setting, memory, str(error))
            return None
    return choice


def _estimated(network: TensorNetwork, geometry: Geometry, setting: Setting, strategy: str, memory: str) -> Plan:
    found = _plan(network, geometry, setting, strategy, memory, strategy)
    assert found is not None
    return found


@lru_cache(maxsize=4096)
def _plan(
    network: TensorNetwork, geometry: Geometry, setting: Setting, strategy: str, memory: str, named: str
) -> Plan | None:
    """Return the best plan of those ``named``, under the limits of ``strategy``; None if none is within them."""
    pricing = _search(network, geometry, setting, named, memory).pricing
    corners = _corners(network, geometry, setting)
    known = {steps: None for corner in corners for steps in _known(network, geometry, corner, named, memory)}
    paths = sorted(filter(None, map(pricing.price, known)), key=lambda path: path.seconds)
    return next((build_plan(pricing, *choice) for choice in _choices(pricing, paths, strategy, memory)), None)


def _corners(network: TensorNetwork, geometry: Geometry, setting: Setting) -> Iterator[Setting]:
    """Yield the settings around one whose batch and sizes are powers of two, if the kernel fits in."""
    numbers = setting.batch, *setting.size
    below = tuple(1 << number.bit_length() >> 1 for number in numbers)
    above = tuple(low if low == number else 2 * low for low, number in zip(below, numbers, strict=True))
    # If the search is not exact, only the upper corner is searched.
    for batch, *size in dict.fromkeys((below, above) if space_of(network, geometry).exact else (above,)):
        with suppress(ValueError):
            geometry.output_size(tuple(size))
            yield replace(setting, batch=batch, size=tuple(size))


@lru_cache(maxsize=4096)
def _known(
    network: TensorNetwork, geometry: Geometry, setting: Setting, strategy: str, memory: str
) -> tuple[PathSteps, ...]:
    """Return the best paths in a setting, and for 'auto' the dense kernel's, one of which can always run."""
    search = _search(network, geometry, setting, strategy, memory)
    found: list[Path] = []
    for path, recompute in _choices(search.pricing, search, strategy, memory):
        search.limit = min(search.limit, NEAR * (path.seconds + recompute.seconds))
        if found and sum(len(other.options) for other in (*found, path)) > KNOWN:
            break
        found.append(path)
    if strategy == "auto":
        found += _search(network, geometry, setting, "reconstruct", memory)
    return tuple(dict.fromkeys(path.path for path in found))


def _search(network: TensorNetwork, geometry: Geometry, setting: Setting, strategy: str, memory: str) -> Search:
    named = parse(strategy, network, geometry)
    table = rates_of(setting.device, str(setting.dtype).removeprefix("torch."))
    return Search(space_of(network, geometry), setting, table, named, memory == "low" and setting.mode == "train")


def candidates(
    network: TensorNetwork,
    geometry: Geometry,
    setting: Setting,
    strategy: str = "auto",
    memory: str = "auto",
) -> Iterator[Plan]:
    """Yield plans, the fastest by estimate first, with the safety margin ``doubt`` of the rate table.

    Args:
        network: the kernel's network.
        geometry: the convolution.
        setting: sizes, layout, mode, device and dtype.
        strategy: 'reconstruct' builds the dense kernel; 'factorized' contracts ``x`` with the cores one by one; 'auto'
            searches all paths; '0 > 1*2' contracts ``x`` with core 0, then with the contraction of cores 1 and 2.
        memory: 'auto' keeps the peak of a training step within LIMIT times the dense layer's; 'low' saves only the
            input between forward and backward.

    Yields:
        Plan: in the order of ``seconds``. For 'auto', plans other than the dense kernel's are ordered by
            ``seconds * (1 + doubt)``, see ``tnlayers.backend.rates``.

    Raises:
        TypeError, ValueError: the strategy is invalid, see ``parse``; or the kernel is larger than the padded input.
    """
    search = _search(network, geometry, setting, strategy, memory)
    for path, recompute in _choices(search.pricing, search, strategy, memory):
        yield build_plan(search.pricing, path, recompute)


def _choices(pricing: Pricing, paths: Iterable[Path], strategy: str, memory: str) -> Iterator[tuple[Path, Recompute]]:
    """Yield paths, given the fastest first, with their recomputation to save memory, in the order of ``candidates``."""
    setting, doubt = pricing.setting, pricing.rates.doubt if strategy == "auto" else 0.0
    limit = LIMIT * _dense(pricing)
    waiting: list[tuple[float, int, Path, Recompute]] = []  # until no later path can precede it
    some = False
    for number, path in enumerate(paths):
        if number >= PATHS and (some or waiting):
            break
        dense = len(path.options) == 1
        recompute: Recompute | None = Recompute()
        if pricing.thrifty:
            recompute = Recompute(saved=(False,) * (len(path.options) - 1), chunks=pricing.chunks, rebuild_weights=True)
        elif setting.mode == "train":
            recompute = _within(pricing, path, limit)
            # No plan is smaller than the dense kernel's, and a strategy given by name runs whatever memory it takes.
            if recompute is None and (dense or strategy not in ("auto", "reconstruct")):
                recompute = Recompute()
        if recompute is not None:
            seconds = (path.seconds + recompute.seconds) * (1 if dense else 1 + doubt)
            heapq.heappush(waiting, (seconds, number, path, recompute))
        while waiting and waiting[0][0] <= path.seconds:
            some = True
            yield heapq.heappop(waiting)[-2:]
    while waiting:
        yield heapq.heappop(waiting)[-2:]


def _within(pricing: Pricing, path: Path, limit: float) -> Recompute | None:
    """Return the fastest recomputation that keeps a path within a memory limit, or None."""
    found = MemoryEstimate.of(pricing, path)
    again = [option.cost.forward for option in path.options[:-1]]
    another = sum(option.part for option in path.options)
    saved = [True] * len(again)
    best: Recompute | None = None
    # Results are dropped in the order of recompute time per byte.
    for number in (None, *sorted(range(len(again)), key=lambda k: again[k] / min(max(1, found.tensors[k + 1]), _HUGE))):
        if number is not None:
            saved[number] = False
        if chunks := found.chunks(saved, limit, pricing.chunks):
            seconds = sum(itertools.compress(again, map(operator.not_, saved))) + (chunks - 1) * another
            if chunks > 1:  # the chunks of the input's gradient are concatenated, and those of the output may be
                joined = found.tensors[0] + (0 if any(saved) else found.tensors[-1])
                seconds += pricing.infer[MOVE].seconds(0, 2 * joined)
            best = min(best or Recompute(math.inf), Recompute(seconds, tuple(saved), chunks))
        if chunks == 1:
            break
    return best


def _dense(pricing: Pricing) -> int:
    """Return the bytes of the dense layer's training step: kernel, input and output, their gradients, and copies."""
    setting, geometry, every = pricing.setting, pricing.space.geometry, pricing.space.all
    x = geometry.in_channels * setting.batch * math.prod(setting.size)
    y = geometry.out_channels * setting.batch * math.prod(geometry.output_size(setting.size))
    copied = max(pricing.copied(0, every, kind) for *_, kind, _ in pricing.kinds(0, every))
    return setting.dtype.itemsize * (2 * (pricing.space.network.dense_params + x + y) + copied)


def parse(strategy: str, network: TensorNetwork, geometry: Geometry) -> str | tuple[int, ...]:
    """Return one of STRATEGIES unchanged, or an order such as '0 > 1*2' as bit masks of cores.

    Raises:
        TypeError, ValueError: it is neither; it does not name every core of the network once; or it has several steps
            although the groups do not divide the most significant output factor.
    """
    count, order = len(network.cores), None
    if strategy not in STRATEGIES:
        if not isinstance(strategy, str) or not strategy[:1].isdigit():
            validate.choice("strategy", strategy, (*STRATEGIES, "0 > 1*2"))
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
    split = geometry.groups == 1 or space_of(network, geometry).split
    if not split and (strategy == "factorized" or (order is not None and len(order) > 1)):
        raise ValueError(
            f"strategy is {strategy!r}, but groups ({geometry.groups}) does not divide the first factor of out_shape "
            f"{network.shape(network.outputs)}; choose another out_shape, or strategy='reconstruct'"
        )
    return strategy if order is None else order
