"""Linear equations of one core: their parts, direct solutions, and conjugate gradients."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tnlayers.spec.notation import Axes

PULL = 1e-14
"""Weight of a core's current value in its least-squares problem, relative to the mean eigenvalue."""
Operand = tuple[Tensor, Axes]


def connected(operands: Sequence[Operand], twins: Mapping[str, str], ignored: Axes = ()) -> list[list[Operand]]:
    """Group operands such that no two groups share an axis, nor an axis and its twin, but for ``ignored`` ones."""
    names = {twin: axis for axis, twin in twins.items()}
    parts: list[tuple[set[str], list[int]]] = []
    for number, (_, axes) in enumerate(operands):
        union, members = {names.get(axis, axis) for axis in axes}.difference(ignored), [number]
        for part in [part for part in parts if part[0] & union]:
            parts.remove(part)
            union, members = union | part[0], part[1] + members
        parts.append((union, members))
    return [[operands[number] for number in members] for _, members in parts]


def solve(grams: Sequence[Tensor], right: Tensor, present: Tensor, ridge: float = 0.0) -> Tensor:
    """Solve equations with the Kronecker product of ``grams`` as normal matrix, plus a ridge on its diagonal."""
    step = right - each(grams, present, torch.matmul) - ridge * present
    if not ridge or len(grams) == 1:
        return present + each([pulled(gram, ridge) for gram in grams], step, torch.linalg.solve)
    found = [torch.linalg.eigh(pulled(gram)) for gram in grams]
    values = torch.ones_like(right[..., :1])
    for dim, (own, _) in enumerate(found, start=1):
        values = values * own.reshape([len(own), *(-1 if d == dim else 1 for d in range(1, right.ndim - 1)), 1])
    turned = each([vectors.mT for _, vectors in found], step, torch.matmul) / (values.clamp_min(0) + ridge)
    return present + each([vectors for _, vectors in found], turned, torch.matmul)


def pulled(gram: Tensor, ridge: float = 0.0) -> Tensor:
    """Return normal matrices with a pull towards the present value, and a ridge.

    If a bond is larger than its maximum rank, the equations are singular. A pull towards the present value, too weak to
    matter elsewhere, selects one solution, and the error still falls with every step.
    """
    # The mean is over all problems, because one alone may be zero: a zero block of the kernel.
    pull = (PULL * gram.diagonal(dim1=1, dim2=2).mean()).clamp_min(torch.finfo(gram.dtype).tiny)
    return gram + (pull + ridge) * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)


def each(matrices: Sequence[Tensor], value: Tensor, apply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Apply one matrix to each dimension of a value except the first (a batch) and the last."""
    for dim, matrix in enumerate(matrices, start=1):
        moved = value.movedim(dim, 1)
        value = apply(matrix, moved.reshape(*moved.shape[:2], -1)).reshape(moved.shape).movedim(1, dim)
    return value


def conjugate_gradients(
    normal: Callable[[Tensor], Tensor],
    right: Tensor,
    start: Tensor,
    steps: int,
    near: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Improve ``start`` as solution of ``normal(value) = right``. Each step lowers the error.

    Args:
        normal: multiplies by the normal matrix.
        right: the right side.
        start: the first value.
        steps: maximum number of steps.
        near: preconditioner, which solves equations near to these; None: no preconditioner.

    Returns:
        tuple[Tensor, Tensor]: the value, and the residual ``right - normal(value)``.
    """
    value, residual = start, right - normal(start)
    direction = nearer = residual if near is None else near(residual)
    square = float((residual * nearer).sum())
    first = square
    for _ in range(steps):
        if square <= 1e-24 * first:
            break
        image = normal(direction)
        length = square / float((direction * image).sum())
        value, residual = value + length * direction, residual - length * image
        nearer = residual if near is None else near(residual)
        square, before = float((residual * nearer).sum()), square
        direction = nearer + (square / before) * direction
    return value, residual
