"""Chains of views and copies of a tensor: planned once for a shape, then applied with little Python at each call."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

Move = tuple[Callable[[Tensor, Any], Tensor], Any]
"""A function of a tensor and an argument, and the argument."""


def reshape(shape: Sequence[int]) -> Move:
    """Return the move to a shape."""
    return Tensor.reshape, tuple(shape)


def permute(order: Sequence[int]) -> Move:
    """Return the permutation of the axes."""
    return Tensor.permute, tuple(order)


def _contiguous(tensor: Tensor, _: None) -> Tensor:
    return tensor.contiguous()


CONTIGUOUS: Move = _contiguous, None
"""The copy to contiguous memory, if the tensor is not so already."""


def needed(shape: Sequence[int], moves: Iterable[Move]) -> tuple[Move, ...]:
    """Return the moves without those that change nothing for a tensor of this shape.

    Only reshapes, permutations and ``CONTIGUOUS`` may come before the last move.

    Example:
        >>> [argument for _, argument in needed((2, 3), [reshape((2, 3)), permute((1, 0)), reshape((3, 2))])]
        [(1, 0)]
    """
    now, kept = tuple(shape), []
    for move in moves:
        function, argument = move
        before = now
        if function is Tensor.reshape:
            now = argument
        elif function is Tensor.permute:
            if argument == tuple(range(len(argument))):
                continue
            now = tuple(now[axis] for axis in argument)
        if function is not Tensor.reshape or now != before:
            kept.append(move)
    return tuple(kept)


def moved(tensor: Tensor, moves: Sequence[Move]) -> Tensor:
    """Apply moves in turn."""
    for function, argument in moves:
        tensor = function(tensor, argument)
    return tensor
