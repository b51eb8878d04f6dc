"""The search for the fastest plan: uniform-cost search over what ``x`` has met so far.

A state is the set of cores that ``x`` has absorbed, where its channels lie in memory, and in which order. From there
``x`` may meet any tensor that some of the other cores contract to; to meet all of them at once, in the first step, is
to reconstruct the dense kernel. How cores contract among themselves is found by dynamic programming over subsets. Costs
are those of ``tnlayers.rates``. Trails come out cheapest first, and nothing costlier than the last one asked for is
ever looked at.

Sets of cores and of axes are bit masks, see ``tnlayers.space``.
"""

import heapq
import math
from collections.abc import Iterator
from functools import cache
from itertools import count

from tnlayers.contraction import order
from tnlayers.meeting import CONV, MATMUL
from tnlayers.product import FIRST, LAST
from tnlayers.rates import CONTRACT, MOVE, SINGLE, WEIGHTS, Rates, floor
from tnlayers.space import EXACT, Space, refine
from tnlayers.trail import Cost, Option, Setting, Sizes, Trail

_CACHED = 1e-3
"""Share at which contractions of weights count where they are cached: enough to prefer the smaller ones."""

_SINGLE = 20480
"""Entries up to which torch gives one image on a CPU to another convolution, which turns channels last around."""

COLUMNS = 16
"""Matrix products over the positions of an image pay for these in multiples of this."""

PARTS = 16
"""The largest number of parts into which the backward cuts the batch."""


_State = tuple[int, str, tuple[int, ...]]
"""The cores that ``x`` has met, where its channels lie, and in which order."""

_Entry = tuple[float, int, float, _State, tuple[Option, ...], int]


