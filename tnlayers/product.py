"""A matrix product over the channels that may move them in memory, with a backward that keeps gradients in place.

``torch.bmm`` with an expanded weight does the forward without a copy. Its own backward does not: it forms the weight's
gradient once per image before it sums them, and returns the input's gradient in the other layout.
"""

from typing import Any

import torch
from torch import Tensor

from tnlayers.contraction import autocast_dtype, plain_autograd

FIRST, LAST = "first", "last"
"""Where the channels lie in memory: as in (N, C, H, W), or as in (N, H, W, C)."""

NARROW = 16
"""With fewer columns than this, BLAS crawls where its left matrix is transposed; a small copy is faster then."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None, target: str) -> Tensor:
    """Multiply the channels of every image by a matrix.

    Args:
        x: shape (batch, summed, positions), with strides of either layout.
        weight: shape (new, summed).
        bias: shape (new,), or None.
        target: where the result has its channels in memory, 'first' or 'last'.

    Returns:
        Tensor: shape (batch, new, positions).

    Example:
        >>> product(torch.ones(2, 3, 5), torch.ones(4, 3), None, "last").stride()
        (20, 1, 4)
    """
    if not plain_autograd():
        return _product(x, weight, bias, target)
    dtype = autocast_dtype(x.device.type)
    if dtype is not None and x.dtype != torch.float64:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return Product.apply(x, weight, bias, target)  # type: ignore[no-any-return, no-untyped-call]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, target: str) -> Tensor:
    batch = x.shape[0]
    if target == LAST and weight.shape[0] >= NARROW:
        return _bmm(x.mT, weight.mT.expand(batch, -1, -1), bias).mT
    y = _bmm(weight.expand(batch, -1, -1), x, None if bias is None else bias[:, None])
    return y.mT.contiguous().mT if target == LAST else y


def _bmm(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return torch.bmm(left, right) if bias is None else torch.baddbmm(bias, left, right)


class Product(torch.autograd.Function):
    """The product with its own backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: str) -> Tensor:
        """The product."""
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias, target)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, in its layout, of the weight and of the bias."""
        (x, weight), gradient = ctx.saved_tensors, gradients[0]
        for_x = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            for_x = _product(gradient, weight.mT, None, FIRST if x.stride(-1) == 1 else LAST)
        if ctx.needs_input_grad[1]:
            if torch.is_grad_enabled() or len(x) == 0:  # to be differentiated again
                for_weight = torch.bmm(gradient, x.mT).sum(0)
            else:
                for_weight = torch.mm(gradient[0], x[0].mT)
                for image in range(1, len(x)):
                    for_weight.addmm_(gradient[image], x[image].mT)
        if ctx.needs_input_grad[2]:
            for_bias = gradient.sum((0, 2))
        return for_x, for_weight, for_bias, None
