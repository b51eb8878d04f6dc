"""Search for the fastest plan: A* over the cores that ``x`` has absorbed, with bounded work.

A state is the set of absorbed cores, the memory layout of the channels of ``x``, and the order of its axes. An input
step absorbs any set of the other cores. A first step that absorbs all cores reconstructs the dense kernel. Dynamic
programming over subsets finds how the cores of a set contract. An entry's priority is its seconds so far plus a lower
bound of the rest, so paths come out cheapest first, and no entry above the last path asked for is expanded.

The search is exact if the network has few connected sets of cores and at most WORK pairs. In larger networks, steps
absorb only some sets (see ``search_space``). After WORK pairs, the search becomes a beam: all states with the same
number of cores together have a share of WORK, and steps with the smallest results go first. Unions of a few units of
cores are examined in any case.
"""

import heapq
import math
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import count

from tnlayers.backend.rates import Rates
from tnlayers.planning.options import Pricing
from tnlayers.planning.path import Path, PathStep
from tnlayers.planning.search_space import CoreMask, SearchSpace
from tnlayers.planning.setting import Setting

WORK = 320
"""Maximum number of pairs (absorbed cores, next cores) in an exact search: some 10 ms. Measured."""

WAYS = 2
"""Maximum number of ways to a state that are followed: a third, costlier one gives no runner-up."""

MANY = 16, 48
"""Numbers of cores and axes above which WORK is reduced, because each pair takes longer."""


_State = tuple[int, str, tuple[int, ...]]
"""The absorbed cores, the memory layout of the channels of ``x``, and the order of its axes."""

_Entry = tuple[float, int, float, _State, tuple[PathStep, ...], int]


class Search:
    """Search for the paths in one setting.

    Args:
        space: search space of the layer.
        setting: setting to plan for.
        rates: costs of operations.
        strategy: 'auto'; 'reconstruct', one step with the dense kernel; 'factorized', one step for each core; or the
            set of cores of each step, in order.
        thrifty: whether the backward recomputes everything, in the maximum number of chunks of the batch.
        work: see WORK.

    Attributes:
        pricing: costs of steps.
        limit: maximum seconds of a path.
    """

    def __init__(
        self,
        space: SearchSpace,
        setting: Setting,
        rates: Rates,
        strategy: str | tuple[int, ...] = "auto",
        thrifty: bool = False,
        work: float = WORK,
    ) -> None:
        self.space, self.setting = space, setting
        self.work = work * min(1, MANY[0] / len(space.cores), MANY[1] / len(space.names))
        self.pricing = Pricing(space, setting, rates, thrifty)
        self.sequence = strategy if isinstance(strategy, tuple) else None
        # If the groups are not an axis of the network, only the dense kernel has them.
        grouped = space.split or space.geometry.groups == 1
        if self.sequence:
            self.tensors = [*self.sequence]
        elif strategy == "factorized":
            self.tensors = space.singles
        else:
            self.tensors = sorted({*(space.tensors() if strategy == "auto" and grouped else []), space.all})
        self.limit = math.inf
        self._priced: set[tuple[int, int]] = set()
        self._beam = Counter[int]()
        self.bound = cache(self._bound)

    def __iter__(self) -> Iterator[Path]:
        """Yield every path, the cheapest first; after WORK pairs, only some."""
        space, pricing, ties = self.space, self.pricing, count()
        # An entry: its priority, a lower bound of the seconds of every path through it; a tie-breaker; its seconds so
        # far; the state; the options that led to it; and the cores to absorb next, 0 if not yet chosen.
        heap: list[_Entry] = [(0.0, next(ties), 0.0, (0, self.setting.layout, space.inputs), (), 0)]
        seen = Counter[_State]()
        steps: dict[tuple[_State, int], list[tuple[float, PathStep, _State]]] = {}
        while heap:
            turn, tie, seconds, state, options, tensor = heapq.heappop(heap)
            absorbed = state[0]
            if turn > self.limit:
                return
            if absorbed == space.all:
                yield Path(options, seconds)
            elif tensor:
                after = absorbed | tensor
                later = pricing.ahead(after)
                if (least := seconds + pricing.least(absorbed, tensor) + later) > turn:
                    heapq.heappush(heap, (least, tie, seconds, state, options, tensor))
                    continue
                if (state, tensor) not in steps:
                    found = pricing.options(absorbed, tensor, *state[1:])
                    steps[state, tensor] = [
                        (
                            pricing.seconds(absorbed, option),
                            option,
                            (after, self.setting.layout if option.tail else option.target, option.after),
                        )
                        for option in found
                    ]
                for step, option, reached in steps[state, tensor]:
                    if seen[reached] < WAYS:
                        so_far = seconds + step
                        entry = so_far + later, next(ties), so_far, reached, (*options, option), 0
                        heapq.heappush(heap, entry)
            elif seen[state] < WAYS:
                seen[state] += 1
                for following in self._free(absorbed, len(options)):
                    turn = seconds + self.bound(absorbed, following) + pricing.ahead(absorbed | following)
                    heapq.heappush(heap, (turn, next(ties), seconds, state, options, following))

    def _bound(self, absorbed: CoreMask, tensor: CoreMask) -> float:
        """Return a lower bound of ``Pricing.least`` that needs no roles of axes: all at the lowest rates."""
        space, pricing, after = self.space, self.pricing, absorbed | tensor
        places = pricing.length(absorbed if space.geometry.transposed else after)
        flops = 2 * self.setting.batch * space.volume(space.x_axes(absorbed) | space.weight_axes(tensor)) * places
        size = (pricing.entries(absorbed) + pricing.entries(after)) * pricing.itemsize
        step = pricing.floor.seconds(flops, size)
        return pricing.contractions.of(tensor)[1].seconds + pricing.call(tensor) + step

    def _free(self, absorbed: CoreMask, number: int) -> list[int]:
        """Return the sets of cores that the next step may absorb; after WORK pairs, only those in the beam."""
        space = self.space
        if self.sequence:
            return [self.sequence[number]]
        late, level, share, few = len(self._priced) > self.work, absorbed.bit_count(), 0, False
        if late:
            share = max(0, math.ceil(self.work / len(space.cores)) - self._beam[level])
            few = self.tensors is not space.singles and absorbed in space.coarse()
            if not share and not few:
                return []
        reach = space.x_axes(absorbed) | space.ends[2]
        free = [tensor for tensor in self.tensors if not tensor & absorbed]
        free = [tensor for tensor in free if space.weight_axes(tensor) & reach] or free
        if late:
            always = [tensor for tensor in free if tensor in space.coarse()] if few else []
            others = [tensor for tensor in free if tensor not in always] if share else []
            others = heapq.nsmallest(share, others, key=lambda tensor: space.volume(space.x_axes(absorbed | tensor)))
            self._beam[level] += len(others)
            free = always + others
        self._priced.update([(absorbed, tensor) for tensor in free])
        return free
