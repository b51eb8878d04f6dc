"""Error of a fit, and the best value of one core with the others fixed."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tnlayers.backend.views import permutation
from tnlayers.ops.contraction import contract, reconstruct
from tnlayers.spec.network import TensorNetwork
from tnlayers.spec.notation import Axes

_log = logging.getLogger("tnlayers")

PULL = 1e-12
"""Weight of a core's current value in its least-squares problem, relative to the mean eigenvalue."""

DIRECT = 1024
"""Up to this many unknowns per independent problem the normal matrix is formed: at most 8 MiB."""

STEPS = 20
"""Conjugate-gradient steps per core and sweep, from the core's current value."""

REPORT = 10.0
"""Minimum seconds between two log lines."""

Operand = tuple[Tensor, Axes]


def length(tensor: Tensor) -> float:
    """Return the Frobenius norm, also of entries so small or large that their squares leave the dtype's range.

    Example:
        >>> length(torch.tensor([3 * 2.0**-100, 4 * 2.0**-100])) * 2.0**100
        5.0
    """
    largest = float(tensor.abs().max())
    return largest * float((tensor / (largest or 1.0)).norm())


class Objective:
    """Error of cores relative to a kernel, and sweeps that lower it.

    Args:
        network: network of the cores.
        target: the kernel, with one dimension for each of ``network.dense_axes``.
        metric: metric of the axes ``coupled``, with two dimensions for each. None: the identity.
        coupled: the axes of the metric.
    """

    def __init__(
        self, network: TensorNetwork, target: Tensor, metric: Tensor | None = None, coupled: Axes = ()
    ) -> None:
        self.network, self.target, self.coupled = network, target, coupled
        self.twins = {axis: f"{axis}'" for axis in network.bonds + self.coupled}
        self.metric = [] if metric is None else [metric]
        self.metric_axes = [self.coupled + self._primed(self.coupled)] * len(self.metric)
        self.weighted = self._weigh(target)
        self.scale = self._norm(target)
        self.reported = time.monotonic()
        # Update first the core that shrinks the kernel most. Its product with the kernel is reused for all others.
        volumes = [math.prod(network.shape(self._left(k))) for k in range(len(network.cores))]
        self.first = volumes.index(min(volumes))
        self.kept = self._left(self.first) if min(volumes) < target.numel() else None

    def error(self, cores: Sequence[Tensor]) -> float:
        """Return the relative error: the norm of the difference over that of the kernel."""
        return self._norm(reconstruct(self.network, cores).reshape(self.target.shape) - self.target) / self.scale

    def sweep(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """Set every core in turn to its best value, and return the cores."""
        found, operands = list(cores), {-1: self.weighted}
        axes = dict(enumerate(self.network.cores)) | {-1: self.network.dense_axes}
        for k in sorted(range(len(found)), key=lambda k: k != self.first):
            operands |= {j: core for j, core in enumerate(found) if j in axes}
            found[k] = self.best(found, k, [(operands[j], axes[j]) for j in axes if j != k])
            if k == self.first and self.kept:
                operands[-1] = contract([self.weighted, found[k]], [axes[-1], axes.pop(k)], self.kept)
                axes[-1] = self.kept
        return balance(found)

    def best(self, cores: Sequence[Tensor], k: int, seen: Sequence[Operand]) -> Tensor:
        """Return the value of core ``k`` that minimises the error. ``seen``: the kernel and the other cores."""
        network, own = self.network, self.network.cores[k]
        if len(network.cores) == 1:
            return self.target.permute(permutation(network.dense_axes, own)).contiguous()
        others = [(core, axes) for j, (core, axes) in enumerate(zip(cores, network.cores, strict=True)) if j != k]
        elsewhere = {axis for _, axes in others for axis in axes}
        pairs = [*others, *((core, self._primed(axes)) for core, axes in others)]
        pairs += zip(self.metric, self.metric_axes, strict=True)
        joint = [axis for axis in own if axis in self.twins]
        # A dense axis that another core has too splits the problem into one per index.
        apart = tuple(axis for axis in own if axis in elsewhere and axis not in joint)
        free = tuple(axis for axis in own if axis not in elsewhere and axis not in joint)
        # If the other cores form disconnected parts, the normal matrix is the Kronecker product of the parts' matrices.
        parts = [pairs] if apart else _connected(pairs, self.twins)
        blocks = [tuple(axis for axis in joint if any(axis in axes for _, axes in part)) for part in parts]
        wanted = apart + tuple(axis for block in blocks for axis in block) + free
        sizes = [math.prod(network.shape(block)) for block in blocks]
        shape = [math.prod(network.shape(apart)), *sizes, math.prod(network.shape(free))]
        right = _contract(seen, wanted).reshape(shape)
        present = cores[k].permute(permutation(own, wanted)).reshape(shape)
        if max(sizes) > DIRECT:

            def normal(value: Tensor) -> Tensor:
                operands = [*pairs, (value.reshape(network.shape(wanted)), wanted)]
                return _contract(operands, self._primed(wanted)).reshape(shape)

            solution = _conjugate_gradients(normal, right, present)
        else:
            grams = [
                _contract(part, apart + block + self._primed(block)).reshape(shape[0], size, size)
                for part, block, size in zip(parts, blocks, sizes, strict=True)
            ]
            solution = present + _solve(grams, right, present)
        return solution.reshape(network.shape(wanted)).permute(permutation(wanted, own))

    def report(self, sweep: int, error: float) -> None:
        """Log the error, at most every ``REPORT`` seconds."""
        if time.monotonic() - self.reported > REPORT:
            self.reported = time.monotonic()
            _log.info("fitting network '%s': sweep %d, error %.4g", self.network, sweep, error)

    def _primed(self, axes: Axes) -> Axes:
        return tuple(self.twins.get(axis, axis) for axis in axes)

    def _weigh(self, value: Tensor) -> Tensor:
        axes = self.network.dense_axes
        return contract([value, *self.metric], [self._primed(axes), *self.metric_axes], axes) if self.metric else value

    def _norm(self, value: Tensor) -> float:
        return float((value * self._weigh(value)).sum().clamp_min(0).sqrt() if self.metric else value.norm())

    def _left(self, k: int) -> Axes:
        """Return the axes of the kernel's product with a core."""
        own = self.network.cores[k]
        others = {axis for j, axes in enumerate(self.network.cores) if j != k for axis in axes}
        dense = tuple(axis for axis in self.network.dense_axes if axis not in own or axis in others)
        return dense + tuple(axis for axis in own if axis in self.network.bonds)


def _contract(operands: Sequence[Operand], out: Axes) -> Tensor:
    return contract([tensor for tensor, _ in operands], [axes for _, axes in operands], out)


def _connected(operands: Sequence[Operand], twins: Mapping[str, str]) -> list[list[Operand]]:
    """Group operands such that no two groups share an axis, nor an axis and its twin."""
    names = {twin: axis for axis, twin in twins.items()}
    parts: list[tuple[set[str], list[int]]] = []
    for number, (_, axes) in enumerate(operands):
        union, members = {names.get(axis, axis) for axis in axes}, [number]
        for part in [part for part in parts if part[0] & union]:
            parts.remove(part)
            union, members = union | part[0], part[1] + members
        parts.append((union, members))
    return [[operands[number] for number in members] for _, members in parts]


def _solve(grams: Sequence[Tensor], right: Tensor, present: Tensor) -> Tensor:
    """Return solution minus ``present``, with the Kronecker product of ``grams`` as normal matrix."""
    step = right - _each(grams, present, torch.matmul)
    pulled = []
    for gram in grams:
        # If a bond is larger than its maximum rank, the equations are singular. A pull towards the present value, too
        # weak to matter elsewhere, selects one solution, and the error still falls with every step.
        # The mean is over all problems, because one alone may be zero: a zero block of the kernel.
        pull = (PULL * gram.diagonal(dim1=1, dim2=2).mean()).clamp_min(torch.finfo(gram.dtype).tiny)
        pulled.append(gram + pull * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device))
    return _each(pulled, step, torch.linalg.solve)


