"""Contracting tensors with named axes, two at a time: the steps, their order, and their execution in torch."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from heapq import heappop, heappush
from typing import Any

import torch
from torch import Tensor

from tnlayers.backend.torch_state import again, own_precision, plain_autograd
from tnlayers.backend.views import inverse, permutation, unviewed, view
from tnlayers.ops.pairwise import Side, Step, pairwise_step
from tnlayers.spec.network import TensorNetwork
from tnlayers.spec.notation import Axes, bits


@dataclass(frozen=True)
class Contraction:
    """How some operands contract: steps, and the permutation of the last result's axes, of the sizes ``source``.

    ``turned`` are these sizes in their last order, ``undo`` is the permutation back.

    Example:
        >>> pair = Contraction.of((("a", "b"), ("b", "c")), ((0, 1),), ("c", "a"), {"a": 2, "b": 3, "c": 4})
        >>> pair([torch.ones(2, 3), torch.ones(3, 4)]).shape, pair.flops
        (torch.Size([4, 2]), 48)
    """

    steps: tuple[Step, ...]
    source: tuple[int, ...]
    order: tuple[int, ...]
    in_order: bool = field(init=False, repr=False)
    turned: tuple[int, ...] = field(init=False, repr=False, compare=False)
    undo: tuple[int, ...] = field(init=False, repr=False, compare=False)
    consumers: tuple[Side, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "in_order", self.order == tuple(range(len(self.order))))
        object.__setattr__(self, "turned", tuple(self.source[k] for k in self.order))
        object.__setattr__(self, "undo", inverse(self.order))
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
            step = pairwise_step(pair, ready, axes, batch, shared - batch, rank, sizes)
            holders.update(step.axes[2])
            tensors.append(step.axes[2])
            steps.append(step)
        have = tensors[-1]
        return cls(tuple(steps), tuple(sizes[axis] for axis in have), permutation(have, out))

    @property
    def flops(self) -> int:
        """Floating-point operations."""
        return sum(step.flops for step in self.steps)

    @property
    def largest(self) -> int:
        """The number of entries of the largest result of a step."""
        return max((math.prod(step.shape) for step in self.steps), default=0)

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
        last = view(gradient, self.turned)
        waiting[-1] = last if self.in_order else last.permute(self.undo)
        for step in reversed(self.steps):
            found = waiting.pop()
            assert found is not None
            left, right = step.left.operand, step.right.operand
            last = view(found, step.shape)  # the copy, if it takes one, serves both
            del found
            if left >= count or wanted[left]:
                waiting[left] = step.left_gradient(tensors[right], last)
            if right >= count or wanted[right]:
                waiting[right] = step.right_gradient(tensors[left], last)
        return waiting


@lru_cache(maxsize=4096)
def order(operands: tuple[Axes, ...], out: Axes, sizes: tuple[tuple[str, int], ...]) -> Contraction:
    """Order the contraction of operands with named axes, see ``pairs``.

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
    return Contraction.of(operands, pairs(operands, out, size), out, size)


def pairs(
    operands: Sequence[Axes], out: Axes, sizes: Mapping[str, int], apart: Sequence[Axes] = ()
) -> list[tuple[int, int]]:
    """Choose the pairs of operands to contract, greedily by the memory that a step adds.

    The axes of what some operands contract to do not depend on how the others contract. So each pair is judged once,
    and the time grows with the square of the number of operands.

    Args:
        operands: the axes of each operand.
        out: the axes of the result.
        sizes: the size of each axis.
        apart: groups of axes; a pair whose result has axes of fewer groups goes first, whatever it adds.

    Returns:
        list[tuple[int, int]]: the numbers of two operands each; results are numbered behind the operands.

    Example:
        >>> pairs([("a", "b"), ("b", "c"), ("c",)], ("a",), {"a": 9, "b": 9, "c": 9})
        [(1, 2), (0, 3)]
    """
    bit = {axis: 1 << k for k, axis in enumerate(sizes)}
    lengths, kept = list(sizes.values()), sum(bit[axis] for axis in set(out))
    masks = [sum(bit[axis] for axis in axes) for axes in operands]
    homes = [sum(1 << k for k, mask in enumerate(masks) if mask & axis) for axis in bit.values()]

    @cache
    def volume(mask: int) -> int:
        return math.prod(lengths[k] for k in bits(mask))

    def summed(a: int, b: int) -> int:
        """The axes of two tensors that neither the output nor another tensor needs."""
        both = alive[a][0] & alive[b][0] & ~kept
        return sum(1 << k for k in bits(both) if not homes[k] & ~(alive[a][1] | alive[b][1])) if both else 0

    # Of each tensor: its axes, and the operands that it comes from.
    alive = {k: (mask, 1 << k) for k, mask in enumerate(masks)}
    groups = [sum(bit[axis] for axis in group) for group in apart]
    heap: list[tuple[int, int, int, int, int]] = []

    def judge(a: int, b: int) -> tuple[int, int, int, int, int]:
        (one, _), (two, _) = alive[a], alive[b]
        union = volume(one) * volume(two) // volume(one & two)
        joined = sum([1 for group in groups if (one | two) & group])
        return joined, union // volume(summed(a, b)) - volume(one) - volume(two), union, a, b

    def consider(new: int, others: Iterable[int]) -> None:
        axes = alive[new][0]
        for other in others:
            if axes & alive[other][0]:
                heappush(heap, judge(min(new, other), max(new, other)))

    for k in alive:
        consider(k, range(k))
    found: list[tuple[int, int]] = []
    while len(alive) > 1:
        while heap and not (heap[0][3] in alive and heap[0][4] in alive):
            heappop(heap)
        if heap:
            *_, a, b = heappop(heap)
        else:  # outer products alone are left, of which the smallest tensors' is the smallest
            a, b = sorted(sorted(alive, key=lambda k: (volume(alive[k][0]), k))[:2])
        new, gone = len(masks) + len(found), summed(a, b)
        (one, here), (two, there) = alive.pop(a), alive.pop(b)
        found.append((a, b))
        alive[new] = (one | two) & ~gone, here | there
        consider(new, [other for other in alive if other != new])
    return found


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


class _Contract(torch.autograd.Function):
    """A ``Contraction`` with a backward of two products a step, where autograd would go through every view of them."""

    @staticmethod
    def forward(ctx: Any, contraction: Contraction, *operands: Tensor) -> Tensor:
        """The result."""
        tensors = contraction.run(operands)
        ctx.contraction = contraction
        ctx.save_for_backward(*tensors[:-2])
        return unviewed(tensors[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the operands, which may be differentiated again."""
        contraction, tensors, needed = ctx.contraction, ctx.saved_tensors, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            operands = tensors[: len(needed)]
            return None, *again(lambda: contraction.run(operands)[-1], operands, needed, gradients[0])
        return None, *contraction.gradients(tensors, gradients[0], needed)
