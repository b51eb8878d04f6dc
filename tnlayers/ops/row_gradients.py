"""Gradients of looked-up rows, divided by how often each index is in the input."""

from typing import Any

import torch
from torch import Tensor


def divided_by_counts(rows: Tensor, index: Tensor, most: int) -> Tensor:
    """Return the rows, whose gradient is divided by the count of their index, as ``scale_grad_by_freq`` asks.

    Args:
        rows: shape (tokens, features).
        index: shape (tokens,).
        most: number of possible indices.

    Example:
        >>> rows = torch.ones(3, 2, requires_grad=True)
        >>> divided_by_counts(rows, torch.tensor([4, 0, 4]), 5).sum().backward()
        >>> rows.grad[:, 0].tolist()
        [0.5, 1.0, 0.5]
    """
    counts = torch.zeros(most, dtype=rows.dtype, device=rows.device)
    counts = counts.index_add(0, index, torch.ones_like(index, dtype=rows.dtype))
    found: Tensor = _Scaled.apply(rows, counts[index].reciprocal().unsqueeze(-1))  # type: ignore[no-untyped-call]
    return found


class _Scaled(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, factor: Tensor) -> Tensor:
        """Return the rows."""
        return rows.view_as(rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Save the factor."""
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Multiply the gradient."""
        return gradients[0] * ctx.saved_tensors[0], None
