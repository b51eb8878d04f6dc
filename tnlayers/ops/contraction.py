"""Pairwise contraction of tensors with named axes: steps, their order, and their execution in torch."""

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
    """A contraction plan: steps, then the permutation ``order`` of the last result, whose axes have sizes ``source``.

    ``turned`` are the permuted sizes. ``undo`` is the inverse permutation.

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
        """Plan the contraction of ``operands`` to the axes ``out``, with one step per pair of numbers in ``pairs``.

        Every axis of an operand must be in another operand or in ``out``. Intermediate layouts are chosen such that
        large tensors are viewed as matrices without a copy, and such that the last axes of ``out`` are last in all
        results: the remaining copies then move long contiguous runs.
        """
        tensors = list(operands)
        rank = {axis: k for k, axis in enumerate(dict.fromkeys(axis for axes in tensors for axis in axes))}
        rank |= {axis: len(rank) + k for k, axis in enumerate(out)}
        holders = Counter(axis for axes in tensors for axis in axes)
        holders.update(out)  # never sum an axis of the result
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
        """Number of floating-point operations."""
        return sum(step.flops for step in self.steps)

    @property
    def largest(self) -> int:
        """Number of entries of the largest step result."""
        return max((math.prod(step.shape) for step in self.steps), default=0)

    def __call__(self, operands: Sequence[Tensor]) -> Tensor:
        """Return the result: contiguous, or a view of a single operand."""
        if (
            self.steps
            and torch.is_grad_enabled()
            and plain_autograd()
            and any(tensor.requires_grad for tensor in operands)
        ):
            return _Contract.apply(self, *operands)  # type: ignore[no-any-return, no-untyped-call]
        return self.run(operands)[-1]

    def run(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """Return the operands, then the result of every step, then the final result with permuted axes."""
        tensors = list(operands)
        for number, step in enumerate(self.steps):
            result = step.run(tensors[step.left.operand], tensors[step.right.operand])
            # In the matrix shape of the step that consumes it, once for forward and backward.
            tensors.append(self.consumers[number].matrices(result) if number < len(self.consumers) else result)
        last = view(tensors[-1], self.source)
        last = last if self.in_order else last.permute(self.order)
        tensors.append(last.contiguous() if self.steps else last)
        return tensors

    def gradients(self, tensors: Sequence[Tensor], gradient: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        """Return gradients of the wanted operands. ``tensors``: what ``run`` returned, without its last two."""
        count = len(wanted)
        waiting: list[Tensor | None] = [None] * (count + len(self.steps))
        last = view(gradient, self.turned)
        waiting[-1] = last if self.in_order else last.permute(self.undo)
        for step in reversed(self.steps):
            found = waiting.pop()
            assert found is not None
            left, right = step.left.operand, step.right.operand
            last = view(found, step.shape)  # may copy, once for both gradients
            del found
            if left >= count or wanted[left]:
                waiting[left] = step.left_gradient(tensors[right], last)
            if right >= count or wanted[right]:
                waiting[right] = step.right_gradient(tensors[left], last)
        return waiting


@lru_cache(maxsize=4096)
def order(operands: tuple[Axes, ...], out: Axes, sizes: tuple[tuple[str, int], ...]) -> Contraction:
    """Plan the contraction of operands with named axes, in the order that ``pairs`` chooses.

    Args:
        operands: axes of each operand. An axis may be in any number of operands.
        out: axes of the result.
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
    """Choose the pairs of operands to contract, greedily by the memory that each step adds.

    The axes of a result depend only on the operands it contains. So each pair is scored once, and the time is quadratic
    in the number of operands.

    Args:
        operands: axes of each operand.
        out: axes of the result.
        sizes: size of each axis.
        apart: groups of axes. A pair whose result has axes of fewer groups goes first, whatever memory it adds.

    Returns:
        list[tuple[int, int]]: numbers of the two operands of each step. Results are numbered after the operands.

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
        """Return the shared axes of two tensors that are in neither the output nor another tensor."""
        both = alive[a][0] & alive[b][0] & ~kept
        return sum(1 << k for k in bits(both) if not homes[k] & ~(alive[a][1] | alive[b][1])) if both else 0

    # For each tensor: bit masks of its axes and of the operands it contains.
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
        else:  # only outer products are left: that of the two smallest tensors is the smallest
            a, b = sorted(sorted(alive, key=lambda k: (volume(alive[k][0]), k))[:2])
        new, gone = len(masks) + len(found), summed(a, b)
        (one, here), (two, there) = alive.pop(a), alive.pop(b)
        found.append((a, b))
        alive[new] = (one | two) & ~gone, here | there
        consider(new, [other for other in alive if other != new])
    return found


def contract(operands: Sequence[Tensor], axes: Sequence[Axes], out: Axes) -> Tensor:
    """Contract tensors with named axes to the axes ``out``, pairwise.

    Example:
        >>> contract([torch.ones(2, 3), torch.ones(3, 4)], [("a", "b"), ("b", "c")], ("c", "a")).shape
        torch.Size([4, 2])
    """
    sizes = {
        axis: size for t, names in zip(operands, axes, strict=True) for axis, size in zip(names, t.shape, strict=True)
    }
    return order(tuple(axes), out, tuple(sizes.items()))(operands)


def to_kernel(network: TensorNetwork) -> Contraction:
    """Return the contraction of a network's cores to the kernel, its channel axes split into factors.

    Example:
        >>> to_kernel(TensorNetwork.parse("i:2 r:3, o:4 r, w:5 r")).largest
        40
    """
    return order(network.cores, network.dense_axes, tuple(network.sizes.items()))


def reconstruct(network: TensorNetwork, cores: Sequence[Tensor]) -> Tensor:
    """Return the dense kernel, shape ``(out, in, *kernel)``, differentiable, in the cores' dtype also under autocast.

    Example:
        >>> cp = TensorNetwork.parse("i:2 r:3, o:4 r, w:5 r")
        >>> reconstruct(cp, [torch.ones(shape) for shape in cp.core_shapes]).shape
        torch.Size([4, 2, 5])
    """
    with own_precision(cores[0]):
        return contract(cores, network.cores, network.dense_axes).reshape(network.dense_shape)


class _Contract(torch.autograd.Function):
    """A ``Contraction`` whose backward is two products per step. Autograd would also run the backward of each view."""

    @staticmethod
    def forward(ctx: Any, contraction: Contraction, *operands: Tensor) -> Tensor:
        """Return the result of the contraction."""
        tensors = contraction.run(operands)
        ctx.contraction = contraction
        ctx.save_for_backward(*tensors[:-2])
        return unviewed(tensors[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients of the operands. They are differentiable if grad mode is on (double backward)."""
        contraction, tensors, needed = ctx.contraction, ctx.saved_tensors, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            operands = tensors[: len(needed)]
            return None, *again(lambda: contraction.run(operands)[-1], operands, needed, gradients[0])
        return None, *contraction.gradients(tensors, gradients[0], needed)
