"""Contracting tensors with named axes, two at a time: the steps, their order, and their execution in torch."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tnlayers.network import TensorNetwork
from tnlayers.notation import Axes, einsum_equation


@dataclass(frozen=True)
class Step:
    """Two operands meet. Operands are numbered from 0, results go on from there.

    Attributes:
        left, right: the operands.
        axes: the axes of the left operand, of the right one, and of the result.
        equation: the step as einsum.
        backward: as einsum, the gradients of the left and the right operand from the result's and the other one.
    """

    left: int
    right: int
    axes: tuple[Axes, Axes, Axes]
    equation: str = field(init=False, repr=False)
    backward: tuple[str, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        left, right, out = self.axes
        object.__setattr__(self, "equation", einsum_equation(left, right, out=out))
        both = einsum_equation(out, right, out=left), einsum_equation(out, left, out=right)
        object.__setattr__(self, "backward", both)

    def volume(self, sizes: Mapping[str, int]) -> int:
        """How many products of one entry of each operand the step forms."""
        left, right, out = self.axes
        return math.prod(sizes[axis] for axis in {*left, *right, *out})

    def flops(self, sizes: Mapping[str, int]) -> int:
        """Floating-point operations, two for each multiply-add; a product that sums nothing counts as none.

        This is how ``torch.utils.flop_counter`` counts matrix products and convolutions.
        """
        left, right, out = map(set, self.axes)
        sums = any(sizes[axis] > 1 for axis in (left | right) - out)
        return 2 * self.volume(sizes) if sums else 0


@lru_cache(maxsize=4096)
def order(operands: tuple[Axes, ...], out: Axes, sizes: tuple[tuple[str, int], ...]) -> tuple[Step, ...]:
    """Order the contraction of operands with named axes, greedily by the memory that a step adds.

    Args:
        operands: the axes of each operand; an axis may be in any number of them.
        out: the axes of the result.
        sizes: (axis, size) pairs.

    Returns:
        tuple[Step, ...]: one step fewer than there are operands.

    Example:
        >>> [s.axes[2] for s in order((("a", "b"), ("b", "c"), ("c",)), ("a",), (("a", 9), ("b", 9), ("c", 9)))]
        [('b',), ('a',)]
    """
    size = dict(sizes)

    def volume(axes: Axes) -> int:
        return math.prod(size[axis] for axis in axes)

    alive = dict(enumerate(operands))
    holders = Counter(axis for axes in operands for axis in axes)
    holders.update(out)  # the result needs its axes to the end
    steps: list[Step] = []
    while len(alive) > 1:
        pairs = [(a, b) for a in alive for b in alive if a < b]
        joined = [(a, b) for a, b in pairs if not set(alive[a]).isdisjoint(alive[b])]
        candidates = []
        for a, b in joined or pairs:  # an outer product only where there is nothing else to do
            union = tuple(dict.fromkeys(alive[a] + alive[b]))
            result = tuple(axis for axis in union if holders[axis] > (axis in alive[a]) + (axis in alive[b]))
            candidates.append((volume(result) - volume(alive[a]) - volume(alive[b]), volume(union), a, b, result))
        *_, a, b, result = min(candidates)
        axes = alive.pop(a), alive.pop(b), result if alive else out
        holders.subtract(axes[0] + axes[1])
        holders.update(axes[2])
        steps.append(Step(a, b, axes))
        alive[len(operands) + len(steps) - 1] = axes[2]
    return tuple(steps)


def contract(operands: Sequence[Tensor], axes: Sequence[Axes], out: Axes) -> Tensor:
    """Contract tensors with named axes to the axes ``out``, two at a time.

    Example:
        >>> contract([torch.ones(2, 3), torch.ones(3, 4)], [("a", "b"), ("b", "c")], ("c", "a")).shape
        torch.Size([4, 2])
    """
    if len(operands) == 1:
        return torch.einsum(einsum_equation(axes[0], out=out), operands[0])
    sizes = {
        axis: size for t, names in zip(operands, axes, strict=True) for axis, size in zip(names, t.shape, strict=True)
    }
    return execute(order(tuple(axes), out, tuple(sizes.items())), operands)


def execute(steps: Sequence[Step], operands: Sequence[Tensor]) -> Tensor:
    """Run contractions in order; the last result, or the only operand where there is nothing to contract."""
    if steps and torch.is_grad_enabled() and plain_autograd() and any(tensor.requires_grad for tensor in operands):
        return Contract.apply(steps, *operands)  # type: ignore[no-any-return, no-untyped-call]
    return _run(steps, operands)[-1]


def _run(steps: Sequence[Step], operands: Sequence[Tensor]) -> list[Tensor]:
    """The operands, and after them the result of every step."""
    tensors = list(operands)
    for step in steps:
        tensors.append(torch.einsum(step.equation, tensors[step.left], tensors[step.right]))
    return tensors


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


class Contract(torch.autograd.Function):
    """``execute`` with a backward of two contractions a step, where autograd would go through every view of them.

    No axis is summed that only one operand has, so each gradient is a contraction of the result's with the other one.
    """

    @staticmethod
    def forward(ctx: Any, steps: Sequence[Step], *operands: Tensor) -> Tensor:
        """The last result."""
        tensors = _run(steps, operands)
        ctx.steps = steps
        ctx.save_for_backward(*tensors[:-1])
        return tensors[-1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the operands, which may be differentiated again."""
        steps, tensors = ctx.steps, ctx.saved_tensors
        count = len(tensors) - len(steps) + 1
        if torch.is_grad_enabled():
            operands = tensors[:count]
            wanted = [t for t, want in zip(operands, ctx.needs_input_grad[1:], strict=True) if want]
            found = iter(torch.autograd.grad(_run(steps, operands)[-1], wanted, gradients, create_graph=True))
            return (None, *(next(found) if want else None for want in ctx.needs_input_grad[1:]))
        waiting: list[Tensor | None] = [None] * len(tensors) + [gradients[0]]
        for number in reversed(range(len(steps))):
            step, gradient = steps[number], waiting[count + number]
            for at, equation, other in zip(
                (step.left, step.right), step.backward, (step.right, step.left), strict=True
            ):
                if at >= count or ctx.needs_input_grad[1 + at]:
                    waiting[at] = torch.einsum(equation, gradient, tensors[other])
            waiting[count + number] = None
        return (None, *waiting[:count])


def own_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """No autocast where the tensor is: products of weights round once, in the convolution, as a dense kernel does."""
    kind = tensor.device.type
    return nullcontext() if autocast_dtype(kind) is None else torch.autocast(kind, enabled=False)


def autocast_dtype(kind: str) -> torch.dtype | None:
    """What autocast computes in on a kind of device; None where it is off."""
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def natural(left: Axes, right: Axes, kept: Axes) -> Axes:
    """The axes of a product in the order in which a batched matrix product leaves them: shared, left's, right's."""
    shared = [axis for axis in left if axis in right]
    alone = [axis for axis in (*left, *right) if axis not in shared]
    return tuple(axis for axis in (*shared, *alone) if axis in kept)


def permutation(have: Axes, want: Axes) -> tuple[int, ...]:
    """Where each wanted axis is, as ``Tensor.permute`` takes it."""
    return tuple(have.index(axis) for axis in want)
