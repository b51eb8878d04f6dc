"""Contraction of two tensors with named axes as a batched matrix product, without copies where possible."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from tnlayers.backend.torch_state import sizes as sizes_of
from tnlayers.backend.views import inverse, permutation, view
from tnlayers.spec.notation import Axes

NARROW = 16
"""With fewer columns than this in its result, BLAS is slow: 5 times slower at 1000 x 9. Measured."""


@dataclass(frozen=True)
class Side:
    """One operand of a step, as a batch of matrices.

    Attributes:
        operand: number of the operand.
        ready: whether it is the result of another step, and so already has the shape ``shape``.
        source: sizes of its axes before the permutation.
        order: permutation that makes the axes of each role adjacent, or None if none is needed.
        shape: (batch, summed, free) if ``summed_first``, else (batch, free, summed).
        summed_first: whether the summed axes precede the free ones.
        turned, undo: ``source`` permuted by ``order``, and the inverse permutation.
    """

    operand: int
    ready: bool
    source: tuple[int, ...]
    order: tuple[int, ...] | None
    shape: tuple[int, int, int]
    summed_first: bool
    turned: tuple[int, ...] = field(init=False, repr=False, compare=False)
    undo: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        order = tuple(range(len(self.source))) if self.order is None else self.order
        object.__setattr__(self, "turned", tuple(self.source[k] for k in order))
        object.__setattr__(self, "undo", inverse(order))

    def matrices(self, tensor: Tensor) -> Tensor:
        """Return the operand in ``shape``, as a view if possible, else as a copy."""
        if self.order is None:
            return view(tensor, self.shape)
        return view(tensor, self.source).permute(self.order).reshape(self.shape)

    def back(self, gradient: Tensor) -> Tensor:
        """Convert a gradient from ``shape`` to ``source``."""
        gradient = view(gradient, self.turned)
        return gradient if self.order is None else gradient.permute(self.undo)


@dataclass(frozen=True)
class Step:
    """A batched matrix product of two operands. Operands are numbered from 0, results after the operands.

    Attributes:
        left, right: the operands. The free axes of the left one come first in the result.
        axes: axes of the left operand, of the right operand and of the result.
        shape: shape of the result, (batch, free of the left, free of the right).
        summed: number of products summed per entry of the result.
    """

    left: Side
    right: Side
    axes: tuple[Axes, Axes, Axes]
    shape: tuple[int, int, int]
    summed: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "summed", self.left.shape[1 if self.left.summed_first else 2])

    @property
    def flops(self) -> int:
        """Number of floating-point operations: two per multiply-add, none for a product that sums nothing.

        ``torch.utils.flop_counter`` counts matrix products and convolutions in the same way.
        """
        return 2 * self.summed * math.prod(self.shape) if self.summed > 1 else 0

    @property
    def entries(self) -> int:
        """Number of entries of the operands and of the result."""
        return sum(map(math.prod, (self.left.shape, self.right.shape, self.shape)))

    def run(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the result, of shape ``shape``."""
        a, b = self._left(left), self._right(right)
        return a * b if self.summed == 1 else _product(a, b).contiguous()

    def left_gradient(self, right: Tensor, gradient: Tensor) -> Tensor:
        """Return the left operand's gradient in its layout, without a large transpose. ``gradient`` has ``shape``."""
        b, g = self._right(right), gradient
        return self.left.back(_product(b, g.mT) if self.left.summed_first else _product(g, b.mT))

    def right_gradient(self, left: Tensor, gradient: Tensor) -> Tensor:
        """Return the right operand's gradient in its layout. ``gradient`` has ``shape``."""
        a, g = self._left(left), gradient
        return self.right.back(_product(a.mT, g) if self.right.summed_first else _product(g.mT, a))

    def _left(self, tensor: Tensor) -> Tensor:
        """Return the left operand as (batch, free of the left, summed)."""
        a = tensor if self.left.ready else self.left.matrices(tensor)
        return a.mT if self.left.summed_first else a

    def _right(self, tensor: Tensor) -> Tensor:
        """Return the right operand as (batch, summed, free of the right)."""
        b = tensor if self.right.ready else self.right.matrices(tensor)
        return b if self.right.summed_first else b.mT


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply batches of matrices, as transposes if the result has few columns and many rows."""
    if sizes_of(b)[2] < NARROW <= sizes_of(a)[1]:
        return torch.bmm(b.mT, a.mT).mT
    return torch.bmm(a, b)


def pairwise_step(
    pair: tuple[int, int],
    ready: tuple[bool, bool],
    axes: tuple[Axes, Axes],
    batch: set[str],
    summed: set[str],
    rank: Mapping[str, int],
    sizes: Mapping[str, int],
) -> Step:
    """Plan the contraction of two operands. The larger one is used without a copy if possible."""

    def volume(names: Iterable[str]) -> int:
        return math.prod(sizes[axis] for axis in names)

    def free(k: int) -> list[str]:
        return [axis for axis in axes[k] if axis not in batch | summed]

    def roles(k: int) -> list[int]:
        labels = [0 if axis in batch else 1 if axis in summed else 2 for axis in axes[k]]
        return [label for label, _ in groupby(labels)]

    def lies(k: int) -> bool:
        """Return whether the axes of each role are adjacent, with the batch axes first."""
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
