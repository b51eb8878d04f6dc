"""Costs of plans: contractions of cores, and input steps.

Rates come from ``tnlayers.backend.rates``. Sets of cores and of axes are bit masks, see ``search_space``.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache

from tnlayers.backend.rates import CONTRACT, FORM_OF, MOVE, SINGLE, THREE, TRANSPOSED, Rates, floor, in_form
from tnlayers.backend.views import FIRST, LAST
from tnlayers.ops.input_step import CONV, MATMUL
from tnlayers.planning.core_contractions import added, contractions
from tnlayers.planning.path import FREE, Cost, Path, PathStep, PathSteps, StepSizes
from tnlayers.planning.search_space import CoreMask, SearchSpace, refine
from tnlayers.planning.setting import Setting

_SINGLE = 20480
"""Maximum entries of one image for which torch on a CPU has another convolution, which converts channels last."""


def is_single(channels: int, size: Sequence[int]) -> bool:
    """Return whether torch on a CPU convolves one image in another way. It does not count the third spatial axis.

    Example:
        >>> is_single(16, (32, 32)), is_single(16, (64, 64)), is_single(16, (32, 32, 99))
        (True, False, True)
    """
    return channels * math.prod(size[:2]) <= _SINGLE


_COPIES = in_form("conv single", THREE)
"""The kind of operation that first copies the input once for every tap."""

COLUMNS = 16
"""A matrix product over the positions of an image takes the time of the next multiple of this."""

PARTS = 16
"""Maximum number of chunks of the batch in the backward."""


class Pricing:
    """Costs of input steps in one setting.

    Args:
        space: search space of the layer.
        setting: setting to plan for.
        rates: costs of operations.
        thrifty: whether the backward recomputes everything, in the maximum number of chunks of the batch.

    Attributes:
        chunks: that number.
        contractions: of the cores.
    """

    def __init__(self, space: SearchSpace, setting: Setting, rates: Rates, thrifty: bool = False) -> None:
        self.space, self.setting, self.rates, self.thrifty = space, setting, rates, thrifty
        self.chunks = min(PARTS, setting.batch)
        self.mode, self.infer, self.itemsize = rates.of(setting.mode), rates.infer, setting.dtype.itemsize
        self.contractions = contractions(space, rates, setting.mode, self.itemsize)
        geometry = space.geometry
        nothing = ((0, 0),) * geometry.ndim
        pads, later = (geometry.pads, nothing) if geometry.prepad else (nothing, geometry.pads)
        before = [size + sum(pad) for size, pad in zip(setting.size, pads, strict=True)]
        after = geometry.output_size(setting.size)
        taps = zip(space.kernel, geometry.kernel_size, before, after, strict=True)
        self.places = {bit: places for bit, _, *places in taps}
        each = (geometry.each(name) for name in ("kernel_size", "stride", "output_padding"))
        axes = zip(space.kernel, *each, later, strict=True)
        self.trivial = sum(
            bit for bit, size, stride, more, pad in axes if size == stride == 1 and not more and not any(pad)
        )
        self.length, self.sizes = cache(self._length), cache(self._sizes)
        self.kinds, self.ways = cache(self._kinds), cache(self._ways)
        self.entries, self.ahead, self.least = cache(self._entries), cache(self._ahead), cache(self._least)
        self.form = FORM_OF[geometry.ndim]
        self.floor = floor(self.mode, (self.form, TRANSPOSED) if geometry.transposed else (self.form,))

    def _least(self, absorbed: CoreMask, tensor: CoreMask) -> float:
        """Return a lower bound of the seconds of a step's options: no reorder and no recomputation."""
        sizes = self.sizes(absorbed, tensor)
        size = (sizes.x + sizes.y + sizes.weight) * self.itemsize
        step = min(self.mode[kind].seconds(work, size) for *_, kind, work in self.kinds(absorbed, tensor))
        return self.contractions.of(tensor)[1].seconds + self.call(tensor) + step

    def _entries(self, absorbed: CoreMask) -> int:
        """Return the number of entries of ``x`` after it absorbed some cores."""
        return self.setting.batch * self.space.volume(self.space.x_axes(absorbed)) * self.length(absorbed)

    def call(self, tensor: CoreMask) -> float:
        """Return the seconds of a contraction beside its steps."""
        return self.mode[CONTRACT].call if tensor & (tensor - 1) and self.setting.mode != "cached" else 0.0

    def _ahead(self, absorbed: CoreMask) -> float:
        """Return a lower bound of the remaining seconds: one more step, which reads ``x`` and writes the output."""
        if absorbed == (space := self.space).all:
            return 0.0
        return self.floor.seconds(0, (self.entries(absorbed) + self.entries(space.all)) * self.itemsize)

    def seconds(self, absorbed: CoreMask, option: PathStep) -> float:
        """Return the seconds that a step adds to a path, its weight's contraction included."""
        weights, cost = self.contractions.of(option.cores)[1], option.cost
        seconds = weights.seconds + cost.seconds + self.call(option.cores)
        if not self.thrifty:
            return seconds
        again = 0.0 if absorbed | option.cores == self.space.all else cost.forward
        return seconds + weights.forward + again + (self.chunks - 1) * option.part

    def price(self, path: PathSteps) -> Path | None:
        """Return a path with its costs here; None if torch computes one of its steps in another way here."""
        absorbed, options, total = 0, [], 0.0
        for option in path:
            way = option.op, option.source, option.target
            if way not in self.ways(absorbed, option.cores):
                return None
            kind, cost, part = self._priced(absorbed, option.cores, way, option.moved, option.tail)
            here = option._replace(kind=kind, cost=cost, part=part)
            options.append(here)
            total += self.seconds(absorbed, here)
            absorbed |= option.cores
        return Path(tuple(options), total)

    def options(self, absorbed: CoreMask, tensor: CoreMask, layout: str, axes: tuple[int, ...]) -> Iterator[PathStep]:
        """Yield every option for the step from a state to the next."""
        space, roles = self.space, self.space.roles(absorbed, tensor)
        dense, final = tensor == space.all, absorbed | tensor == space.all
        classes = (0, 0, space.x_axes(0), 0) if dense else roles[:3]
        straight = axes if dense else refine(axes, classes)
        for way in self.ways(absorbed, tensor):
            op, source, target = way
            # A copy reorders the axes of x if necessary. It may also just change channels last to channels first.
            order = straight if source == layout else None
            if order is None and LAST in (source, target) and not (source == layout != target or not self.places):
                continue
            if source != target and (source != layout or (final and target != self.setting.layout)):
                continue
            before = order if order is not None else space.inputs if dense else tuple(role for role in classes if role)
            if dense:
                result: tuple[int, ...] = space.outputs
            else:
                kept = tuple(part for part in before if not part & roles.summed)
                result = (*kept, roles.new) if roles.new else kept
            tail = final and (target != self.setting.layout or refine(result, space.outputs) is None)
            kind, cost, part = self._priced(absorbed, tensor, way, order is None, tail)
            yield PathStep(tensor, op, kind, source, target, order is None, tail, before, result, cost, part)

    def _kinds(self, absorbed: CoreMask, tensor: CoreMask) -> list[tuple[str, str, str, str, int]]:
        """Return the operations for a step: op, source and target layout, row of the rate table, FLOPs.

        These FLOPs include padding: some operations round up their channels or positions.
        """
        channels, _, _, _, flops = self.sizes(absorbed, tensor)
        folded, groups, summed, new = channels
        pointwise = not self.space.roles(absorbed, tensor).kernel & ~self.trivial
        form = TRANSPOSED if self.space.geometry.transposed and not pointwise else self.form
        one = self.setting.device == "cpu" and self.setting.batch * folded == groups == 1
        tiny = one and is_single(summed, self._places(absorbed))
        found = []
        if self.places:
            deep = summed == new == 1 < groups
            family = "depth" if deep else "group" if groups > 1 else "point" if pointwise else "conv"
            for laid in (FIRST, LAST) if len(self.places) > 1 and folded == 1 and not tiny else (FIRST,):
                lanes = self.rates.lanes[SINGLE if tiny else laid]
                work = flops if deep else flops // (summed * new) * _up(summed, lanes) * _up(new, lanes)
                found.append((CONV, laid, laid, self._row(f"{family} {SINGLE if tiny else laid}", form), work))
        if pointwise:
            columns = self.length(absorbed)
            padded = flops // max(1, columns) * _up(columns, COLUMNS)
            if self.places:
                found.append((MATMUL, FIRST, FIRST, "matmul first first", padded))
            kind = "matmul last last" if groups == 1 else "matmul group"
            found.append((MATMUL, LAST, LAST, self._row(kind, self.form), flops))
            if self.places and folded == groups == 1:
                found.append((MATMUL, FIRST, LAST, "matmul first last", padded))
                found.append((MATMUL, LAST, FIRST, "matmul last first", padded))
        return found

    def _row(self, kind: str, form: str) -> str:
        """Return the row of the rate table for a kind in a form: the kind's own if the table has none for the form."""
        return own if (own := in_form(kind, form)) in self.mode else kind

    def _ways(self, absorbed: CoreMask, tensor: CoreMask) -> dict[tuple[str, str, str], tuple[str, Cost]]:
        """Map each operation for a step (op, source and target layout) to its row of the rate table and its cost."""
        _, x, y, weight, flops = self.sizes(absorbed, tensor)
        fresh = self._fresh(y, x)
        found = {}
        for op, source, target, kind, work in self.kinds(absorbed, tensor):
            entries = x + y + weight + self.copied(absorbed, tensor, kind)
            found[op, source, target] = kind, added(self._cost(kind, flops, entries, work), fresh)
        return found

    def copied(self, absorbed: CoreMask, tensor: CoreMask, kind: str) -> int:
        """Return the entries that a kind of operation copies of ``x`` before it multiplies."""
        taps = self.space.volume(self.space.roles(absorbed, tensor).kernel)
        return self.sizes(absorbed, tensor).x * taps if kind == _COPIES else 0

    def _priced(
        self, absorbed: CoreMask, tensor: CoreMask, way: tuple[str, str, str], moved: bool, tail: bool
    ) -> tuple[str, Cost, float]:
        """Return an option's row of the rate table, its cost with copies, and its part, see ``PathStep``."""
        kind, cost = self.ways(absorbed, tensor)[way]
        _, x, y, weight, _ = self.sizes(absorbed, tensor)
        for moving, entries in ((moved, x), (tail, y)):
            if moving:
                cost = added(cost, self._cost(MOVE, 0, 2 * entries, 0))
                cost = added(cost, self._fresh(entries, entries))
        return kind, cost, self.rates.train[kind].seconds(0, 3 * weight * self.itemsize)

    def _length(self, absorbed: CoreMask) -> int:
        """Return the positions per image after ``x`` absorbed some cores."""
        return math.prod(self._places(absorbed))

    def _places(self, absorbed: CoreMask) -> list[int]:
        """Return the size of an image along each axis after ``x`` absorbed some cores."""
        met = self.space._union(absorbed)
        return [after if bit & met else before for bit, (before, after) in self.places.items()]

    def _sizes(self, absorbed: CoreMask, tensor: CoreMask) -> StepSizes:
        """Return the sizes of an input step."""
        space, batch = self.space, self.setting.batch
        channels = space.channels(absorbed, tensor)
        folded, groups, summed, new = channels
        before, after = self.length(absorbed), self.length(absorbed | tensor)
        taps = space.taps(tensor)
        # Every tap is multiplied at each input position of a transposed convolution, else at each output position.
        flops = 2 * batch * folded * groups * summed * new * taps * (before if space.geometry.transposed else after)
        x, y = batch * folded * groups * summed * before, batch * folded * groups * new * after
        return StepSizes(channels, x, y, groups * summed * new * taps, flops)

    def _cost(self, kind: str, flops: int, entries: int, work: int) -> Cost:
        """Return the cost of an operation that takes the time of ``work >= flops`` FLOPs."""
        size = entries * self.itemsize
        forward = self.infer[kind].seconds(work, size)
        seconds = forward if self.mode is self.infer else self.mode[kind].seconds(work, size)
        return Cost(seconds, forward, flops, size)

    def _fresh(self, made: int, gradient: int) -> Cost:
        """Return the cost of allocating a large result and, in the backward, a large gradient."""
        large, each = self.rates.large, self.rates.fault * self.itemsize
        if max(made, gradient) * self.itemsize <= large:
            return FREE
        forward = made * each if made * self.itemsize > large else 0.0
        training = self.setting.mode == "train" and gradient * self.itemsize > large
        return Cost(forward + (gradient * each if training else 0.0), forward, 0, 0)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
