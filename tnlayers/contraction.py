"""Contracting tensors with named axes, two at a time: the steps, their order, and their execution in torch."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from tnlayers.network import TensorNetwork
from tnlayers.notation import Axes

NARROW = 16
"""With fewer columns than this in its result, BLAS crawls: by 5 on a matrix of 1000 x 9. Measured."""


@dataclass(frozen=True)
class Side:
    """One operand of a step, as a batch of matrices.

    Attributes:
        operand: its number.
        ready: whether it comes from another step, which brings it into ``shape``.
        source: the sizes of its axes as they come.
        order: the permutation after which the axes of a role lie side by side, or None if they do.
        shape: (batch, summed, free), or (batch, free, summed).
        summed_first: which of the two.
    """

    operand: int
    ready: bool
    source: tuple[int, ...]
    order: tuple[int, ...] | None
    shape: tuple[int, int, int]
    summed_first: bool

    def matrices(self, tensor: Tensor) -> Tensor:
        """A view of the operand where there is one, else a copy, of ``shape``."""
        if self.order is not None:
            tensor = tensor.reshape(self.source).permute(self.order)
        return tensor.reshape(self.shape)

    def back(self, gradient: Tensor) -> Tensor:
        """From ``shape`` to ``source``."""
        if self.order is None:
            return gradient.reshape(self.source)
        return gradient.reshape([self.source[k] for k in self.order]).permute(inverse(self.order))


@dataclass(frozen=True)
class Step:
    """Two operands meet in a batched matrix product. Operands are numbered from 0, results go on from there.

    Attributes:
        left, right: the operands; the left one's free axes come before the right one's in the result.
        axes: the axes of the left operand, of the right one, and of the result.
        shape: of the result, (batch, free of the left, free of the right).
    """

    left: Side
    right: Side
    axes: tuple[Axes, Axes, Axes]
    shape: tuple[int, int, int]

    @property
    def summed(self) -> int:
        """How many products an entry of the result sums."""
        return self.left.shape[1 if self.left.summed_first else 2]

    @property
    def flops(self) -> int:
        """Floating-point operations, two for each multiply-add; a product that sums nothing counts as none.

        This is how ``torch.utils.flop_counter`` counts matrix products and convolutions.
        """
        return 2 * self.summed * math.prod(self.shape) if self.summed > 1 else 0

    @property
    def entries(self) -> int:
        """Entries of the operands and of the result."""
        return sum(map(math.prod, (self.left.shape, self.right.shape, self.shape)))

    def run(self, left: Tensor, right: Tensor) -> Tensor:
        """The result, of ``shape``."""
        a, b = self._left(left), self._right(right)
        return a * b if self.summed == 1 else _product(a, b).contiguous()

    def left_gradient(self, right: Tensor, gradient: Tensor) -> Tensor:
        """Of the left operand in its own layout, so that nothing large is turned around; ``gradient`` has ``shape``."""
        b, g = self._right(right), gradient
        return self.left.back(_product(b, g.mT) if self.left.summed_first else _product(g, b.mT))

    def right_gradient(self, left: Tensor, gradient: Tensor) -> Tensor:
        """Of the right operand, likewise."""
        a, g = self._left(left), gradient
        return self.right.back(_product(a.mT, g) if self.right.summed_first else _product(g.mT, a))

    def _left(self, tensor: Tensor) -> Tensor:
        """Shape (batch, free of the left, summed)."""
        a = tensor if self.left.ready else self.left.matrices(tensor)
        return a.mT if self.left.summed_first else a

    def _right(self, tensor: Tensor) -> Tensor:
        """Shape (batch, summed, free of the right)."""
        b = tensor if self.right.ready else self.right.matrices(tensor)
        return b if self.right.summed_first else b.mT


def _product(a: Tensor, b: Tensor) -> Tensor:
    """A batched matrix product, turned around where its result would have few columns and many rows."""
    if b.shape[2] < NARROW <= a.shape[1]:
        return torch.bmm(b.mT, a.mT).mT
    return torch.bmm(a, b)


def view(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A reshape, without torch's overhead where there is nothing to do."""
    return tensor if tensor.shape == shape else tensor.reshape(shape)


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    """The permutation that undoes one."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


@dataclass(frozen=True)
class Contraction:
    """How some operands contract: steps, and the permutation of the last result's axes, of the sizes ``source``.

    Example:
        >>> pair = Contraction.of((("a", "b"), ("b", "c")), ((0, 1),), ("c", "a"), {"a": 2, "b": 3, "c": 4})
        >>> pair([torch.ones(2, 3), torch.ones(3, 4)]).shape, pair.flops
        (torch.Size([4, 2]), 48)
    """

    steps: tuple[Step, ...]
    source: tuple[int, ...]
    order: tuple[int, ...]
    in_order: bool = field(init=False, repr=False)
    consumers: tuple[Side, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "in_order", self.order == tuple(range(len(self.order))))
        sides = {side.operand: side for step in self.steps for side in (step.left, step.right)}
        consumers = tuple(sides[number] for number in sorted(sides)[len(self.steps) + 1 :])
        object.__setattr__(self, "consumers", consumers)

    @classmethod
    def of(
        cls, operands: Sequence[Axes], pairs: Sequence[tuple[int, int]], out: Axes, sizes: Mapping[str, int]
    ) -> "Contraction":
        """Contract ``operands``, two at a time as ``pairs`` tell their numbers, to the axes ``out``.

        Every axis of an operand is in another one, or in ``out``. The layout of what comes between is chosen so that
        large tensors are viewed as matrices where they lie, and so that the axes that are last in ``out`` are last all
        the way: the copies that are left then move long runs.
        """
        tensors = list(operands)
        rank = {axis: k for k, axis in enumerate(dict.fromkeys(axis for axes in tensors for axis in axes))}
        rank |= {axis: len(rank) + k for k, axis in enumerate(out)}
        holders = Counter(axis for axes in tensors for axis in axes)
        holders.update(out)  # the result needs its axes to the end
        steps = []
        for pair in pairs:
            axes = tensors[pair[0]], tensors[pair[1]]
            shared = {axis for axis in axes[0] if axis in axes[1]}
            batch = {axis for axis in shared if holders[axis] > 2}
            holders.subtract(axes[0] + axes[1])
            ready = pair[0] >= len(operands), pair[1] >= len(operands)
            step = _meet(pair, ready, axes, batch, shared - batch, rank, sizes)
            holders.update(step.axes[2])
            tensors.append(step.axes[2])
            steps.append(step)
        have = tensors[-1]
        return cls(tuple(steps), tuple(sizes[axis] for axis in have), permutation(have, out))

    @property
    def flops(self) -> int:
        """Floating-point operations."""
        return sum(step.flops for step in self.steps)

    def __call__(self, operands: Sequence[Tensor]) -> Tensor:
        """The result: contiguous, or the view of a single operand."""
        if (
            self.steps
            and torch.is_grad_enabled()
            and plain_autograd()
            and any(tensor.requires_grad for tensor in operands)
        ):
            return _Contract.apply(self, *operands)  # type: ignore[no-any-return, no-untyped-call]
        return self.run(operands)[-1]

    def run(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """The operands, after them what every step hands on, and at last the result with its axes in order."""
        tensors = list(operands)
        for number, step in enumerate(self.steps):
            result = step.run(tensors[step.left.operand], tensors[step.right.operand])
            # Arranged for the step that takes it, once for forward and backward.
            tensors.append(self.consumers[number].matrices(result) if number < len(self.consumers) else result)
        last = view(tensors[-1], self.source)
        last = last if self.in_order else last.permute(self.order)
        tensors.append(last.contiguous() if self.steps else last)
        return tensors

    def gradients(self, tensors: Sequence[Tensor], gradient: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        """Of the operands, from what ``run`` returned, but for the last two, and the result's gradient."""
        count = len(wanted)
        waiting: list[Tensor | None] = [None] * (count + len(self.steps))
        last = gradient.reshape([self.source[k] for k in self.order])
        waiting[-1] = last if self.in_order else last.permute(inverse(self.order))
        for step in reversed(self.steps):
            found = waiting.pop()
            assert found is not None
            left, right = step.left.operand, step.right.operand
            last = found.reshape(step.shape)  # the copy, if it takes one, serves both
            if left >= count or wanted[left]:
                waiting[left] = step.left_gradient(tensors[right], last)
            if right >= count or wanted[right]:
                waiting[right] = step.right_gradient(tensors[left], last)
        return waiting


