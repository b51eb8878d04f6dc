"""Views of tensors and orders of axes; where channels lie in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tnlayers.backend.torch_state import sizes as sizes_of
from tnlayers.spec.notation import Axes


def view(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A reshape, without torch's overhead where there is nothing to do."""
    return tensor if sizes_of(tensor) == shape else tensor.reshape(shape)


def unviewed(tensor: Tensor) -> Tensor:
    """The same tensor, but no view to autograd, which would forbid to change the result of a function in place."""
    return torch.ops.aten._unsafe_view(tensor, tensor.shape) if tensor._is_view() else tensor


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    """The permutation that undoes one."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def permutation(have: Axes, want: Axes) -> tuple[int, ...]:
    """Where each wanted axis is, as ``Tensor.permute`` takes it."""
    return tuple(have.index(axis) for axis in want)


FIRST, LAST = "first", "last"
"""Where the channels lie in memory: as in (N, C, H, W), or as in (N, H, W, C)."""


def exchange(weight: Tensor, groups: int) -> Tensor:
    """Between the shapes (groups * new, summed, *taps) and (groups * summed, new, *taps): what torch transposes.

    Example:
        >>> exchange(torch.empty(6, 4, 3), 2).shape
        torch.Size([8, 3, 3])
    """
    if groups == 1:
        return weight.transpose(0, 1)
    outer, inner, *taps = weight.shape
    weight = weight.reshape(groups, outer // groups, inner, *taps).transpose(1, 2)
    return weight.reshape(groups * inner, outer // groups, *taps)


def rearranged(tensor: Tensor, pattern: str) -> Tensor:
    """Return ``einops.rearrange`` of a tensor; einops is imported at the first call.

    Example:
        >>> rearranged(torch.empty(2, 3, 4), "a b c -> c (a b)").shape
        torch.Size([4, 6])
    """
    from einops import rearrange  # noqa: PLC0415

    return rearrange(tensor, pattern)
