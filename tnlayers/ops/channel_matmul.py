"""Matrix products over the channels of every image, which may change the memory layout, and their gradients.

The forward uses ``torch.bmm`` with an expanded weight, without a copy. Its own backward is not used: it forms the
weight's gradient once per image before it sums them, and returns the input's gradient in the other layout.
"""

import torch
from torch import Tensor

from tnlayers.backend.torch_state import sizes
from tnlayers.backend.views import LAST
from tnlayers.ops.pairwise import NARROW

MIDDLE = 40
"""With fewer columns than this, and no multiple of 8, a result in channels last is slow. Measured."""


def channels_first(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply the channels of (batch, summed, *spatial), channels first, by a matrix (new, summed).

    Example:
        >>> channels_first(torch.ones(2, 3, 5, 5), torch.ones(4, 3), None).shape
        torch.Size([2, 4, 5, 5])
    """
    batch, _, *places = x.shape
    y = _bmm(weight.expand(batch, -1, -1), x.flatten(2), None if bias is None else bias[:, None])
    return y.reshape(batch, y.shape[1], *places)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, target: str) -> Tensor:
    """Multiply the channels of every image by a matrix.

    Args:
        x: shape (batch, summed, positions), in either memory layout.
        weight: shape (new, summed).
        bias: shape (new,), or None.
        target: position of the channels in the memory of the result, 'first' or 'last'.

    Returns:
        Tensor: shape (batch, new, positions).

    Example:
        >>> product(torch.ones(2, 3, 5), torch.ones(4, 3), None, "last").stride()
        (20, 1, 4)
    """
    batch = x.shape[0]
    if target == LAST and not _slow(sizes(weight)[0]):
        return _bmm(x.mT, weight.mT.expand(batch, -1, -1), bias).mT
    y = _bmm(weight.expand(batch, -1, -1), x, None if bias is None else bias[:, None])
    return y.mT.contiguous().mT if target == LAST else y


def _slow(columns: int) -> bool:
    """Return whether BLAS is slow for a result of few columns: slower than for its transpose and a copy. Measured."""
    return columns < NARROW or (columns < MIDDLE and columns % 8 > 0)


def weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """Sum ``gradient[n] @ x[n].mT`` over a batch, image by image if one product is larger than its operands.

    Narrow results are slow, so the smaller number of channels is that of the rows.

    Args:
        gradient: shape (batch, ..., new, positions).
        x: shape (batch, ..., summed, positions).

    Returns:
        Tensor: shape (..., new, summed).
    """
    new, summed, length = gradient.shape[-2], x.shape[-2], x.shape[-1]
    if new > summed:
        return weight_gradient(x, gradient).mT
    if gradient.shape[0] == 1:
        return torch.matmul(gradient[0], x[0].mT)
    if gradient.ndim > 3 or gradient.shape[0] == 0 or new * summed <= (new + summed) * length:
        return torch.matmul(gradient, x.mT).sum(0)
    total = torch.mm(gradient[0], x[0].mT)
    for image in range(1, len(x)):
        total.addmm_(gradient[image], x[image].mT)
    return total


def _bmm(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return torch.bmm(left, right) if bias is None else torch.baddbmm(bias, left, right)