def _each(matrices: Sequence[Tensor], value: Tensor, apply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Apply one matrix to each dimension of a value except the first (a batch) and the last."""
    for dim, matrix in enumerate(matrices, start=1):
        moved = value.movedim(dim, 1)
        value = apply(matrix, moved.reshape(*moved.shape[:2], -1)).reshape(moved.shape).movedim(1, dim)
    return value


def _conjugate_gradients(normal: Callable[[Tensor], Tensor], right: Tensor, start: Tensor) -> Tensor:
    """Improve ``start`` as solution of ``normal(value) = right`` in up to ``STEPS`` steps. Each lowers the error."""
    value, residual = start, right - normal(start)
    direction, square = residual, residual.square().sum()
    first = square
    for _ in range(STEPS):
        if square <= 1e-24 * first or not square:
            break
        image = normal(direction)
        length = square / (direction * image).sum()
        value, residual = value + length * direction, residual - length * image
        square, before = residual.square().sum(), square
        direction = residual + (square / before) * direction
    return value


def balance(cores: Sequence[Tensor]) -> list[Tensor]:
    """Scale the cores to one common norm. The kernel does not change."""
    norms = [float(core.norm()) for core in cores]
    if not all(norms):
        return list(cores)
    common = math.exp(sum(map(math.log, norms)) / len(norms))
    return [core * (common / norm) for core, norm in zip(cores, norms, strict=True)]