def _meet(
    pair: tuple[int, int],
    ready: tuple[bool, bool],
    axes: tuple[Axes, Axes],
    batch: set[str],
    summed: set[str],
    rank: Mapping[str, int],
    sizes: Mapping[str, int],
) -> Step:
    """The step in which two operands meet; the larger one is taken as it lies, if it can be."""

    def volume(names: Iterable[str]) -> int:
        return math.prod(sizes[axis] for axis in names)

    def free(k: int) -> list[str]:
        return [axis for axis in axes[k] if axis not in batch | summed]

    def roles(k: int) -> list[int]:
        labels = [0 if axis in batch else 1 if axis in summed else 2 for axis in axes[k]]
        return [label for label, _ in groupby(labels)]

    def lies(k: int) -> bool:
        """Whether the axes of each role lie side by side, those of the batch before the others."""
        found = roles(k)
        return len(set(found)) == len(found) and 0 not in found[1:]

    large, small = sorted((0, 1), key=lambda k: -volume(axes[k]))
    guide = axes[large] if lies(large) else axes[small] if lies(small) else sorted(batch | summed, key=rank.__getitem__)
    shared = [axis for axis in guide if axis in batch], [axis for axis in guide if axis in summed]

    def side(k: int) -> tuple[Side, list[str]]:
        source = tuple(sizes[axis] for axis in axes[k])
        own = free(k)
        for summed_first in (True, False):
            wanted = [*shared[0], *(shared[1] + own if summed_first else own + shared[1])]
            if wanted == list(axes[k]):
                break
        else:
            own, summed_first = sorted(own, key=rank.__getitem__), True
            wanted = [*shared[0], *shared[1], *own]
        order = None if wanted == list(axes[k]) else permutation(axes[k], tuple(wanted))
        inner = (volume(summed), volume(own)) if summed_first else (volume(own), volume(summed))
        return Side(pair[k], ready[k], source, order, (volume(batch), *inner), summed_first), own

    first, last = sorted((0, 1), key=lambda k: max((rank[axis] for axis in free(k)), default=-1))
    (left, before), (right, after) = side(first), side(last)
    result = (*shared[0], *before, *after)
    shape = volume(batch), volume(before), volume(after)
    return Step(left, right, (axes[first], axes[last], result), shape)