class Search:
    """The search for one setting.

    Args:
        where: the space.
        setting: what to plan for.
        rates: what operations cost.
        strategy: 'auto'; 'reconstruct', in which x meets the dense kernel alone; 'factorized', in which x meets the
            cores one by one; or the sets of cores that x meets, in order.
        thrifty: whether the backward makes everything again, in as many parts of the batch as there may be.

    Attributes:
        parts: how many that are.
    """

    def __init__(
        self,
        where: Space,
        setting: Setting,
        rates: Rates,
        strategy: str | tuple[int, ...] = "auto",
        thrifty: bool = False,
    ) -> None:
        self.space, self.setting, self.rates, self.thrifty = where, setting, rates, thrifty
        self.parts = min(PARTS, setting.batch)
        self.mode, self.infer, self.itemsize = rates.of(setting.mode), rates.infer, setting.dtype.itemsize
        self.sequence = strategy if isinstance(strategy, tuple) else None
        singles = [1 << k for k in range(len(where.cores))]
        # Groups that are no axis of the network are known to the dense kernel alone.
        grouped = where.split or where.geometry.groups == 1
        sets = {"auto": where.tensors if grouped else [], "reconstruct": [], "factorized": singles}
        tensors = self.sequence or sets[str(strategy)]
        self.tensors = sorted({*tensors, where.all} if strategy in ("auto", "reconstruct") else tensors)
        self.contraction, self.known = cache(self._contraction), frozenset(where.tensors)
        geometry = where.geometry
        nothing = ((0, 0),) * geometry.ndim
        pads, later = (geometry.pads, nothing) if geometry.prepad else (nothing, geometry.pads)
        before = [size + sum(pad) for size, pad in zip(setting.size, pads, strict=True)]
        after = geometry.output_size(setting.size)
        taps = zip(where.kernel, geometry.kernel_size, before, after, strict=True)
        self.places = {bit: places for bit, _, *places in taps}
        each = (geometry.each(name) for name in ("kernel_size", "stride", "output_padding"))
        axes = zip(where.kernel, *each, later, strict=True)
        self.trivial = sum(
            bit for bit, size, stride, more, pad in axes if size == stride == 1 and not more and not any(pad)
        )
        self.length, self.sizes, self.free = cache(self._length), cache(self._sizes), cache(self._free)
        self.ahead = cache(self._ahead)
        self.floor = floor(self.mode)

    def __iter__(self) -> Iterator[Trail]:
        """Every trail, the cheapest first."""
        where, ties = self.space, count()
        # The seconds that give an entry its turn, a bound below those of every trail through it; a tie-breaker; seconds
        # so far, the state, the options that led to it, and the tensor to meet next, 0 if that is open.
        heap: list[_Entry] = [(0.0, next(ties), 0.0, (0, self.setting.layout, where.inputs), (), 0)]
        seen: dict[_State, int] = {}
        steps: dict[tuple[_State, int], list[tuple[float, Option]]] = {}
        while heap:
            _, _, seconds, state, options, tensor = heapq.heappop(heap)
            absorbed = state[0]
            if absorbed == where.all:
                yield Trail(options, seconds)
            elif tensor:
                if (state, tensor) not in steps:
                    found = self._options(absorbed, tensor, *state[1:])
                    steps[state, tensor] = [(self._seconds(absorbed, option), option) for option in found]
                later = self.ahead(absorbed | tensor)
                for step, option in steps[state, tensor]:
                    reached = absorbed | tensor, self.setting.layout if option.tail else option.target, option.after
                    entry = seconds + step + later, next(ties), seconds + step, reached, (*options, option), 0
                    heapq.heappush(heap, entry)
            else:
                seen[state] = seen.get(state, 0) + 1
                if seen[state] > 2:  # of two ways to the same state, the third and costlier one leads to no runner-up
                    continue
                for following, least in self.free(absorbed, len(options)):
                    turn = seconds + least + self.ahead(absorbed | following)
                    heapq.heappush(heap, (turn, next(ties), seconds, state, options, following))

    def _free(self, absorbed: int, number: int) -> list[tuple[int, float]]:
        """The sets of cores that ``x`` may meet next, each with the least seconds that it can take."""
        where = self.space
        if self.sequence:
            free = [self.sequence[number]]
        else:
            reach = where.x_axes(absorbed) | sum(where.kernel)
            free = [tensor for tensor in self.tensors if not tensor & absorbed]
            free = [tensor for tensor in free if where.weight_axes(tensor) & reach] or free
        return [(tensor, self._least(absorbed, tensor)) for tensor in free]

    def _least(self, absorbed: int, tensor: int) -> float:
        """A bound below the seconds of every option, whatever its kind."""
        sizes = self.sizes(absorbed, tensor)
        entries = sizes.x + sizes.y + sizes.weight
        return self.contraction(tensor)[1].seconds + self.floor.seconds(sizes.flops, entries * self.itemsize)

    def _ahead(self, absorbed: int) -> float:
        """A bound below the seconds that are left: at least one step more, which reads ``x`` and writes the output."""
        if absorbed == (where := self.space).all:
            return 0.0
        entries = sum(where.volume(where.x_axes(state)) * self.length(state) for state in (absorbed, where.all))
        return self.floor.seconds(0, self.setting.batch * entries * self.itemsize)

    def _seconds(self, absorbed: int, option: Option) -> float:
        """What a step adds to the time of a trail, with what its weight takes."""
        weights, cost = self.contraction(option.cores)[1], option.cost
        seconds = weights.seconds + cost.seconds
        if option.cores & (option.cores - 1) and self.setting.mode != "cached":
            seconds += self.mode[CONTRACT].call
        if not self.thrifty:
            return seconds
        again = 0.0 if absorbed | option.cores == self.space.all else cost.forward
        return seconds + weights.forward + again + (self.parts - 1) * option.part

    def _length(self, absorbed: int) -> int:
        """Positions per image once ``x`` has met some cores."""
        met = self.space._union(absorbed)
        return math.prod(after if bit & met else before for bit, (before, after) in self.places.items())

    def _sizes(self, absorbed: int, tensor: int) -> Sizes:
        """What is multiplied where ``x`` meets a tensor."""
        where, batch = self.space, self.setting.batch
        f, g, s, n = where.channels(absorbed, tensor)
        before, after = self.length(absorbed), self.length(absorbed | tensor)
        taps = where.volume(where.roles(absorbed, tensor).kernel)
        # Each entry of the input of a transposed convolution meets every tap, else each entry of the output does.
        flops = 2 * batch * f * g * s * n * taps * (before if where.geometry.transposed else after)
        return Sizes(f, g, s, n, batch * f * g * s * before, batch * f * g * n * after, g * s * n * taps, flops)

    def _cost(self, kind: str, flops: int, entries: int, padded: int | None = None) -> Cost:
        size = entries * self.itemsize
        work = flops if padded is None else padded
        forward = self.infer[kind].seconds(work, size)
        seconds = forward if self.mode is self.infer else self.mode[kind].seconds(work, size)
        return Cost(seconds, forward, flops, size)

    def _fresh(self, made: int, gradient: int) -> Cost:
        """What it takes to have memory for a large result and, in the backward, for a gradient."""
        large, each = self.rates.large, self.rates.fault * self.itemsize
        forward = made * each if made * self.itemsize > large else 0.0
        training = self.setting.mode == "train" and gradient * self.itemsize > large
        return Cost(forward + (gradient * each if training else 0.0), forward, 0, 0)

    def _contraction(self, tensor: int) -> tuple[tuple[int, int] | None, Cost]:
        """The two parts of a set of cores that meet last, and the cost of contracting all of it."""
        where = self.space
        if not tensor & (tensor - 1):
            return None, Cost(0.0, 0.0, 0, 0)
        if tensor == where.all and len(where.cores) > EXACT:
            return (0, 0), self._greedy()
        axes, volume, rate = where.weight_axes(tensor), where.volume, self.mode[WEIGHTS]
        share = _CACHED if self.setting.mode == "cached" else 1.0
        best: tuple[float, int, int, int] | None = None
        for left in self._parts(tensor, tensor & -tensor):
            a, b = where.weight_axes(left), where.weight_axes(tensor & ~left)
            flops = 2 * volume(a | b) if (a | b) != axes else 0
            entries = volume(a) + volume(b) + volume(axes)
            seconds = share * rate.seconds(flops, entries * self.itemsize)
            seconds += self.contraction(left)[1].seconds + self.contraction(tensor & ~left)[1].seconds
            if best is None or seconds < best[0]:
                best = seconds, left, flops, entries
        assert best is not None
        seconds, left, flops, entries = best
        halves = left, tensor & ~left
        step = self._cost(WEIGHTS, flops, entries)
        total = _sum(step, _sum(*(self.contraction(half)[1] for half in halves)))
        return halves, total._replace(seconds=seconds)

    def between(self, tensor: int) -> int:
        """Entries of all that the contraction of some cores makes, its result included."""
        halves, _ = self.contraction(tensor)
        if halves is None or halves == (0, 0):
            return 0 if halves is None else self.space.volume(self.space.weight_axes(tensor))
        return self.space.volume(self.space.weight_axes(tensor)) + sum(map(self.between, halves))

    def _greedy(self) -> Cost:
        """The cost of contracting very many cores in a greedy order."""
        where, total = self.space, Cost(0.0, 0.0, 0, 0)
        sizes = dict(zip(where.names, where.sizes, strict=True))
        dense = tuple(name for axis in (*where.outputs, *where.inputs, *where.kernel) for name in where.axes(axis))
        for step in order(where.cores, tuple(dict.fromkeys(dense)), tuple(sizes.items())).steps:
            total = _sum(total, self._cost(WEIGHTS, step.flops, step.entries))
        return total

    def _parts(self, tensor: int, lowest: int) -> Iterator[int]:
        """Half of the ways to split a set of cores into two connected ones, or one way if it is not connected."""
        known = self.known
        connected = [part for part in self.space.tensors if part & lowest and part & tensor == part != tensor]
        found = [part for part in connected if tensor & ~part in known]
        return iter(found or connected[-1:])

    def _options(self, absorbed: int, tensor: int, layout: str, axes: tuple[int, ...]) -> Iterator[Option]:
        """Every way to do the step from a state to the next."""
        where, geometry = self.space, self.space.geometry
        roles = where.roles(absorbed, tensor)
        final = absorbed | tensor == where.all
        dense = tensor == where.all
        f, g, s, n, x, y, weight, flops = self.sizes(absorbed, tensor)
        pointwise = not roles.kernel & ~self.trivial
        classes = (0, 0, where.x_axes(0), 0) if dense else roles[:3]

        def option(op: str, source: str, target: str, order: tuple[int, ...] | None) -> Option:
            moved = order is None
            parts = order if order is not None else where.inputs if dense else tuple(role for role in classes if role)
            if dense:
                result: tuple[int, ...] = where.outputs
            else:
                kept = tuple(part for part in parts if not part & roles.summed)
                result = (*kept, roles.new) if roles.new else kept
            tail = final and (target != self.setting.layout or refine(result, where.outputs) is None)
            if op == CONV:
                laid, deep = SINGLE if tiny else source, s == n == 1 < g
                kind = f"{'depth' if deep else 'group' if g > 1 else 'point' if pointwise else 'conv'} {laid}"
                lanes = self.rates.lanes[laid]
                work = flops if deep else flops // (s * n) * _up(s, lanes) * _up(n, lanes)
            elif source == target == LAST:
                kind, work = "matmul last last" if g == 1 else "matmul group", flops
            else:
                kind, columns = f"matmul {source} {target}", self.length(absorbed)
                work = flops // columns * _up(columns, COLUMNS)
            cost = self._cost(kind, flops, x + y + weight, work)
            part = self.rates.train[kind].seconds(0, 3 * weight * self.itemsize)
            for moving, entries in ((moved, x), (tail, y)):
                if moving:
                    cost = _sum(cost, self._cost(MOVE, 0, 2 * entries))
                    cost = _sum(cost, self._fresh(entries, entries))
            cost = _sum(cost, self._fresh(y, x))
            return Option(tensor, op, kind, source, target, moved, tail, parts, result, cost, part)

        tiny = self.setting.device == "cpu" and self.setting.batch * f == g == 1 and x <= _SINGLE
        straight = axes if dense else refine(axes, classes)
        if not geometry.ndim:
            yield option(MATMUL, LAST, LAST, straight)
            return
        here = straight if layout == FIRST else None
        yield option(CONV, FIRST, FIRST, here)
        if layout == LAST and geometry.ndim > 1 and f == 1 and straight is not None and not tiny:
            yield option(CONV, LAST, LAST, straight)
        if not pointwise:
            return
        yield option(MATMUL, FIRST, FIRST, here)
        if layout == LAST and straight is not None:
            yield option(MATMUL, LAST, LAST, straight)
        if g > 1:
            return
        other = LAST if layout == FIRST else FIRST
        if f == 1 and (not final or other == self.setting.layout):
            yield option(MATMUL, layout, other, straight)


def _sum(a: Cost, b: Cost) -> Cost:
    return Cost(a.seconds + b.seconds, a.forward + b.forward, a.flops + b.flops, a.bytes + b.bytes)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
