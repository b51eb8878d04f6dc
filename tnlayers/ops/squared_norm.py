"""Squared norm of a network's kernel, contracted from the cores and a copy of each core."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tnlayers.backend.rate_tables import rates_of
from tnlayers.backend.rates import CONTRACT, MOVE, WEIGHTS
from tnlayers.backend.sharding import whole
from tnlayers.backend.torch_state import again, constant_to_compilers, own_precision, plain_autograd
from tnlayers.backend.views import unviewed
from tnlayers.ops.contraction import Contraction, order, to_kernel
from tnlayers.spec.network import TensorNetwork
from tnlayers.spec.notation import Axes

GROUPS = 8
"""Maximum number of core groups whose contraction with copies is estimated, apart from one group per core."""


def squared(network: TensorNetwork, cores: Sequence[Tensor]) -> Tensor:
    """Return the squared norm. Cores may have any floating-point dtype and be sharded; see ``optim.squared_norm``."""
    cores = [whole(core) for core in cores]
    fine = torch.promote_types(cores[0].dtype, torch.float32)
    place = cores[0].device.type, str(fine).removeprefix("torch.")
    contraction: NormContraction
    if torch.compiler.is_compiling():
        # Pass the network as tuples: torch 2.11 does not accept a dataclass as a constant.
        contraction = getattr(_FOR_COMPILERS, _prepare(network.cores, tuple(network.sizes.items()), *place))
    else:
        contraction = fastest(network, *place)
    with own_precision(cores[0]):
        return contraction([core.to(fine) for core in cores])


def copy(axes: Axes, shared: Axes) -> Axes:
    """Return the axes of a copy of a core: primed, except the shared ones."""
    return tuple(axis if axis in shared else f"{axis}'" for axis in axes)


@dataclass(frozen=True)
class NormContraction:
    """A plan for the squared norm of the kernel.

    Attributes:
        groups: groups of cores. Each is contracted first, then with copies.
        parts: contraction of each group.
        whole: contraction of the group results and their copies to a number. None for one group: it contracts to the
            dense kernel, whose entries are squared.
        seconds: estimated time of forward and backward, by the rates of ``tnlayers.backend.rates``.
    """

    groups: tuple[tuple[int, ...], ...]
    parts: tuple[Contraction, ...]
    whole: Contraction | None
    seconds: float

    @property
    def flops(self) -> int:
        """Number of floating-point operations of the forward."""
        last = 2 * math.prod(self.parts[0].source) if self.whole is None else self.whole.flops
        return last + sum(part.flops for part in self.parts)

    @property
    def largest(self) -> int:
        """Number of entries of the largest step result."""
        return max(each.largest for each in (*self.parts, *([self.whole] if self.whole else [])))

    def __call__(self, cores: Sequence[Tensor]) -> Tensor:
        """Return the squared norm."""
        if torch.is_grad_enabled() and plain_autograd() and any(core.requires_grad for core in cores):
            return _Square.apply(self, *cores)  # type: ignore[no-any-return, no-untyped-call]
        return self.run(cores)[-1][-1]

    def run(self, cores: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return the results of ``Contraction.run`` for each part, then for the whole."""
        runs = [part.run([cores[k] for k in group]) for part, group in zip(self.parts, self.groups, strict=True)]
        made = [tensors[-1].contiguous() for tensors in runs]
        if self.whole is None:
            kernel = made[0].flatten()
            return [*runs, [kernel, kernel.dot(kernel)]]
        return [*runs, self.whole.run(made * 2)]

    def gradients(self, runs: Sequence[Sequence[Tensor]], wanted: Sequence[bool]) -> list[Tensor | None]:
        """Return gradients of the cores from the results of ``run``: twice those with fixed copies."""
        last = runs[-1]
        shares: list[Tensor | None] = [2 * last[0]]
        if self.whole is not None:
            wants = [any(wanted[k] for k in group) for group in self.groups]
            shares = self.whole.gradients(last[:-2], torch.full_like(last[-1], 2.0), wants + [False] * len(wants))
        found: list[Tensor | None] = [None] * len(wanted)
        for part, group, tensors, share in zip(self.parts, self.groups, runs, shares, strict=False):
            if share is not None:
                here = part.gradients(tensors[:-2], share, [wanted[k] for k in group])
                for k, gradient in zip(group, here, strict=True):
                    found[k] = gradient
        return found


