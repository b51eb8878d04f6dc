"""Error of a fit, and the best value of one core with the others fixed."""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tnlayers.backend.views import inverse, permutation
from tnlayers.fitting.equations import Operand, conjugate_gradients, connected, each, pulled, solve
from tnlayers.ops.contraction import contract, reconstruct
from tnlayers.spec.network import TensorNetwork
from tnlayers.spec.notation import Axes

_log = logging.getLogger("tnlayers")

DIRECT = 1024
"""Up to this many unknowns per independent problem the normal matrix is formed: at most 8 MiB."""

STEPS, NEAR = 20, 2
"""Conjugate-gradient steps per core and sweep, from the core's current value; and with a preconditioner."""

ROUGH = 2**15
"""From this many kernel entries on, sweeps multiply the kernel in float32 at first. Below, calls cost more."""

RIDGE = 0.01
"""Weight of the cores' squared size in what sweeps lower, in units of the size without cancellation: see ``merit``."""

SMALL = 1e-3
"""Errors below this are measured by the difference of the kernels, and need the kernel in float64."""

REPORT = 10.0
"""Minimum seconds between two log lines."""


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
        self.ridge, self.pull = RIDGE / _natural(network) if cancels(network) else 0.0, 0.0
        self.squares: dict[Axes, tuple[Tensor, list[Operand]]] = {}
        # float32 rounds the right sides only. Gram matrices, solutions and cores are in float64 throughout.
        self.rough = target.numel() >= ROUGH and torch.get_float32_matmul_precision() == "highest"
        self.single = self.weighted.float() if self.rough else None
        self.reported = time.monotonic()
        # Update first the core that shrinks the kernel most. Its product with the kernel is reused for all others.
        volumes = [math.prod(network.shape(self._left(k))) for k in range(len(network.cores))]
        self.first = volumes.index(min(volumes))
        self.kept = self._left(self.first) if min(volumes) < target.numel() else None

    def error(self, cores: Sequence[Tensor]) -> float:
        """Return the relative error: the norm of the difference over that of the kernel."""
        return self._norm(reconstruct(self.network, cores).reshape(self.target.shape) - self.target) / self.scale

    def merit(self, error: float, cores: Sequence[Tensor]) -> float:
        """Return what sweeps lower: the error, and for networks that are no trees a little of the cores' size.

        Without it, the terms of such a network can grow without limit and cancel, for an error hardly lower. bfloat16
        then loses the kernel, and so does a step of training that is small for the cores. Near an exact fit the size
        counts no more.

        Reference:
            Phan et al., ECCV 2020, on stable decompositions of kernels.
        """
        return error * math.sqrt(1 + self.ridge * _squares(cores))

    def sweep(self, cores: Sequence[Tensor], error: float) -> tuple[list[Tensor], float]:
        """Set every core in turn to its best value, for cores near to some with this error. Return cores and error."""
        kernel = self.single if self.rough and self.single is not None else self.weighted
        found, operands = list(cores), {-1: kernel}
        axes = dict(enumerate(self.network.cores)) | {-1: self.network.dense_axes}
        fit = 0.0
        # The logarithms of the merit's two factors are concave in the squares, so their tangents bound them from above.
        # Of random cores, whose error is far above that of zero, the bound would be of no use.
        self.pull = self.ridge * (min(error, 1.0) * self.scale) ** 2 / (1 + self.ridge * _squares(cores))
        order = sorted(range(len(found)), key=lambda k: k != self.first)
        for k in order:
            operands |= {j: core.to(kernel.dtype) for j, core in enumerate(found) if j in axes and j != k}
            found[k], fit = self.best(found, k, [(operands[j], axes[j]) for j in axes if j != k], k == order[-1])
            if k == self.first and self.kept:
                operands[-1] = contract([kernel, found[k].to(kernel.dtype)], [axes[-1], axes.pop(k)], self.kept)
                axes[-1] = self.kept
        found = balance(found)
        square = 1 - fit / self.scale**2
        if square > SMALL**2:
            return found, math.sqrt(square)
        self.finish()
        return found, self.error(found)

    def finish(self) -> None:
        """Multiply the kernel in float64 from now on."""
        self.rough, self.single = False, None

    def best(self, cores: Sequence[Tensor], k: int, seen: Sequence[Operand], last: bool) -> tuple[Tensor, float]:
        """Return the value of core ``k`` that minimises the error, and by how much the fit lowers the squared norm.

        ``seen``: the kernel and the other cores. ``last``: whether the second result is wanted; else it is 0.
        """
        network, own = self.network, self.network.cores[k]
        if len(network.cores) == 1:
            return self.target.permute(permutation(network.dense_axes, own)).contiguous(), self.scale**2
        others = [(core, axes) for j, (core, axes) in enumerate(zip(cores, network.cores, strict=True)) if j != k]
        elsewhere = {axis for _, axes in others for axis in axes}
        pairs = [operand for each in others for operand in self._squared(*each)]
        pairs += zip(self.metric, self.metric_axes, strict=True)
        joint = [axis for axis in own if axis in self.twins]
        # A dense axis that another core has too splits the problem into one per index.
        apart = tuple(axis for axis in own if axis in elsewhere and axis not in joint)
        free = tuple(axis for axis in own if axis not in elsewhere and axis not in joint)
        # If the other cores form disconnected parts, the normal matrix is the Kronecker product of the parts' matrices.
        parts = [pairs] if apart else connected(pairs, self.twins)
        blocks = [tuple(axis for axis in joint if any(axis in axes for _, axes in part)) for part in parts]
        wanted = apart + tuple(axis for block in blocks for axis in block) + free
        sizes = [math.prod(network.shape(block)) for block in blocks]
        shape = [math.prod(network.shape(apart)), *sizes, math.prod(network.shape(free))]
        right = _contract(seen, wanted).to(cores[k].dtype).reshape(shape)
        present = cores[k].permute(permutation(own, wanted)).reshape(shape)
        if max(sizes) > DIRECT:

            def normal(value: Tensor) -> Tensor:
                operands = [*pairs, (value.reshape(network.shape(wanted)), wanted)]
                return _contract(operands, self._primed(wanted)).reshape(shape) + self.pull * value

            near = None if apart else self._near(others, wanted, free)
            solution, rest = conjugate_gradients(normal, right, present, NEAR if near else STEPS, near)
            rest = rest + self.pull * solution
        else:
            grams = [
                _contract(part, apart + block + self._primed(block)).reshape(shape[0], size, size)
                for part, block, size in zip(parts, blocks, sizes, strict=True)
            ]
            solution = solve(grams, right, present, self.pull)
            rest = right - each(grams, solution, torch.matmul) if last else right
        fit = float((solution * (right + rest)).sum()) if last else 0.0
        return solution.reshape(network.shape(wanted)).permute(permutation(wanted, own)), fit

    def _squared(self, core: Tensor, axes: Axes) -> list[Operand]:
        """Return a core and its twin, contracted if the result is no larger than both; kept as long as the core."""
        known, found = self.squares.get(axes, (None, []))
        if known is not core:
            elsewhere = Counter(axis for other in self.network.cores for axis in other)
            twin, names = self._primed(axes), {twin: axis for axis, twin in self.twins.items()}
            out = tuple(axis for axis in axes if elsewhere[axis] > 1 or axis in self.twins)
            out += tuple(axis for axis in self._primed(out) if axis not in out)
            size = math.prod(self.network.sizes[names.get(axis, axis)] for axis in out)
            found = [(core, axes), (core, twin)]
            if size <= 2 * core.numel():
                found = [(_contract(found, out), out)]
            self.squares[axes] = core, found
        return found

    def _near(self, others: Sequence[Operand], wanted: Axes, free: Axes) -> Callable[[Tensor], Tensor] | None:
        """Return the inverse of the normal matrix's blocks that have one index of the bonds of all cores."""
        network, cores = self.network, map(set, self.network.cores)
        common = set.intersection(*cores)
        alone = tuple(axis for axis in wanted if axis in common and axis in network.bonds)
        if not alone:
            return None
        twins = {axis: twin for axis, twin in self.twins.items() if axis not in alone}
        pairs = [*others, *((core, tuple(twins.get(axis, axis) for axis in axes)) for core, axes in others)]
        parts = connected([*pairs, *zip(self.metric, self.metric_axes, strict=True)], twins, alone)
        joint = [axis for axis in wanted if axis not in alone and axis not in free]
        blocks = [tuple(axis for axis in joint if any(axis in axes for _, axes in part)) for part in parts]
        count, sizes = math.prod(network.shape(alone)), [math.prod(network.shape(block)) for block in blocks]
        if max(sizes) > DIRECT:
            return None
        grams = [
            _contract(part, alone + block + self._primed(block)).reshape(count, size, size)
            for part, block, size in zip(parts, blocks, sizes, strict=True)
        ]
        inverses = [torch.linalg.inv(pulled(gram)) for gram in grams]
        order = permutation(wanted, alone + tuple(axis for block in blocks for axis in block) + free)

        def near(value: Tensor) -> Tensor:
            moved = value.reshape(network.shape(wanted)).permute(order)
            solved = each(inverses, moved.reshape(count, *sizes, -1), torch.matmul).reshape(moved.shape)
            return solved.permute(inverse(order)).reshape(value.shape)

        return near

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


