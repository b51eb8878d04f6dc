"""The search for the fastest plan: A* over what ``x`` has met so far, bounded.

A state is the set of cores that ``x`` has absorbed, where its channels lie in memory, and in which order. From there
``x`` may meet any tensor that some of the other cores contract to; to meet all of them at once, in the first step, is
to reconstruct the dense kernel. How cores contract among themselves is found by dynamic programming over subsets.
Trails come out cheapest first, and nothing costlier than the last one asked for is ever looked at.

The search is exact where a network has few connected sets of cores and WORK steps are enough. Of larger networks ``x``
may meet some sets only (see ``search_space``), and behind WORK steps the search becomes a beam: from all states with
as many cores, a share of WORK is looked at, those steps first that leave ``x`` smallest. What a few units of cores make
is looked at in any case.
"""

import heapq
import math
from collections import Counter
from collections.abc import Iterator
from itertools import count

from tnlayers.backend.rates import Rates
from tnlayers.planning.options import Pricing
from tnlayers.planning.path import Path, PathStep
from tnlayers.planning.search_space import CoreMask, SearchSpace
from tnlayers.planning.setting import Setting

WORK = 320
"""Pairs of what ``x`` has met and may meet next, up to which the search is exact: some 10 ms. Measured."""

MANY = 16, 48
"""With more cores than this, or more axes, each pair takes longer, and there is time for fewer of them."""


_State = tuple[int, str, tuple[int, ...]]
"""The cores that ``x`` has met, where its channels lie, and in which order."""

_Entry = tuple[float, int, float, _State, tuple[PathStep, ...], int]


class Search:
    """The search for one setting.

    Args:
        where: the space.
        setting: what to plan for.
        rates: what operations cost.
        strategy: 'auto'; 'reconstruct', in which x meets the dense kernel alone; 'factorized', in which x meets the
            cores one by one; or the sets of cores that x meets, in order.
        thrifty: whether the backward makes everything again, in as many parts of the batch as there may be.
        work: see WORK.

    Attributes:
        pricing: what steps cost.
        limit: seconds; no costlier trail is wanted.
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
        # Groups that are no axis of the network are known to the dense kernel alone.
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

    def __iter__(self) -> Iterator[Path]:
        """Every trail, the cheapest first; behind WORK entries, some."""
        space, pricing, ties = self.space, self.pricing, count()
        # The seconds that give an entry its turn, a bound below those of every trail through it; a tie-breaker; seconds
        # so far, the state, the options that led to it, and the tensor to meet next, 0 if that is open.
        heap: list[_Entry] = [(0.0, next(ties), 0.0, (0, self.setting.layout, space.inputs), (), 0)]
        seen = Counter[_State]()
        steps: dict[tuple[_State, int], list[tuple[float, PathStep]]] = {}
        while heap:
            turn, _, seconds, state, options, tensor = heapq.heappop(heap)
            absorbed = state[0]
            if turn > self.limit:
                return
            if absorbed == space.all:
                yield Path(options, seconds)
            elif tensor:
                if (state, tensor) not in steps:
                    found = pricing.options(absorbed, tensor, *state[1:])
                    steps[state, tensor] = [(pricing.seconds(absorbed, option), option) for option in found]
                later = pricing.ahead(absorbed | tensor)
                for step, option in steps[state, tensor]:
                    reached = absorbed | tensor, self.setting.layout if option.tail else option.target, option.after
                    entry = seconds + step + later, next(ties), seconds + step, reached, (*options, option), 0
                    heapq.heappush(heap, entry)
            else:
                seen[state] += 1
                if seen[state] > 2:  # of two ways to the same state, the third and costlier one leads to no runner-up
                    continue
                for following in self._free(absorbed, len(options)):
                    turn = seconds + pricing.least(absorbed, following) + pricing.ahead(absorbed | following)
                    heapq.heappush(heap, (turn, next(ties), seconds, state, options, following))

    def _free(self, absorbed: CoreMask, number: int) -> list[int]:
        """The sets of cores that ``x`` may meet next; in the end, those of them that there is time for."""
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
        self._priced.update((absorbed, tensor) for tensor in free)
        return free
