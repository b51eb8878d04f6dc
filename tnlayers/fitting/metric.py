"""Checks of the arguments of a fit, and second moments as its metric."""

import math
from typing import Any

import torch
from torch import Tensor

from tnlayers.spec.network import TensorNetwork

DAMPING = 1e-3
"""Added to the diagonal of moments, relative to its mean, so that every input has a weight."""


def check(name: str, value: Any, shape: tuple[int, ...], accepted: str) -> None:
    """Check that ``value`` is a tensor of finite real numbers, of this shape."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} is of type {kind}; it must be a tensor of real floating-point numbers")
    if value.layout != torch.strided:
        raise TypeError(f"{name} has layout {value.layout}; it must be dense, as {name}.to_dense() makes it")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}{accepted}")
    if not value.numel():
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must have entries")
    if value.is_meta:
        raise ValueError(f"{name} is on the meta device; a fit needs its values")
    if not torch.isfinite(value).all():
        raise ValueError(f"{name} holds NaN or infinity; a fit needs finite values")


def as_metric(network: TensorNetwork, moments: Any, device: torch.device) -> Tensor:
    """Check the moments, and return them scaled to a mean diagonal of one and damped."""
    channels, patch = network.dense_shape[1], math.prod(network.dense_shape[1:])
    side = patch if isinstance(moments, Tensor) and moments.shape == (patch, patch) else channels
    accepted = f"; it must be {(channels, channels)}, a row and a column per input channel"
    accepted += f", or {(patch, patch)}, per input channel and kernel position" if patch > channels else ""
    check("moments", moments, (side, side), accepted)
    values: Tensor = moments.detach().to("cpu", torch.float64)
    values = values / (float(values.abs().max()) or 1.0)
    skew = float((values - values.mT).abs().max())
    if skew > math.sqrt(torch.finfo(moments.dtype).eps):
        raise ValueError(f"moments differs from its transpose by {skew:.3g} of its largest entry; it must be symmetric")
    values = (values + values.mT) / 2
    metric = damped(values, values.diagonal().mean())
    if torch.linalg.cholesky_ex(metric).info:
        raise ValueError("moments has a negative eigenvalue; it must be positive semi-definite, as E[x x^T] is")
    return metric.to(device)


def damped(moments: Tensor, mean: Tensor) -> Tensor:
    """Divide each square matrix by its ``mean`` and add ``DAMPING`` to the diagonal. If mean <= 0, add 1 instead.

    Example:
        >>> damped(torch.zeros(2, 2), torch.tensor(0.0))
        tensor([[1., 0.],
                [0., 1.]])
    """
    mean = mean[..., None, None]
    identity = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)
    return moments / torch.where(mean > 0, mean, 1.0) + torch.where(mean > 0, DAMPING, 1.0) * identity
