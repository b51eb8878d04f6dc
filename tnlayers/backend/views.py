"""Views of tensors, orders of axes, and memory layouts of channels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tnlayers.backend.torch_state import sizes as sizes_of
from tnlayers.spec.notation import Axes


def view(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Reshape a tensor, without torch's overhead if nothing changes."""
    return tensor if sizes_of(tensor) == shape else tensor.reshape(shape)


def unviewed(tensor: Tensor) -> Tensor:
    """Return a tensor that is no view to autograd, which forbids in-place changes of a function's views."""
    return torch.ops.aten._unsafe_view(tensor, tensor.shape) if tensor._is_view() else tensor


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    """Return the inverse of a permutation."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def permutation(have: Axes, want: Axes) -> tuple[int, ...]:
    """Return the permutation from axes to axes, for ``Tensor.permute``."""
    return tuple(have.index(axis) for axis in want)


FIRST, LAST = "first", "last"
"""Memory layouts of the channels: (N, C, H, W) and (N, H, W, C)."""


def exchange(weight: Tensor, groups: int) -> Tensor:
    """Convert between the shapes (groups * new, summed, *taps) and (groups * summed, new, *taps) of torch's weights.

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