class _Square(torch.autograd.Function):
    """A ``NormContraction`` whose forward also computes the gradients. It saves nothing larger than the cores."""

    @staticmethod
    def forward(ctx: Any, contraction: NormContraction, *cores: Tensor) -> Tensor:
        """Return the squared norm."""
        runs = contraction.run(cores)
        ctx.contraction = contraction
        ctx.save_for_backward(*cores, *contraction.gradients(runs, ctx.needs_input_grad[1:]))
        return unviewed(runs[-1][-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients of the cores. They are differentiable if grad mode is on (double backward)."""
        contraction, needed, gradient = ctx.contraction, ctx.needs_input_grad[1:], gradients[0]
        cores, shares = ctx.saved_tensors[: len(needed)], ctx.saved_tensors[len(needed) :]
        if torch.is_grad_enabled():
            with own_precision(cores[0]):
                return None, *again(lambda: contraction.run(cores)[-1][-1], cores, needed, gradient)
        return None, *(None if share is None else gradient * share for share in shares)


@lru_cache(maxsize=4096)
def fastest(network: TensorNetwork, device: str, dtype: str) -> NormContraction:
    """Return the plan with the lowest estimated time."""
    return min(norm_contractions(network, device, dtype), key=lambda contraction: contraction.seconds)


class _ForCompilers:
    """Plans as attributes. ``torch.compile`` can trace attributes as constants of its graph."""


_FOR_COMPILERS = _ForCompilers()


@constant_to_compilers
def _prepare(cores: tuple[Axes, ...], sizes: tuple[tuple[str, int], ...], device: str, dtype: str) -> str:
    """Store the fastest plan of a network as an attribute, and return the name of the attribute."""
    network = TensorNetwork(cores, dict(sizes))
    name = re.sub(r"\W", "_", f"{network!r} {device} {dtype}")
    setattr(_FOR_COMPILERS, name, fastest(network, device, dtype))
    return name


def norm_contractions(network: TensorNetwork, device: str, dtype: str) -> Iterator[NormContraction]:
    """Yield the candidate plans: the first 0 to all steps of the contraction to the kernel, then with copies.

    The time to estimate a plan is quadratic in its number of groups. So with many cores, only plans of at most
    ``GROUPS`` groups are estimated, and the plan with one group per core.

    Example:
        >>> network = TensorNetwork.parse("i:512 r:8, r o:512")
        >>> [(way.groups, way.flops) for way in norm_contractions(network, "cpu", "float32")]
        [(((0,), (1,)), 131200), (((0, 1),), 4718592)]
    """
    trees: dict[int, Any] = {k: k for k in range(len(network.cores))}
    yield _norm_contraction(network, [*trees.values()], device, dtype)
    kernel = to_kernel(network)
    for number, step in enumerate(kernel.steps, start=len(trees)):
        trees[number] = tuple(trees.pop(k) for k in sorted((step.left.operand, step.right.operand)))
        if len(trees) <= GROUPS:
            yield _norm_contraction(network, [*trees.values()], device, dtype)


def _norm_contraction(network: TensorNetwork, trees: Sequence[Any], device: str, dtype: str) -> NormContraction:
    """Plan the contraction of cores by the given trees, then of the results with copies, in greedy order."""
    sizes = {f"{axis}{prime}": size for axis, size in network.sizes.items() for prime in ("", "'")}
    groups = [_leaves(tree) for tree in trees]
    pairs = [_pairs(tree, group) for tree, group in zip(trees, groups, strict=True)]

    def part(k: int, out: Axes) -> Contraction:
        return Contraction.of([network.cores[core] for core in groups[k]], pairs[k], out, sizes)

    def join(ends: Sequence[Axes]) -> Contraction:
        return order((*ends, *(copy(end, network.dense_axes) for end in ends)), (), tuple(sizes.items()))

    ends = [_open_axes(network, group) for group in groups]
    ends = [steps[-1].axes[2] if (steps := part(k, end).steps) else end for k, end in enumerate(ends)]
    for k in range(len(ends) if 1 < len(ends) <= GROUPS else 0):  # permute a result for its step if this saves copies
        sides = (side for step in join(ends).steps for side in (step.left, step.right) if not side.ready)
        orders = [side.order for side in sides if side.order and side.operand % len(ends) == k]
        tries = [[*ends[:k], tuple(ends[k][j] for j in found), *ends[k + 1 :]] for found in orders]
        ends = min([ends, *tries], key=lambda tried: _moved(join(tried)))
    parts = tuple(part(k, end) for k, end in enumerate(ends))
    whole = join(ends) if len(ends) > 1 else None
    table, size = rates_of(device, dtype), getattr(torch, dtype).itemsize
    seconds = 0.0 if whole else table.train[MOVE].byte * network.dense_params * size
    for contraction in (*parts, *([whole] if whole else [])):
        fixed = range(len(ends), 2 * len(ends)) if contraction is whole else ()  # the copies get no gradients
        seconds += 2 * table.train[MOVE].byte * _moved(contraction) * size
        seconds += table.infer[CONTRACT].call * bool(contraction.steps)
        for step in contraction.steps:
            once, both = (kind[WEIGHTS].seconds(step.flops, step.entries * size) for kind in (table.infer, table.train))
            seconds += once + (both - once) / 2 * sum(side.operand not in fixed for side in (step.left, step.right))
    return NormContraction(tuple(groups), parts, whole, seconds)


def _moved(contraction: Contraction) -> int:
    """Return the number of operand entries that are permuted."""
    sides = (side for step in contraction.steps for side in (step.left, step.right))
    return sum(math.prod(side.source) for side in sides if side.order)


def _open_axes(network: TensorNetwork, group: Sequence[int]) -> Axes:
    """Return the axes of a group's result: dense axes, and axes that cores outside the group have too."""
    others = {axis for k, core in enumerate(network.cores) if k not in group for axis in core}
    mine = dict.fromkeys(axis for k in group for axis in network.cores[k])
    return tuple(axis for axis in mine if axis in others or axis in network.dense_axes)


def _leaves(tree: Any) -> tuple[int, ...]:
    return (*_leaves(tree[0]), *_leaves(tree[1])) if isinstance(tree, tuple) else (tree,)


def _pairs(tree: Any, leaves: Sequence[int]) -> list[tuple[int, int]]:
    """Return the steps of a tree as ``pairs`` of ``Contraction.of``."""
    pairs: list[tuple[int, int]] = []

    def visit(node: Any) -> int:
        if not isinstance(node, tuple):
            return leaves.index(node)
        pairs.append((visit(node[0]), visit(node[1])))
        return len(leaves) + len(pairs) - 1

    visit(tree)
    return pairs