@lru_cache(maxsize=4096)
def order(operands: tuple[Axes, ...], out: Axes, sizes: tuple[tuple[str, int], ...]) -> Contraction:
    """Order the contraction of operands with named axes, greedily by the memory that a step adds.

    Args:
        operands: the axes of each operand; an axis may be in any number of them.
        out: the axes of the result.
        sizes: (axis, size) pairs.

    Example:
        >>> found = order((("a", "b"), ("b", "c"), ("c",)), ("a",), (("a", 9), ("b", 9), ("c", 9)))
        >>> [step.axes[2] for step in found.steps]
        [('b',), ('a',)]
    """
    size = dict(sizes)

    def volume(axes: Axes) -> int:
        return math.prod(size[axis] for axis in axes)

    alive = dict(enumerate(operands))
    holders = Counter(axis for axes in operands for axis in axes)
    holders.update(out)  # the result needs its axes to the end
    pairs: list[tuple[int, int]] = []
    while len(alive) > 1:
        every = [(a, b) for a in alive for b in alive if a < b]
        joined = [(a, b) for a, b in every if not set(alive[a]).isdisjoint(alive[b])]
        candidates = []
        for a, b in joined or every:  # an outer product only where there is nothing else to do
            union = tuple(dict.fromkeys(alive[a] + alive[b]))
            result = tuple(axis for axis in union if holders[axis] > (axis in alive[a]) + (axis in alive[b]))
            candidates.append((volume(result) - volume(alive[a]) - volume(alive[b]), volume(union), a, b, result))
        *_, a, b, result = min(candidates)
        holders.subtract(alive.pop(a) + alive.pop(b))
        holders.update(result)
        pairs.append((a, b))
        alive[len(operands) + len(pairs) - 1] = result
    return Contraction.of(operands, pairs, out, size)


