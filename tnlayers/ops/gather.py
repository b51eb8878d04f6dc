"""Selection of rows by an index that is split into digits along the factors of the number of rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tnlayers.ops.contraction import Contraction
from tnlayers.spec.notation import Axes, einsum_equation

TOKENS = "*"
"""The axis of the indices. No axis of a network has this name."""


@dataclass(frozen=True)
class Gather:
    """Selection of rows of a matrix by some digits of an index; the digits of the row are most significant first.

    Attributes:
        digits: for each run of neighbouring digits: the product of the sizes behind it, and of its own.
        leading: whether the first run has the most significant digit, which bounds the index.

    Example:
        >>> gather = Gather.of((4, 3, 2), (0, 2))
        >>> gather(torch.tensor([0, 1, 23]), torch.arange(8).reshape(8, 1)).squeeze(1)
        tensor([0, 1, 7])
    """

    digits: tuple[tuple[int, int], ...]
    leading: bool

    @classmethod
    def of(cls, sizes: Sequence[int], positions: Sequence[int]) -> "Gather":
        """Return the selection by the digits at some positions, given the sizes of all digits.

        Example:
            >>> Gather.of((4, 3, 2), (0, 1))
            Gather(digits=((2, 12),), leading=True)
        """
        runs: list[list[int]] = []
        for position in positions:
            if runs and runs[-1][-1] == position - 1:
                runs[-1].append(position)
            else:
                runs.append([position])
        digits = tuple((math.prod(sizes[run[-1] + 1 :]), math.prod(sizes[k] for k in run)) for run in runs)
        return cls(digits, bool(positions) and positions[0] == 0)

    def __call__(self, index: Tensor, matrix: Tensor) -> Tensor:
        """Return a row of the matrix for each index.

        Raises:
            IndexError: on a CPU, an index is out of range and the selection has the most significant digit.
        """
        rows: Tensor | None = None
        for number, (divisor, size) in enumerate(self.digits):
            digit = index if divisor == 1 else index // divisor
            digit = digit if self.leading and number == 0 else digit % size
            rows = digit if rows is None else rows * size + digit
        assert rows is not None
        return F.embedding(rows, matrix)


def join(operands: Sequence[Tensor], axes: Sequence[Axes], out: Axes) -> Tensor:
    """Contract the operands one after the other to the axes ``out``, for sizes that only a compiler knows.

    Example:
        >>> join([torch.ones(5, 2), torch.ones(2, 3)], [("*", "a"), ("a", "o")], ("*", "o")).shape
        torch.Size([5, 3])
    """
    result, have = operands[0], axes[0]
    for number, (operand, names) in enumerate(zip(operands[1:], axes[1:], strict=True), start=2):
        later = {axis for other in axes[number:] for axis in other} | set(out)
        kept = tuple(axis for axis in dict.fromkeys((*have, *names)) if axis in later)
        result, have = torch.einsum(einsum_equation(have, names, out=kept), result, operand), kept
    return result.permute([have.index(axis) for axis in out])


def in_sequence(axes: Sequence[Axes], out: Axes, sizes: dict[str, int]) -> Contraction:
    """Return the contraction of the operands one after the other.

    Example:
        >>> found = in_sequence([("*", "a"), ("a", "o")], ("*", "o"), {"*": 5, "a": 2, "o": 3})
        >>> found([torch.ones(5, 2), torch.ones(2, 3)]).shape
        torch.Size([5, 3])
    """
    count = len(axes)
    pairs = [(0, 1), *((count + k, k + 2) for k in range(count - 2))] if count > 1 else []
    return Contraction.of(axes, pairs, out, sizes)