def cancels(network: TensorNetwork) -> bool:
    """Return whether large terms of a network can cancel: whether it has a cycle or an axis of several cores.

    Example:
        >>> [cancels(TensorNetwork.parse(text)) for text in ("i:4 a:2, a o:4", "i:4 a:2, a o:4 b:2, b h:3 a")]
        [False, True]
    """
    homes = Counter(axis for core in network.cores for axis in core)
    shared = [count for count in homes.values() if count > 1]
    return any(count > 2 for count in shared) or len(shared) >= len(network.cores)


def _natural(network: TensorNetwork) -> float:
    """Return the squared size of all cores of a kernel of norm one whose terms do not cancel, as in a random one."""
    count = len(network.cores)
    entries = sum(math.log(math.prod(shape)) for shape in network.core_shapes)
    return count * math.exp((entries - sum(map(math.log, network.sizes.values()))) / count)


def _squares(cores: Sequence[Tensor]) -> float:
    return sum(float(core.square().sum()) for core in cores)


def balance(cores: Sequence[Tensor]) -> list[Tensor]:
    """Scale the cores to one common norm. The kernel does not change."""
    norms = [float(core.norm()) for core in cores]
    if not all(norms):
        return list(cores)
    common = math.exp(sum(map(math.log, norms)) / len(norms))
    return [core * (common / norm) for core, norm in zip(cores, norms, strict=True)]