def contract(operands: Sequence[Tensor], axes: Sequence[Axes], out: Axes) -> Tensor:
    """Contract tensors with named axes to the axes ``out``, two at a time.

    Example:
        >>> contract([torch.ones(2, 3), torch.ones(3, 4)], [("a", "b"), ("b", "c")], ("c", "a")).shape
        torch.Size([4, 2])
    """
    sizes = {
        axis: size for t, names in zip(operands, axes, strict=True) for axis, size in zip(names, t.shape, strict=True)
    }
    return order(tuple(axes), out, tuple(sizes.items()))(operands)


def reconstruct(network: TensorNetwork, cores: Sequence[Tensor]) -> Tensor:
    """The dense kernel, shape (out, in, *kernel), differentiable in the cores; in their dtype, also under autocast.

    Example:
        >>> cp = TensorNetwork.parse("i:2 r:3, o:4 r, w:5 r")
        >>> reconstruct(cp, [torch.ones(shape) for shape in cp.core_shapes]).shape
        torch.Size([4, 2, 5])
    """
    with own_precision(cores[0]):
        return contract(cores, network.cores, network.dense_axes).reshape(network.dense_shape)


def plain_autograd() -> bool:
    """Whether nothing but autograd looks on: no compiler, which does this itself, no torch.func, no forward mode."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


class _Contract(torch.autograd.Function):
    """A ``Contraction`` with a backward of two products a step, where autograd would go through every view of them."""

    @staticmethod
    def forward(ctx: Any, contraction: Contraction, *operands: Tensor) -> Tensor:
        """The result."""
        tensors = contraction.run(operands)
        ctx.contraction = contraction
        ctx.save_for_backward(*tensors[:-2])
        return tensors[-1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the operands, which may be differentiated again."""
        contraction, tensors, needed = ctx.contraction, ctx.saved_tensors, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            operands = tensors[: len(needed)]
            return None, *again(lambda: contraction.run(operands)[-1], operands, needed, gradients[0])
        return None, *contraction.gradients(tensors, gradients[0], needed)


def again(
    function: Callable[[], Tensor], arguments: Sequence[Tensor | None], wanted: Sequence[bool], gradient: Tensor
) -> Iterator[Tensor | None]:
    """Gradients by autograd, of which there may be further ones; None where they are not wanted."""
    with torch.enable_grad():
        y = function()
    asked = [argument for argument, want in zip(arguments, wanted, strict=True) if want and argument is not None]
    found = iter(torch.autograd.grad(y, asked, gradient, create_graph=True, allow_unused=True))
    return (next(found) if want else None for want in wanted)


def own_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """No autocast where the tensor is: products of weights round once, in the convolution, as a dense kernel does."""
    kind = tensor.device.type
    return nullcontext() if autocast_dtype(kind) is None else torch.autocast(kind, enabled=False)


_AUTOCAST = ("cpu", "cuda")
"""Kinds of device that have it in any case, which is quicker to know than to ask."""


def autocast_dtype(kind: str) -> torch.dtype | None:
    """What autocast computes in on a kind of device; None where it is off."""
    if (kind in _AUTOCAST or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def permutation(have: Axes, want: Axes) -> tuple[int, ...]:
    """Where each wanted axis is, as ``Tensor.permute`` takes it."""
    return tuple(have.index(axis) for axis in want)
